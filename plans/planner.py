"""FratMAEPlanner: nnU-Net's planner with coronal axes, fixed units and the whole-body grid."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from tqdm import tqdm

from nnunet_fratmae.base.command import UserError, nnunet_folder
from nnunet_fratmae.base.files import renamed
from nnunet_fratmae.base.units import MODALITIES
from plans.channels import channel_modalities, find_channels
from plans.extension import extend_plans
from plans.front_door import HWD_FROM_ZYX, hwd_axes, intensity_properties
from plans.preprocessed import PLANS_NAME, read_json
from plans.settings import Settings


class FratMAEPlanner(ExperimentPlanner):
    """Plans a labelled dataset whose fingerprint is there; `plan_experiment` writes FratMAEPlans.json."""

    def __init__(self, dataset_name: str, settings: Settings) -> None:
        super().__init__(dataset_name, plans_name=PLANS_NAME)
        self.settings = settings
        self.lowres_creation_threshold = 0  # a coronal patch spans the body; there is no 3d_lowres
        images = [files["images"][0] for files in self.dataset.values()]
        if find_reader(self.dataset_json, images[0]) != determine_reader_writer_from_dataset_json(
            self.dataset_json, images[0], verbose=False
        ):
            # nnU-Net measures with the reader that it would take itself, which leaves images as they lie
            for name in ("spacings", "shapes_after_crop"):
                measured = zip(self.dataset_fingerprint[name], images, strict=True)
                self.dataset_fingerprint[name] = [reoriented(values, image) for values, image in measured]

    def determine_transpose(self) -> tuple[list[int], list[int]]:
        return list(HWD_FROM_ZYX), [HWD_FROM_ZYX.index(axis) for axis in range(3)]

    def determine_reader_writer(self) -> type:
        return find_reader(self.dataset_json, next(iter(self.dataset.values()))["images"][0])

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self) -> tuple[list[str], list[bool]]:
        schemes = normalization_schemes(self.dataset_json)
        return schemes, [False] * len(schemes)

    @staticmethod
    def static_estimate_VRAM_usage(*_: Any, **__: Any) -> float:
        """Nothing: the patch and batch size that nnU-Net fits to its U-Net are replaced by ours."""
        return 1.0

    def plan_experiment(self) -> dict[str, Any]:
        """nnU-Net's planning without its printing; the plans are in plans.json and in `self.plans`."""
        with contextlib.redirect_stdout(io.StringIO()):
            super().plan_experiment()
        return self.plans

    def save_plans(self, plans: dict[str, Any]) -> None:
        if "3d_fullres" not in plans["configurations"]:
            raise UserError(f"{self.raw_dataset_folder}: the images are 2D; FratMAE needs whole-body volumes")
        if hwd_axes(plans["transpose_forward"]) != [0, 1, 2]:
            raise UserError(f"nnunetv2 {version('nnunetv2')} transposed the axes by itself, so it is none that "
                            "FratMAEPlanner knows; install the version that this package asks for")  # fmt: skip
        # nnU-Net sets batch_dice where it also plans a lowres stage. Lesions are few in whole bodies: over single
        # patches, Dice would not punish what is found where there is nothing.
        plans["configurations"] = {"3d_fullres": {**plans["configurations"]["3d_fullres"], "batch_dice": True}}
        self.plans = finish_plans(plans, self.dataset_json, self.settings)
        path = nnunet_folder("nnUNet_preprocessed") / self.dataset_name / f"{self.plans_identifier}.json"
        earlier = read_json(path)["configurations"] if path.is_file() else {}
        # As nnU-Net, which keeps configurations that the user added, but the file is never half-written
        self.plans["configurations"] = {**earlier, **self.plans["configurations"]}
        recursive_fix_for_json_export(self.plans)
        write_json(path, self.plans)


def reoriented(values: Sequence[float], image: str) -> list[float]:
    """What an image has along each axis as it lies (z, y, x), along those that SimpleITKIOWithReorient gives it."""
    header = sitk.ImageFileReader()
    header.SetFileName(image)
    header.ReadImageInformation()
    if header.GetDimension() != 3:
        return list(values)
    lies = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(header.GetDirection())  # such as "LPS"
    return [values[2 - next(i for i in range(3) if lies[i] in pair)] for pair in ("SI", "AP", "LR")]


