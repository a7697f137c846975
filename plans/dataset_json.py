"""dataset.json of a dataset, which others may have written, read and checked in one place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.files import plain_name
from plans.fields import require, shown, shown_name
from plans.preprocessed import read_json

MOST_CHANNELS = 100
MOST_LISTED = 8  # numbers of a message


def read_dataset_json(path: Path, labelled: bool = False) -> dict[str, Any]:
    """dataset.json, checked.

    Raises:
        UserError: as `check_dataset_json`, or it is no JSON.
    """
    dataset_json = read_json(path)
    check_dataset_json(dataset_json, str(path), labelled)
    return dataset_json


def check_dataset_json(dataset_json: Any, where: str, labelled: bool = False) -> None:
    """See that dataset.json says what nnU-Net and we read of it.

    Args:
        where: the file, for the messages.
        labelled: whether there are segmentations, for which it must name the labels.

    Raises:
        UserError: a part that is missing, of another type, or of nnU-Net's version 1.
    """
    require(isinstance(dataset_json, dict), f"{where}: must be {{...}}, not {shown(dataset_json)}")
    labels = dataset_json.get("labels", {})
    require(isinstance(labels, dict), f'{where}: "labels" must be {{"background": 0, ...}}, not {shown(labels)}')
    if any(isinstance(value, str) and not value.isdigit() for value in labels.values()):
        raise UserError(f'{where}: is of nnU-Net\'s version 1 ("labels" from numbers to names); write "labels": '
                        '{"background": 0, "lesion": 1}, "channel_names", "numTraining" and "file_ending", or convert '
                        "the dataset with nnUNetv2_convert_old_nnUNet_dataset")  # fmt: skip
    channels = dataset_json.get("channel_names", dataset_json.get("modality"))
    numbered = isinstance(channels, dict) and 0 < len(channels) <= MOST_CHANNELS
    numbered = numbered and set(channels) == {str(number) for number in range(len(channels))}
    named = numbered and all(isinstance(name, str) for name in channels.values())
    require(named, f'{where}: "channel_names" must be {{"0": "CT", "1": "CT"}} or the like, not {shown(channels)}')
    ending = dataset_json.get("file_ending")
    right = isinstance(ending, str) and re.fullmatch(r"(\.[A-Za-z0-9]+)+", ending)
    require(bool(right), f'{where}: "file_ending" must be ".nii.gz" or the like, not {shown(ending)}')
    reader = dataset_json.get("overwrite_image_reader_writer", "None")
    right = isinstance(reader, str) and re.fullmatch(r"\w+", reader)
    require(bool(right), f'{where}: "overwrite_image_reader_writer" must name a reader of nnU-Net, not {shown(reader)}')
    block = dataset_json.get("fratmae", {})
    require(isinstance(block, dict), f'{where}: "fratmae" must be {{...}}, not {shown(block)}')
    modalities = block.get("modalities")
    named = modalities is None or (isinstance(modalities, list) and all(isinstance(name, str) for name in modalities))
    require(named, f'{where}: "fratmae": "modalities" must be ["CT", "PET"] or the like, not {shown(modalities)}')
    _check_listed(dataset_json.get("dataset"), where)
    if labelled or labels:
        declared_labels(dataset_json, where)
    number = dataset_json.get("numTraining", 1)
    right = type(number) is int and number >= 0
    require(right, f'{where}: "numTraining" must be the number of labelled cases, not {shown(number)}')


def _check_listed(files: Any, where: str) -> None:
    """The key "dataset", in which nnU-Net lets a user list files that lie anywhere."""
    if files is None:
        return
    right = isinstance(files, dict) and all(
        isinstance(of, dict) and isinstance(of.get("label"), str) and isinstance(of.get("images"), list)
        and all(isinstance(image, str) for image in of["images"])
        for of in files.values()
    )  # fmt: skip
    require(right, f'{where}: "dataset" must be {{"CASE": {{"images": [...], "label": "..."}}, ...}}')
    for case in files:
        plain_name(case, f'{where}: "dataset", case {shown_name(case)}')


def declared_labels(dataset_json: Mapping[str, Any], where: str) -> set[int]:
    """The values that label images may have.

    Raises:
        UserError: nnU-Net cannot train on such labels.
    """
    labels, values, regions = dataset_json.get("labels", {}), set(), 0
    for name, value in labels.items():
        numbers = value if isinstance(value, list) else [value]
        right = numbers and all(_is_whole(number) for number in numbers)
        require(bool(right), f'{where}: "labels": {shown_name(name)} must be a whole number, or a list of some for a '
                f"region, not {shown(value)}")  # fmt: skip
        values |= {int(number) for number in numbers}
        regions += isinstance(value, list) and len(value) > 1 and name != "ignore"
    background, ignored = labels.get("background"), labels.get("ignore")
    require(_is_whole(background) and int(background) == 0, f'{where}: "labels" must have "background": 0')
    require(len(values) > 1, f'{where}: "labels" has only the background; add what is to be segmented, such as '
            '"lesion": 1')  # fmt: skip
    require("ignore" not in labels or (type(ignored) is int and ignored == max(values)), f'{where}: "labels": "ignore" '
            "must be the highest of the labels")  # fmt: skip
    given = [int(v) for name, value in labels.items() for v in (value if isinstance(value, list) else [value])]
    if regions:
        order = dataset_json.get("regions_class_order")
        needed = sum(value not in (0, [0]) for name, value in labels.items() if name != "ignore")
        right = isinstance(order, list) and len(order) == needed and all(_is_whole(one) for one in order)
        require(right, f'{where}: "labels" has regions, so "regions_class_order" must be a list of {needed} numbers, '
                f"not {shown(order)}")  # fmt: skip
    else:
        require(len(set(given)) == len(given), f'{where}: "labels" gives one number to two names')
    if not regions or "ignore" in labels:
        gaps = sorted(set(range(max(values) + 1)) - values) if max(values) < 1000 else [min(values)]
        require(not gaps and min(values) == 0, f'{where}: the numbers of "labels" must be 0, 1, 2, ... without a gap, '
                f"they are {listed(sorted(values))}; renumber them there and in the label files")  # fmt: skip
    return values


def _is_whole(value: Any) -> bool:
    """As nnU-Net reads a label's number: 1, 1.0 and "1" are 1."""
    if isinstance(value, str):
        return value.isdecimal() and len(value) < 6
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e5 and value == int(value)


def listed(numbers: list[int]) -> str:
    """1, 2, 3, 4, ... of numbers that may be many."""
    return ", ".join(map(str, numbers[:MOST_LISTED])) + (", ..." if len(numbers) > MOST_LISTED else "")
