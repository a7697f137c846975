"""How every command of this project behaves: one clear line and exit code 1 on a user's error, nnU-Net's folders."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend: the message names the file or field, what is wrong and what to do."""


def run_command(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], None]) -> None:
    """Parse the command line and run `main`; a `UserError` ends in its message on stderr and exit code 1.

    With `--debug` the traceback is shown as well. Ctrl-C ends with exit code 130, as in a shell.
    """
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    try:
        main(args)
    except UserError as error:
        if args.debug:
            raise
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        if args.debug:
            raise
        print(f"{parser.prog}: stopped", file=sys.stderr)
        sys.exit(130)


def nnunet_folder(variable: str) -> Path:
    """The folder that one of nnU-Net's environment variables (nnUNet_raw, nnUNet_preprocessed, nnUNet_results) names.

    Raises:
        UserError: the variable is not set.
    """
    value = os.environ.get(variable)
    if not value:
        raise UserError(f"the environment variable {variable} is not set; say `export {variable}=/path/to/a/folder`")
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
        raise UserError(f"-d {dataset_id}: {what} with this ID in {variable}={root} (there: {known})")
    return found[0]