def find_reader(dataset_json: dict[str, Any], example: str) -> type:
    """The reader that dataset.json names, else the one that brings every image into one orientation (contract 1)."""
    if "overwrite_image_reader_writer" not in dataset_json and (
        dataset_json["file_ending"] in SimpleITKIOWithReorient.supported_file_endings
    ):
        return SimpleITKIOWithReorient
    return determine_reader_writer_from_dataset_json(dataset_json, example, verbose=False)


def normalization_schemes(dataset_json: dict[str, Any]) -> list[str]:
    """nnU-Net's scheme of each channel: CT and PET keep HU and SUV, what is neither is not used and stays as it is."""
    channels = channel_modalities(dataset_json)
    return ["CTNormalization" if name in MODALITIES else "NoNormalization" for name in channels]


def finish_plans(plans: dict[str, Any], dataset_json: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Plans in the pretraining units, extended, with the configuration `wholebody` if there are CT and PET."""
    channels = find_channels(dataset_json)
    measured = plans.get("foreground_intensity_properties_per_channel", {})
    plans["foreground_intensity_properties_per_channel"] = {
        str(channel): intensity_properties(name) if name in MODALITIES else measured.get(str(channel), {})
        for channel, name in enumerate(channel_modalities(dataset_json))
    }
    plans, _ = extend_plans(plans, dataset_json, settings)
    plans["fratmae_chosen"] = _chosen(settings.to_json(), plans["fratmae"])
    if len(channels) == len(MODALITIES):
        plans["configurations"]["wholebody"] = {
            "inherits_from": "3d_fullres",
            "data_identifier": f"{plans['plans_name']}_wholebody",
            "patch_size": plans["fratmae"]["wholebody"]["patch"],
        }
    return plans


def _chosen(asked: dict[str, Any], planned: dict[str, Any]) -> dict[str, Any]:
    """What was open and was chosen for the data, by dotted key; planning again chooses it anew unless it was edited."""
    parts = {"": (asked, planned)} | {f"{name}.": (asked[name], planned[name]) for name in ("wholebody", "finetune")}
    return {
        prefix + key: after[key]
        for prefix, (before, after) in parts.items()
        for key, value in before.items()
        if value is None and after[key] is not None
    }


def plan_unlabelled(
    dataset_name: str, studies: dict[str, Any], dataset_json: dict[str, Any], settings: Settings
) -> dict[str, Any]:
    """Plans of a dataset without a single label, for pretraining only; nnU-Net's own planner cannot make them.

    Only what the whole-body store needs is there; the sizes are chosen from the shapes of up to 50 studies.
    """
    examples = [images for images, _ in studies.values()]
    reader = find_reader(dataset_json, examples[0][0])
    shapes, spacings = [], []
    for images in tqdm(examples[:: -(-len(examples) // 50)], desc="Shapes of the studies"):
        data, properties = reader().read_images(images[:1])
        shapes.append([data.shape[1:][axis] for axis in HWD_FROM_ZYX])
        spacings.append([properties["spacing"][axis] for axis in HWD_FROM_ZYX])
    config = {
        "data_identifier": f"{PLANS_NAME}_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [int(n) for n in np.median(shapes, 0)],
        "median_image_size_in_voxels": [float(n) for n in np.median(shapes, 0)],
        "spacing": [float(n) for n in np.median(spacings, 0)],
        "normalization_schemes": normalization_schemes(dataset_json),
        "use_mask_for_norm": [False] * len(channel_modalities(dataset_json)),
        "batch_dice": True,
    }
    plans = {
        "dataset_name": dataset_name,
        "plans_name": PLANS_NAME,
        "image_reader_writer": reader.__name__,
        "transpose_forward": list(HWD_FROM_ZYX),
        "transpose_backward": [HWD_FROM_ZYX.index(axis) for axis in range(3)],
        "configurations": {"3d_fullres": config},
        "experiment_planner_used": "FratMAEPlanner",
        "label_manager": "LabelManager",
    }
    plans = finish_plans(plans, dataset_json, settings)
    folder = nnunet_folder("nnUNet_preprocessed") / dataset_name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "dataset.json", dataset_json)
    write_json(folder / f"{PLANS_NAME}.json", plans)
    return plans


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Raises WriteError on a full disk; what was there before stays then."""
    with renamed(path) as partial:
        save_json(content, str(partial), sort_keys=False)
