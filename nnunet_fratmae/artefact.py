"""The bridge between a pretraining and a network: encoders.safetensors with its contract (DESIGN contract 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.files import renamed
from nnunet_fratmae.base.weights import check_finite, read_safetensors
from nnunet_fratmae.networks.vit import dual_encoders
from plans.contract import CONTRACT_NAME, WEIGHTS_NAME, Contract, expected_shapes, locate_artefact, read_contract

NNUNET_NAME = "encoders_nnunet.pth"


def save_artefact(
    folder: Path, weights: Mapping[str, torch.Tensor], contract: Contract, more: Mapping[str, bytes] | None = None
) -> None:
    """Write encoders.safetensors, encoders.json and encoders_nnunet.pth (for stock `-pretrained_weights`).

    All are written under temporary names, and take their places when the last of them is whole; the contract at the
    end. So what was there before is never half of one pretraining and half of another.

    Args:
        weights: state of the encoders, keys CT.* and PET.*.
        more: the content of further files by name.

    Raises:
        WriteError: the disk is full, or the like.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    for_nnunet = {"network_weights": {f"encoders.{name}": value for name, value in weights.items()}}
    writers = {
        CONTRACT_NAME: contract.save,
        WEIGHTS_NAME: lambda path: path.write_bytes(save(weights)),  # not save_file, which hides it from colleagues
        NNUNET_NAME: lambda path: _save_pth(for_nnunet, path),
    }
    with ExitStack() as stack:  # left from the last file to the first
        for name, write in writers.items():
            write(stack.enter_context(renamed(folder / name)))
        for name, content in (more or {}).items():
            stack.enter_context(renamed(folder / name)).write_bytes(content)


def _save_pth(content: Any, path: Path) -> None:
    with path.open("wb") as file:  # of a file of Python's torch tells why it cannot be written
        torch.save(content, file)


def check_artefact(pretrained: str | Path) -> Contract:
    """The contract of an artefact whose weights file is whole and keeps it; reads only the file's header.

    Raises:
        UserError: absent, truncated, of another architecture, or weights that are not those of the contract.
    """
    contract = read_contract(pretrained)
    path, _ = locate_artefact(pretrained)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: cannot be read ({reason}); the file is damaged or cut off, copy it again") from error
    for name, shape in expected_shapes(contract).items():
        if shapes.get(name) != shape:
            raise UserError(f"{path}: {name} is {shapes.get(name, 'missing')} where its contract says {shape}; "
                            "weights and contract are of different pretrainings")  # fmt: skip
    return contract


def load_encoders(pretrained: str | Path, encoders: nn.ModuleDict) -> list[str]:
    """Load an artefact's weights into the encoders of a network, CT, PET or both; every weight must find its place.

    Returns:
        Lines for the log: what was loaded.

    Raises:
        UserError: as `check_artefact`, or weights that are missing, left over, of another shape or not finite.
    """
    contract = check_artefact(pretrained)
    path, _ = locate_artefact(pretrained)
    left_out = [modality for modality in contract.modalities if modality not in encoders]
    weights = {name: value for name, value in read_safetensors(path).items() if name.split(".")[0] not in left_out}
    problems = compare(encoders.state_dict(), weights)
    if problems:
        raise UserError(f"{path}: does not fit the network ({len(problems)} keys: {'; '.join(problems[:3])} ...)")
    check_finite(weights, path)
    encoders.load_state_dict(weights, strict=True)
    seen = ", ".join(f"{d['name']} ({d['cases']} cases)" for d in contract.datasets)
    return [
        f"pretrained encoders from {path}",
        f"  {contract.method}, {contract.preset}, token patch {list(contract.token_patch)}, {contract.epochs} epochs "
        f"on {seen}",
        *(
            f"  {modality} encoder: {sum(name.startswith(modality) for name in weights)} tensors loaded, 0 missing, "
            f"0 left over (cls_token, patch_embed, blocks.0 to blocks.{contract.depth - 1}, norm)"
            for modality in encoders
        ),
        *(
            f"  {modality} encoder: not loaded, this network sees no {modality} (fratmae.modalities)"
            for modality in left_out
        ),
    ]


def load_pretrained(pretrained: str | Path, patch_size: Sequence[int] | None = None) -> nn.ModuleDict:
    """The encoders "CT" and "PET" of an artefact, in evaluation mode, for any task.

    Each takes volumes (B, 1, H, W, D) in pretraining units (`to_units` of nnunet_fratmae/base/units.py), axes as the
    contract says, and gives tokens (B, 1 + N, dim) with the CLS token first; `feature_maps(volume, layers)` gives maps
    (B, dim, h, w, d).

    Args:
        patch_size: (H, W, D) voxels, a multiple of the token patch; None: as in pretraining.

    Raises:
        UserError: as `load_encoders`, or a patch that is no multiple of the token patch.
    """
    contract = check_artefact(pretrained)
    size = contract.patch if patch_size is None else patch_size
    try:
        encoders = dual_encoders(size, contract.token_patch, **contract.encoder)
    except ValueError as error:
        raise UserError(str(error)) from error
    load_encoders(pretrained, encoders)
    return encoders.eval()


def compare(wanted: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> list[str]:
    """One line for every key that is missing, left over, of another shape, or of another kind of numbers: torch would
    load complex and whole ones as well."""
    problems = [f"missing {name}" for name in wanted if name not in given]
    problems += [f"left over {name}" for name in given if name not in wanted]
    problems += [
        f"{name} is {tuple(given[name].shape)}, not {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in given and given[name].shape != value.shape
    ]
    problems += [
        f"{name} is of {given[name].dtype}, not {value.dtype}"
        for name, value in wanted.items()
        if name in given and given[name].is_floating_point() != value.is_floating_point()
    ]
    return problems
