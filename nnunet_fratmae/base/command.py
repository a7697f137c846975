"""How every command of this project behaves: one clear line and exit code 1 on a user's error, nnU-Net's folders."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("nnUNet_raw_conversion", "nnunet_fratmae", "plans", "pretraining")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """A mistake that the user can mend: the message names the file or field, what is wrong and what to do.

    `code` is a short word for machines that sort refusals (conversion_report.csv, docs/refusals.md), or "".
    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


def run_command(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], None]) -> None:
    """Parse the command line and run `main`; a `UserError` ends in its message on stderr and exit code 1.

    A disk that is full, read-only or gone is one line with the file and the reason. Any other error is one line with
    its type and place in our code, without its text, which may name a patient's file. With `--debug` the traceback is
    shown instead. Ctrl-C ends with exit code 130, as in a shell.
    """
    for stream in (sys.stdout, sys.stderr):  # paths may be no UTF-8, and a terminal may know ASCII alone
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    try:
        main(args)
    except UserError as error:
        if args.debug:
            raise
        sys.exit(f"{parser.prog}: error: {cause(error)}")
    except KeyboardInterrupt:
        if args.debug:
            raise
        print(f"{parser.prog}: stopped", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if args.debug:
            raise
        sys.exit(f"{parser.prog}: error: {_of_the_disk(error, args)}")
    except Exception as error:
        if args.debug:
            raise
        what = f"unexpected {type(error).__name__} in {_place(error)}"
        sys.exit(f"{parser.prog}: error: {what}; run again with --debug and report it")


def end_stock_commands_in_one_line() -> None:
    """Let nnU-Net's own commands, which know nothing of it, end in one line with a `UserError`, as ours do.

    Everywhere else, as in a notebook, it stays an exception.
    """
    program, before = Path(sys.argv[0] if sys.argv else "").name, sys.excepthook
    # Of a process that torch.multiprocessing started, for -num_gpus, the traceback comes as a text
    elsewhere = re.compile(rf"^{re.escape(UserError.__module__)}\.UserError: (.*)", re.MULTILINE | re.DOTALL)

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        there = elsewhere.search(str(error)) if kind.__name__ == "ProcessRaisedException" else None
        if issubclass(kind, UserError) or there:
            text = there[1].strip() if there else cause(error)
            print(f"\n{program}: error: {text}", file=sys.stderr)  # on a line of its own, beside a progress bar
        else:
            before(kind, error, trace)

    if program.startswith("nnUNetv2_"):
        sys.excepthook = hook


def _of_the_disk(error: OSError, args: argparse.Namespace) -> str:
    """File and reason of an error of the operating system; no file below -i is named, for those may be patients'."""
    reason = error.strerror or type(error).__name__
    if error.filename is None:
        where = "a file"
    else:
        path = Path(os.fsdecode(error.filename)).absolute()
        given = getattr(args, "i", None) or []
        inputs = [Path(one).absolute() for one in (given if isinstance(given, list) else [given])]
        where = "a file below -i" if any(one == path or one in path.parents for one in inputs) else str(path)
    if error.errno in FULL:
        return f"{where} cannot be written ({reason}); what was there before is whole: make room and say the same again"
    if error.errno is None:
        return f"unexpected {type(error).__name__} in {_place(error)}; run again with --debug and report it"
    return f"{where} cannot be read or written ({reason}); permit it, or give another place, then say the same again"


def _place(error: Exception) -> str:
    """The last line of our own code that an error went through, as plans/extension.py:120."""
    root = Path(__file__).parents[2]
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [(file.relative_to(root), line) for file, line in frames if root in file.parents]
    ours = [f"{file.as_posix()}:{line}" for file, line in ours if file.parts[0] in PACKAGES]
    return ours[-1]  # this file at least


def nnunet_folder(variable: str) -> Path:
    """The folder that one of nnU-Net's environment variables (nnUNet_raw, nnUNet_preprocessed, nnUNet_results) names.

    Raises:
        UserError: the variable is not set, or its folder's name is no text.
    """
    value = os.environ.get(variable)
    if not value:
        raise UserError(f"the environment variable {variable} is not set; say `export {variable}=/path/to/a/folder`")
    if any("\ud800" <= character <= "\udfff" for character in value):  # nnU-Net's readers die of such names
        raise UserError(f"{variable}: this folder's name is no UTF-8; rename it")
    return Path(value)


def find_dataset(variable: str, dataset_id: int) -> Path:
    """The folder DatasetXXX_Name of `dataset_id` below the folder that `variable` names.

    Raises:
        UserError: the variable is not set, or there is no dataset or more than one with this ID.
    """
    root = nnunet_folder(variable)
    found = sorted(root.glob(f"Dataset{dataset_id:03d}_*"))
    if len(found) != 1:
        known = ", ".join(sorted(p.name for p in root.glob("Dataset*_*"))) or "none"
        what = "no dataset" if not found else f"{len(found)} datasets"
        unplanned = variable == "nnUNet_preprocessed" and not found
        raise UserError(f"-d {dataset_id}: {what} with this ID in {variable}={root} (there: {known})"
                        + unplanned * "; plan it first: fratmae_plan_and_preprocess")  # fmt: skip
    return found[0]


def dataset_number(name: str) -> int:
    """The ID of a dataset by its name, of any number of digits: nnU-Net's own conversion looks at three only.

    Raises:
        UserError: `name` is no name of a dataset.
    """
    found = re.match(r"Dataset(\d{3,})_", name)
    if found is None:
        raise UserError(f"{name}: is no nnU-Net dataset; such a folder is called Dataset011_Name")
    return int(found[1])


def check_device(device: str) -> None:
    """Raises UserError where `-device` is "cuda" or "mps" (a GPU of Apple) and torch finds none."""
    import torch  # it takes seconds, and most commands do without

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("-device cuda: no GPU can be used here; say -device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("-device mps: no GPU of Apple can be used here; say -device cpu")


def cause(error: BaseException) -> str:
    """What an error says; of one that torch's DataLoader brings from another process, what it said there, on one line
    (torch puts the traceback around it)."""
    text = str(error)
    if not text.startswith("Caught "):
        return text
    return " ".join(re.split(r"(?m)^(?:[\w.]+\.)?(?:UserError|\w+Error): ", text)[-1].split())
