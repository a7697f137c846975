"""What a preprocessed dataset holds besides its plans: nnU-Net's cross-validation folds and the stored cases.

Folders of stored cases are written aside and take their place when they are whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunet_fratmae.base.command import UserError, nnunet_folder
from nnunet_fratmae.base.files import WriteError, renamed, writing_to

PLANS_NAME = "FratMAEPlans"
LOCK = ".planning.lock"
STORED = (".b2nd", ".pkl", ".npz", ".npy")  # files of nnU-Net's preprocessed cases
LEAST_FREE = 2**20  # bytes; a disk with less is full for a preprocessed case
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
        raise UserError(f"{path}: is no JSON ({error}); mend it there, or plan again without it") from None


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


def check_split_cases(path: Path, cases: Collection[str], what: str) -> None:
    """See that a splits_final.json, if it is there, names no other cases than `cases`.

    Args:
        what: what these cases are, for the message: "studies of ...".

    Raises:
        UserError: it does.
    """
    if not path.is_file():
        return
    named = {case for fold in read_splits(path) for side in ("train", "val") for case in fold[side]}
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
        if len(cases) < 5:
            raise UserError(f"-f {fold}: {preprocessed.name} has {len(cases)} labelled cases, too few for 5 folds")
        splits = generate_crossval_split(cases, seed=12345, n_splits=5)
        with renamed(path) as partial:
            partial.write_text(json.dumps(splits, indent=4, default=str))
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
        lock = os.open(preprocessed / LOCK, os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{preprocessed}: another fratmae_plan_and_preprocess works there; wait until it has "
                            "ended") from None  # fmt: skip
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(lock)


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
    with writing_to(folder):
        partial.mkdir(parents=True)
        try:
            yield partial
        except BaseException as error:
            reason = why_unwritable(partial) if isinstance(error, RuntimeError) else None  # as blosc2 says it
            shutil.rmtree(partial, ignore_errors=True)
            if reason is None:
                raise
            raise WriteError(f"{folder} cannot be written to ({reason}); what was there before is whole: make room "
                             "or permit it, then say the same again") from None  # fmt: skip
        if folder.exists():
            folder.rename(before)
        partial.rename(folder)
        shutil.rmtree(before, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Raises UserError where a folder is a link, a file, or has other files than nnU-Net's of preprocessed cases."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: is a link or a file, where preprocessed cases are to be written; move it away")
    foreign = [path.name for path in folder.iterdir() if path.suffix not in STORED] if folder.is_dir() else []
    if foreign:
        raise UserError(f"{folder}: holds {len(foreign)} other things than preprocessed cases, which would be lost, "
                        "such as " + foreign[0] + "; move it away, or give another data_identifier")  # fmt: skip


def why_unwritable(folder: Path) -> str | None:
    """Why nothing can be written to a folder, or None: it can."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        return "it is read-only"
    return "no space left" if shutil.disk_usage(there).free < LEAST_FREE else None
