"""Which channel of a dataset is CT and which is PET."""

from __future__ import annotations

import re
from typing import Any

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.units import MODALITIES


def channel_modalities(dataset_json: dict[str, Any]) -> list[str]:
    """What each channel is: CT, PET, or another word for one that is not used.

    From the block "fratmae" of dataset.json, else from names such as PET, PT and SUV. Two channels both named "CT" are
    the nnU-Net community's way to keep SUV absolute; there CT comes first. Without the block, other channels may stand
    beside CT and PET, but not beside one of them alone: they might be the other, named as its normalisation.

    Raises:
        UserError: the channels are not one CT and one PET, or one of them.
    """
    channels = dataset_json.get("channel_names", dataset_json.get("modality", {}))
    names = [str(name) for _, name in sorted(channels.items(), key=lambda item: int(item[0]))]
    declared = dataset_json.get("fratmae", {}).get("modalities")
    named = [_modality(str(name)) for name in declared or names]
    if named == ["CT", "CT"]:
        named = ["CT", "PET"]
    used = sorted(name for name in named if name in MODALITIES)
    complete = used == sorted(MODALITIES) or (len(used) == 1 and (declared or len(named) == 1))
    if len(named) != len(names) or not complete:
        raise UserError(f'dataset.json: channels {names} are not one CT and one PET, or one of them; say which is '
                        f'which in "fratmae": {{"modalities": ["CT", "PET"]}}')  # fmt: skip
    return named


def find_channels(dataset_json: dict[str, Any], modalities: str | None = None) -> dict[str, int]:
    """The index of the channel of each modality, CT before PET.

    Args:
        modalities: which are wanted: both, CT or PET; None: those that are there.

    Raises:
        UserError: as `channel_modalities`, or one that is wanted is not there.
    """
    named = channel_modalities(dataset_json)
    there = [modality for modality in MODALITIES if modality in named]
    wanted = {None: there, "both": MODALITIES}.get(modalities, [modalities])
    for modality in wanted:
        if modality not in there:
            raise UserError(f"dataset.json: {there[0]} alone, {modality} is needed here; without it a dataset can only "
                            f"train FratMAETrainer, with fratmae.modalities={there[0]} or null")  # fmt: skip
    return {modality: named.index(modality) for modality in wanted}


def find_modalities(dataset_json: dict[str, Any]) -> list[int]:
    """The index of the CT channel and of the PET channel, where both are needed.

    Raises:
        UserError: the channels are not one CT and one PET.
    """
    return list(find_channels(dataset_json, "both").values())


def _modality(name: str) -> str:
    words = re.findall("[A-Z]+", name.upper())
    return "PET" if any(word == "PT" or "PET" in word or "SUV" in word for word in words) else name.upper()
