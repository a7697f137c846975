"""nnU-Net's augmentation with intensities that a scanner could have measured.

HU and SUV are absolute, and what a lesion is depends on them, so of nnU-Net's intensity transforms these are off:
brightness (scales a CT from air upwards, and PET by up to 25 %), contrast and gamma (bend the scale, and keep or move
the mean of the patch, which says nothing in absolute units), Gaussian noise (of one size for CT and PET, 150 HU at
most). Blur and low resolution stay: they are what another reconstruction or voxel size does. In place of those that
are off come a factor on the PET (calibration, uptake time), an offset on the CT (tube voltage, scanner), noise as
strong as that of low-dose CT and proportional to uptake in PET, and on demand a shift of the CT against the PET and
patches in which one of them is missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from torch import Tensor

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.units import PRETRAINING_UNITS, shift_above_air
from plans.front_door import absent_values
from plans.settings import Finetune

KEPT = (GaussianBlurTransform, SimulateLowResolutionTransform)
CT_NOISE = 30.0  # HU, largest standard deviation; low-dose CT of a trunk has 20 to 40
PET_NOISE = 0.1  # of the uptake, largest standard deviation; 10 % in the liver is what EARL asks of a scanner
P_NOISE, P_MISALIGNMENT = 0.1, 0.2


class PhysicalTransform(ImageOnlyTransform):
    """Changes CT and PET in pretraining units, whatever the plans' normalisation and order of channels is.

    Args:
        channels: index of the CT and of the PET in an image (C, *patch); None: it is not used and stays.
        scale, shift: pretraining units = scale * plans' value + shift, for CT and for PET.
        ct, pet: strength of the change, for each transform to read.
    """

    def __init__(
        self, channels: Sequence[int | None], scale: Sequence[float], shift: Sequence[float], ct: float, pet: float
    ) -> None:
        super().__init__()
        self.channels, self.scale, self.shift = list(channels), list(scale), list(shift)
        self.ct, self.pet = ct / PRETRAINING_UNITS["CT"].std, pet

    def _apply_to_image(self, img: Tensor, **params: Any) -> Tensor:
        changes = (self.change_ct, self.change_pet)
        for change, channel, scale, shift in zip(changes, self.channels, self.scale, self.shift, strict=True):
            if channel is not None:
                img[channel] = (change(img[channel] * scale + shift, **params) - shift) / scale
        return img

    def change_ct(self, ct: Tensor, **params: Any) -> Tensor:
        """The CT, of the patch's shape, as it becomes."""
        raise NotImplementedError

    def change_pet(self, pet: Tensor, **params: Any) -> Tensor:
        """The PET, of the patch's shape, as it becomes."""
        raise NotImplementedError


class Calibration(PhysicalTransform):
    """One factor (log-normal, spread `pet`) on the whole PET, one offset (normal, spread `ct` HU) on the whole CT."""

    def get_parameters(self, **_: Any) -> dict[str, float]:
        offset, exponent = torch.randn(2).tolist()
        return {"ct_offset": self.ct * offset, "pet_factor": math.exp(self.pet * exponent)}

    def change_ct(self, ct: Tensor, **params: Any) -> Tensor:
        return shift_above_air(ct, params["ct_offset"])

    def change_pet(self, pet: Tensor, **params: Any) -> Tensor:
        return pet * params["pet_factor"]


class ScannerNoise(PhysicalTransform):
    """Noise of a standard deviation of up to `ct` HU in the CT and up to `pet` times the uptake in the PET."""

    def get_parameters(self, **_: Any) -> dict[str, float]:
        ct, pet = torch.rand(2).tolist()
        return {"ct_noise": self.ct * ct, "pet_noise": self.pet * pet}

    def change_ct(self, ct: Tensor, **params: Any) -> Tensor:
        return shift_above_air(ct, params["ct_noise"] * torch.randn_like(ct))

    def change_pet(self, pet: Tensor, **params: Any) -> Tensor:
        return pet * (1 + params["pet_noise"] * torch.randn_like(pet))


class MissingModality(ImageOnlyTransform):
    """Either the CT or the PET, each as often, becomes what a missing one is at prediction: one value everywhere.

    Args:
        channels: index of the CT and of the PET in an image (C, *patch).
        values: of a missing CT and of a missing PET in the plans' normalisation.
    """

    def __init__(self, channels: Sequence[int], values: Sequence[float]) -> None:
        super().__init__()
        self.missing = list(zip(channels, values, strict=True))

    def get_parameters(self, **_: Any) -> dict[str, int]:
        return {"missing": int(torch.randint(len(self.missing), ()))}

    def _apply_to_image(self, img: Tensor, **params: Any) -> Tensor:
        channel, value = self.missing[params["missing"]]
        img[channel] = value
        return img


def misalign(channel: int, millimetres: float, spacing: Sequence[float]) -> BasicTransform:
    """Shift of the channel by up to `millimetres` along each axis, in whole voxels; the others and the labels stay.

    Raises:
        UserError: the installed batchgeneratorsv2 has no such transform.
    """
    try:
        from batchgeneratorsv2.transforms.spatial.channel_misalignment import ChannelMisalignmentTransform
    except ImportError:
        raise UserError("finetune.misalignment: the installed batchgeneratorsv2 has no ChannelMisalignmentTransform; "
                        "update it, or set finetune.misalignment=0") from None  # fmt: skip
    shift = [int(millimetres / s) for s in spacing]
    return ChannelMisalignmentTransform(
        im_channels_2_misalign=(channel,), shift_zyx=shift, p_shift=1.0, p_squeeze=0.0, p_rotation=0.0, rad_or_deg="deg"
    )


def physical_augmentation(
    stock: ComposeTransforms, finetune: Finetune, plans: dict[str, Any], config: dict[str, Any]
) -> ComposeTransforms:
    """nnU-Net's training transforms with its intensity transforms replaced, everything else as it is.

    Args:
        config: the configuration of `plans`, which says what is CT and PET, in which units and of what spacing.
    """
    network = config["architecture"]["arch_kwargs"]
    arguments = [network[name] for name in ("modalities", "scale", "shift")]
    ours: list[BasicTransform] = [
        Calibration(*arguments, ct=finetune.ct_shift, pet=finetune.pet_scale),
        RandomTransform(ScannerNoise(*arguments, ct=CT_NOISE, pet=PET_NOISE), P_NOISE),
    ]
    if finetune.misalignment:
        moved = misalign(network["modalities"][0], finetune.misalignment, config["spacing"])
        ours.insert(0, RandomTransform(moved, P_MISALIGNMENT))
    transforms: list[BasicTransform] = []
    for transform in stock.transforms:
        of_intensity = isinstance(getattr(transform, "transform", None), ImageOnlyTransform)
        if of_intensity:  # ours take the place of the first
            transforms, ours = transforms + ours, []
        if not of_intensity or isinstance(transform.transform, KEPT):
            transforms.append(transform)
    transforms += ours
    if finetune.modality_dropout:  # last: nothing changes it any more, as nothing does at prediction
        missing = MissingModality(network["modalities"], absent_values(plans, config))
        transforms.append(RandomTransform(missing, finetune.modality_dropout))
    return ComposeTransforms(transforms)
