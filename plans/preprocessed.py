"""What a preprocessed dataset holds besides its plans: nnU-Net's cross-validation folds and the stored cases.

Folders of stored cases are written aside and take their place when they are whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunet_fratmae.base.command import UserError, nnunet_folder
from nnunet_fratmae.base.files import check_writable, renamed, writing_to
from nnunet_fratmae.base.locks import locked

PLANS_NAME = "FratMAEPlans"
FOLDS = 5  # that nnU-Net makes by itself
LOCK = ".planning.lock"
STORED = (".b2nd", ".pkl", ".npz", ".npy")  # files of nnU-Net's preprocessed cases
GROUND_TRUTH = "gt_segmentations"  # nnU-Net's copy of the labels


def read_json(path: Path) -> Any:
    """The content of a file that a user may have edited.

    Raises:
        UserError: it is not there, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there; put it back, or plan again (fratmae_plan_and_preprocess)") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON ({error}); mend it there, or have it written again") from None


def read_splits(path: Path) -> list[dict[str, list[str]]]:
    """The folds of a splits_final.json, each with the case ids of "train" and "val".

    Raises:
        UserError: it is no JSON, or has another form.
    """
    splits = read_json(path)
    right = isinstance(splits, list) and splits and all(
        isinstance(fold, dict) and all(
            isinstance(fold.get(side), list) and all(isinstance(case, str) for case in fold[side])
            for side in ("train", "val")
        )
        for fold in splits
    )  # fmt: skip
    if not right:
        raise UserError(f'{path}: must be a list of folds, each {{"train": ["case", ...], "val": ["case", ...]}}; mend '
                        "it, or remove it and the folds are made anew")  # fmt: skip
    return splits


def check_split_cases(path: Path, cases: Collection[str], what: str, fold: int | None = None) -> None:
    """See that a splits_final.json, if it is there, names no other cases than `cases`.

    Args:
        what: what these cases are, for the message: "studies of ...".
        fold: of which fold; None: of all.

    Raises:
        UserError: it does.
    """
    if not path.is_file():
        return
    folds = read_splits(path)
    folds = folds if fold is None else folds[fold : fold + 1]
    named = {case for one in folds for side in ("train", "val") for case in one[side]}
    gone = sorted(named - set(cases))
    if gone:
        first = ", ".join(gone[:3]) + (", ..." if len(gone) > 3 else "")
        raise UserError(f"{path}: {len(gone)} of its {len(named)} cases are no {what} (any more): {first}; take them "
                        "out of the folds, or remove the file and the folds are made anew")  # fmt: skip


def check_splits(raw: Path) -> None:
    """See that the folds of a raw dataset are those that were preprocessed, as nnU-Net wants it, too.

    Raises:
        UserError: they changed since.
    """
    ours, theirs = raw / "splits_final.json", nnunet_folder("nnUNet_preprocessed") / raw.name / "splits_final.json"
    if ours.is_file() and theirs.is_file():
        before, now = ([{side: sorted(fold[side]) for side in ("train", "val")} for fold in read_splits(path)]
                       for path in (theirs, ours))  # fmt: skip
        if before[: len(now)] != now:
            raise UserError(f"{theirs}: has other folds than {ours} has by now; models trained so far validate by the "
                            "first; remove it to take over the second, and train them anew")  # fmt: skip


def check_fold(preprocessed: Path, folder: Path, fold: int | str) -> None:
    """See that nnU-Net can train `fold` on the cases that it preprocessed to `folder`.

    Raises:
        UserError: no cases, too few for folds, a fold of cases that are not there or without a side, a damaged case.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    dataset_class = infer_dataset_class(str(folder)) if folder.is_dir() and any(folder.iterdir()) else None
    stored = set(dataset_class.get_identifiers(str(folder))) if dataset_class else set()
    if not stored:
        raise UserError(f"{folder}: no preprocessed cases there; run fratmae_plan_and_preprocess (of stock plans: "
                        "nnUNetv2_preprocess)")  # fmt: skip
    path = preprocessed / "splits_final.json"
    if fold != "all" and not path.is_file() and len(stored) < FOLDS:
        raise UserError(f"fold {fold}: {preprocessed.name} has {len(stored)} labelled cases, too few for nnU-Net's "
                        f"{FOLDS} folds; train on all of them (fold all), or write folds of your own to {path}")
    used = stored
    if fold != "all" and path.is_file():
        check_split_cases(path, stored, f"preprocessed cases of {folder}", int(fold))
        for one in read_splits(path)[int(fold) : int(fold) + 1]:  # of a fold beyond them, nnU-Net draws one
            if not (one["train"] and one["val"]):
                raise UserError(f"{path}: fold {fold} has {len(one['train'])} training and {len(one['val'])} "
                                "validation cases; each side needs one")  # fmt: skip
            used = {*one["train"], *one["val"]}
    for case in sorted(used):
        for file in (folder / f"{case}.b2nd", folder / f"{case}_seg.b2nd"):
            if file.is_file():
                open_case(file)


def open_case(file: Path) -> Any:
    """The blosc2 array of a preprocessed case, of which only the header is read.

    Raises:
        UserError: it is damaged or cut off.
    """
    import blosc2

    with reading_case(file):
        return blosc2.open(str(file), mode="r")


@contextmanager
def reading_case(file: Path) -> Iterator[None]:
    """What blosc2 raises where a file is damaged or cut off is a UserError within that names the file."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{file}: is damaged or cut off ({error}); preprocess the dataset again (of FratMAE plans: "
                        "fratmae_plan_and_preprocess)") from None  # fmt: skip


