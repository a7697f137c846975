"""fratmae_export: the encoders of a checkpoint of fratmae_pretrain, with contract, model card and nnU-Net's format."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_fratmae.base.command import UserError, run_command
from nnunet_fratmae.base.files import writing_to
from pretraining.checkpoint import LATEST

ALIGN_NAME, CARD_NAME = "context_align.safetensors", "model_card.md"


def export(state: Mapping[str, Any], folder: Path) -> None:
    """Write the artefact of a checkpoint: encoders in two formats, their contract, a model card and, where there was
    text, the projections (and the text tower, if it was trained) that `fratmae_retrieve` needs."""
    from safetensors.torch import save

    from nnunet_fratmae.artefact import save_artefact
    from plans.contract import contract_of
    from pretraining.methods import CLASSES

    contract = contract_of(state["contract"] | {"epochs": state["epoch"]})
    encoders, text = CLASSES[contract.method].exported(state["model"])
    files = {CARD_NAME: model_card(contract, state["history"]).encode()}
    if text:
        files[ALIGN_NAME] = save({name: value.cpu().contiguous() for name, value in text.items()})
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    save_artefact(folder, encoders, contract, files)


def model_card(contract: Any, history: list[dict[str, Any]]) -> str:
    """What the weights are, in Markdown: for whom, from what, how good on held-out cases, how to load them."""
    from nnunet_fratmae.networks.unetr import tap_layers  # imports torch

    seen = "\n".join(f"- {d['name']}: {d['cases']} cases, licence: {d['licence'] or 'not stated'}"
                     for d in contract.datasets)  # fmt: skip
    row = history[-1] if history else {}
    keys = ("held_out_CT", "held_out_PET", "psnr_CT", "psnr_PET", "gain_CT", "gain_PET", "retrieval_top1",
            "retrieval_chance1")  # fmt: skip
    measured = "\n".join(f"| {key} | {row[key]:.4f} |" for key in keys if row.get(key) is not None) or "| none | |"
    fold = contract.left_out_fold
    left_out = "" if fold is None else f"Validation cases of fold {fold} were not seen."
    return f"""# PET/CT encoders, {contract.method}, {contract.preset}

Two Vision Transformers (CT, PET; width {contract.embed_dim}, depth {contract.depth}), pretrained for {contract.epochs}
epochs with nnunet-fratmae. For research on whole-body PET/CT; not a medical device.

- Input: volumes (B, 1, H, W, D), {contract.axes}; CT in HU and PET in SUVbw, brought to pretraining units by
  `nnunet_fratmae.base.units.to_units`.
- Patch {list(contract.patch)} voxels of a study resized to {list(contract.grid)}, every {contract.k}. {contract.stack}
  slice; tokens of {list(contract.token_patch)} voxels. `load_pretrained(..., patch_size=(H, W, D))` for any other patch
  of whole tokens.
- Text tower: {contract.text_tower or "none"}

## Data

{seen}
{left_out}

## Held-out cases, last epoch

Masked MSE in pretraining units, PSNR in dB, cross-modal gain (0: the partner is not used), retrieval of the own prompt.

| | |
|---|---|
{measured}

## Use

```python
from nnunet_fratmae.artefact import load_pretrained
from nnunet_fratmae.base.units import to_units
encoders = load_pretrained("this_folder")                       # "CT" and "PET", alone or both
tokens = encoders["PET"](to_units("PET", suv))                  # (B, 1 + N, {contract.embed_dim}), CLS first
maps = encoders["PET"].feature_maps(to_units("PET", suv), {tap_layers(contract.depth)})
```

In nnU-Net: `FRATMAE_PRETRAINED=this_folder nnUNetv2_train ID 3d_fullres 0 -tr FratMAETrainer`.

Licence: {contract.licence}
"""


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(prog="fratmae_export", description=__doc__)
    parser.add_argument("-m", type=Path, required=True, metavar="FOLDER", help="output folder of fratmae_pretrain")
    parser.add_argument("-chk", default=LATEST, metavar="FILE", help=f"which checkpoint (default: {LATEST})")
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="where to write the artefact")
    run_command(parser, _run)


def _run(args: argparse.Namespace) -> None:
    from pretraining.checkpoint import load_run

    path = args.m / args.chk
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in args.m.glob("checkpoint_*.pth"))) or "none"
        raise UserError(f"-chk {args.chk}: not in {args.m}; there are {there}")
    export(load_run(path), args.o)
    print(f"encoders, contract and model card: {args.o}")