def stored_cases(folder: Path) -> set[str]:
    """Case ids of a folder that nnU-Net preprocessed."""
    return {f.stem for f in folder.glob("*.b2nd") if not f.stem.endswith("_seg")}


def validation_cases(preprocessed: Path, plans: dict[str, Any], fold: int) -> set[str]:
    """Case ids that nnU-Net validates on in `fold`, none where nothing is labelled.

    splits_final.json is made as nnU-Net makes it where it is missing.

    Raises:
        UserError: there is no such fold.
    """
    path = preprocessed / "splits_final.json"
    if not path.is_file():
        from nnunetv2.utilities.crossval_split import generate_crossval_split

        folder = preprocessed / plans["configurations"]["3d_fullres"]["data_identifier"]
        cases = sorted(stored_cases(folder))
        if not cases:
            return set()
        if len(cases) < FOLDS:
            raise UserError(f"-f {fold}: {preprocessed.name} has {len(cases)} labelled cases, too few for {FOLDS} "
                            "folds")  # fmt: skip
        splits = generate_crossval_split(cases, seed=12345, n_splits=FOLDS)
        with renamed(path) as partial:
            partial.write_text(json.dumps(splits, indent=4, default=str), encoding="utf-8")
    splits = read_splits(path)
    if not 0 <= fold < len(splits):
        raise UserError(f"-f {fold}: {path} has folds 0 to {len(splits) - 1}")
    return set(splits[fold]["val"])


# ------------------------------------------------------------------------------------------------------ what is written


@contextmanager
def planning(preprocessed: Path) -> Iterator[None]:
    """The folder of a preprocessed dataset, made if need be, for one command at a time.

    Raises:
        UserError: another command is planning the dataset, or the folder cannot be made or written to.
    """
    with writing_to(preprocessed):
        preprocessed.mkdir(parents=True, exist_ok=True)
    check_writable(preprocessed)
    with locked(preprocessed / LOCK, str(preprocessed)):
        yield


def copy_labels(preprocessed: Path, studies: Mapping[str, tuple[list[str], str | None]], ending: str) -> None:
    """Copy the labels to where nnU-Net keeps them for validation, whole or not at all.

    nnU-Net copies those that are newer than its copy. So half a copy, made on a full disk, or one of a label file that
    an older one took the place of, would stay for ever.

    Args:
        studies: as `plans.store.list_raw_studies` gives them.

    Raises:
        WriteError: the disk is full, or the like.
    """
    folder = preprocessed / GROUND_TRUTH
    with writing_to(folder):
        folder.mkdir(exist_ok=True)
    for case, (_, label) in studies.items():
        copy = folder / f"{case}{ending}"
        if label is None or (copy.is_file() and _stamp(copy) == _stamp(Path(label))):
            continue
        with renamed(copy) as partial:
            shutil.copy2(label, partial)


def _stamp(path: Path) -> tuple[int, int]:
    """Bytes and time of change (ns) of a file, as copying keeps them."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new folder of preprocessed cases beside `folder`, which takes its place at the end; what was there stays until
    then, and what is not finished never has its name.

    Raises:
        UserError: `folder` is something else than preprocessed cases, which is not to be removed.
        WriteError: the disk is full, or the like.
    """
    check_replaceable(folder)
    partial, before = (folder.with_name(folder.name + ending) for ending in (".partial", ".before"))
    for left_over in (partial, before):
        check_replaceable(left_over)
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        with writing_to(folder):
            partial.mkdir(parents=True)
            yield partial
            if folder.exists():
                folder.rename(before)
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(before, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Raises UserError where a folder is a link, a file, or has other files than nnU-Net's of preprocessed cases."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: is a link or a file, where preprocessed cases are to be written; move it away")
    foreign = [path.name for path in folder.iterdir() if path.suffix not in STORED] if folder.is_dir() else []
    if foreign:
        raise UserError(f"{folder}: holds {len(foreign)} other things than preprocessed cases, which would be lost, "
                        "such as " + foreign[0] + "; move it away, or give another data_identifier")  # fmt: skip
