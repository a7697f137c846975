"""The training loop of stage 1: AdamW with warm-up and cosine, held-out curve, checkpoints, export."""

from __future__ import annotations

import json
import math
import os
import pickle
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from nnunet_fratmae.artefact import save_artefact
from nnUNet_raw_conversion.command import UserError
from plans.contract import Contract
from plans.preprocessed import PLANS_NAME
from plans.settings import Settings
from plans.units import MODALITIES
from pretraining.data import Case, EpochBatches, WholeBodyPatches
from pretraining.fratmae import FratMAE, patchify, random_masking, reconstruction_loss, unpatchify
from pretraining.report import plot_progress, plot_reconstruction

LATEST = "checkpoint_latest.pth"
BETAS = (0.9, 0.95)  # MAE of He et al., appendix A
CLIP = 1.0  # of the gradient's norm
STEPS_OF_AN_EPOCH = 50  # at least, where patches_per_case is left open; 1,292 cases in batches of 24 are 54


def build_model(settings: Settings) -> FratMAE:
    """The network of the settings, with reproducible initial weights."""
    torch.manual_seed(settings.pretrain.seed)
    sizes = settings.sizes
    decoder = {"dim": sizes.decoder_dim, "depth": sizes.decoder_depth, "num_heads": sizes.decoder_heads}
    decoder["block"] = settings.pretrain.decoder_block
    return FratMAE(settings.wholebody.patch, settings.token_patch, sizes.encoder, decoder)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels; none for biases, norms, the CLS token and the mask tokens."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (free if parameter.ndim < 2 or name.endswith("_token") else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def learning_rate(step: int, steps: int, warmup: int, highest: float) -> float:
    """Linear warm-up over `warmup` steps, then half a cosine to zero at `steps` (paper section 2.4)."""
    if step < warmup:
        return highest * (step + 1) / warmup
    return highest * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def hold_out(cases: list[Case], share: float, seed: int) -> tuple[list[Case], list[Case]]:
    """Training and held-out cases; at least one is held out where a share is asked for and there are two cases."""
    count = min(len(cases) - 1, max(1, round(share * len(cases)))) if share > 0 else 0
    order = np.random.default_rng(seed).permutation(len(cases))
    held = set(order[:count].tolist())
    return [c for i, c in enumerate(cases) if i not in held], [c for i, c in enumerate(cases) if i in held]


def draw_mask(shape: torch.Size, tokens: int, ratio: float, key: tuple[int, ...]) -> tuple[str, Tensor, Tensor]:
    """The masked modality and the tokens kept and masked of one step; the same for the same key."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    generator = torch.Generator().manual_seed(seed)
    modality = MODALITIES[int(torch.randint(2, (1,), generator=generator))]
    return modality, *random_masking(shape[0], tokens, ratio, generator)


def choose_patches(settings: Settings, cases: int) -> Settings:
    """Settings with the patches an epoch draws of each of so many training cases, where they were left open."""
    options = settings.pretrain
    if options.patches_per_case is not None:
        return settings
    patches = max(1, math.ceil(STEPS_OF_AN_EPOCH * options.batch_size / cases))
    return replace(settings, pretrain=replace(options, patches_per_case=patches))


def pretrain(
    folder: Path,
    settings: Settings,
    cases: list[Case],
    licences: dict[str, Any],
    fold: int | None,
    device: str,
    resume: bool,
) -> None:
    """Train, with a checkpoint, a curve and a picture after every epoch, and export the encoders at the end.

    Raises:
        UserError: nothing to resume, a run that is there already, other settings or cases than those of the run, a
            loss that is not finite.
    """
    software = {package: version(package) for package in ("torch", "timm", "nnunetv2", "nnunet-fratmae")}
    train_cases, held_out = hold_out(cases, settings.pretrain.held_out, settings.pretrain.seed)
    settings = choose_patches(settings, len(train_cases))
    options = settings.pretrain
    is_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    fabric = Fabric(accelerator=device, devices=1, precision="bf16-mixed" if is_bf16 else "32-true")
    fabric.launch()
    model = build_model(settings)
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=BETAS)
    identity = _identity(settings, train_cases, held_out)
    checkpoint = _load_checkpoint(folder, identity, resume)
    history: list[dict[str, Any]] = []
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        history = checkpoint["history"]
    model, optimizer = fabric.setup(model, optimizer)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    folder.mkdir(parents=True, exist_ok=True)
    patches = WholeBodyPatches(
        train_cases, settings.wholebody.patch, settings.wholebody.k, options.patches_per_case, options.seed, True
    )
    batches = EpochBatches(len(patches), min(options.batch_size, len(patches)), options.seed)
    loader = fabric.setup_dataloaders(
        DataLoader(patches, batch_sampler=batches, num_workers=options.workers, persistent_workers=options.workers > 0),
        use_distributed_sampler=False,
    )
    _introduce(folder, settings, model, train_cases, held_out, len(batches))
    with tqdm(total=options.epochs * len(batches), initial=len(history) * len(batches), desc="Pretraining") as bar:
        for epoch in range(len(history), options.epochs):
            batches.epoch = epoch
            row = _train_epoch(fabric, model, optimizer, loader, settings, epoch, bar)
            row |= evaluate(fabric, model, held_out, settings, folder / "reconstruction.png", epoch)
            history.append(row)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
            _save(state | {"identity": identity}, folder / LATEST)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in history))
            plot_progress(history, folder / "progress.png")
    _export(folder, settings, model, cases, licences, fold, software)


def _train_epoch(
    fabric: Fabric, model: nn.Module, optimizer: Any, loader: Any, settings: Settings, epoch: int, bar: tqdm
) -> dict[str, Any]:
    options, steps = settings.pretrain, len(loader)
    model.train()
    losses: dict[str, list[float]] = {modality: [] for modality in MODALITIES}
    start = time.perf_counter()
    for step, image in enumerate(loader):
        tokens = math.prod(model.grid)
        modality, keep, masked = draw_mask(image.shape, tokens, options.mask_ratio, (options.seed, epoch, step))
        keep, masked = fabric.to_device(keep), fabric.to_device(masked)
        done = epoch * steps + step
        rate = learning_rate(done, options.epochs * steps, round(options.warmup_epochs * steps), options.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        prediction = model(image, modality, keep)
        volume = image[:, MODALITIES.index(modality)][:, None]
        loss = reconstruction_loss(prediction, volume, masked, model.token_patch)
        if not torch.isfinite(loss):
            raise UserError(f"the loss is {loss.item()} in epoch {epoch}, step {step}; the last good weights are in "
                            f"{LATEST}; look for broken images or lower pretrain.learning_rate")  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=CLIP, error_if_nonfinite=False)
        optimizer.step()
        losses[modality].append(loss.item())
        bar.update()
        bar.set_postfix_str(f"epoch {epoch} {modality} {losses[modality][-1]:.3f}")
    seconds = time.perf_counter() - start
    means = {f"train_{m}": float(np.mean(values)) if values else None for m, values in losses.items()}
    speed = steps * loader.batch_sampler.batch_size / seconds
    return {"epoch": epoch, **means, "learning_rate": rate, "seconds": seconds, "patches_per_second": speed}


@torch.no_grad()
def evaluate(
    fabric: Fabric, model: nn.Module, cases: list[Case], settings: Settings, picture: Path, epoch: int
) -> dict[str, float]:
    """Masked MSE of both modalities on the held-out cases, with the same patch and mask of each case every time."""
    if not cases:
        return {}
    model.eval()
    patches = WholeBodyPatches(cases, settings.wholebody.patch, settings.wholebody.k, 1, 0, augment=False)
    errors: dict[str, list[float]] = {modality: [] for modality in MODALITIES}
    rows = []
    for index in range(len(cases)):
        image = fabric.to_device(patches[0, index][None])
        for number, modality in enumerate(MODALITIES):
            generator = torch.Generator().manual_seed(2 * index + number)
            keep, masked = random_masking(1, math.prod(model.grid), settings.pretrain.mask_ratio, generator)
            keep, masked = fabric.to_device(keep), fabric.to_device(masked)
            prediction = model(image, modality, keep)
            volume = image[:, number : number + 1]
            errors[modality].append(reconstruction_loss(prediction, volume, masked, model.token_patch).item())
            if index == 0:
                rows.append(_picture_row(modality, volume, prediction, masked, model))
    plot_reconstruction(rows, picture, f"held-out case, epoch {epoch}, half of the tokens of one modality masked")
    return {f"held_out_{modality}": float(np.mean(values)) for modality, values in errors.items()}


def _picture_row(modality: str, volume: Tensor, prediction: Tensor, masked: Tensor, model: nn.Module) -> dict[str, Any]:
    is_masked = torch.zeros_like(patchify(volume, model.token_patch))
    is_masked.scatter_(1, masked.unsqueeze(-1).expand(-1, -1, is_masked.shape[-1]), 1.0)
    arrays = {"truth": volume, "masked": is_masked, "prediction": prediction.float()}
    for name in ("masked", "prediction"):
        arrays[name] = unpatchify(arrays[name], model.grid, model.token_patch)
    arrays = {name: value[0, 0].cpu().numpy() for name, value in arrays.items()}
    return {"modality": modality, **arrays, "masked": arrays["masked"] > 0}


def _introduce(
    folder: Path, settings: Settings, model: nn.Module, train: list[Case], held_out: list[Case], steps: int
) -> None:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    whole = settings.wholebody
    print(f"FratMAE {settings.preset}: {millions:.1f} M parameters, patch {list(whole.patch)} of every {whole.k}. "
          f"coronal slice, {math.prod(model.grid)} tokens of {list(settings.token_patch)}")  # fmt: skip
    print(f"{len(train)} cases to train, {len(held_out)} held out; {settings.pretrain.epochs} epochs of {steps} steps")
    print(f"output: {folder}")


def _identity(settings: Settings, train: list[Case], held_out: list[Case]) -> dict[str, Any]:
    """What makes a run this run: all that shapes its result. The number of loading processes and the settings of
    fine-tuning may change between a run and its resumption."""
    block = settings.to_json()
    block["pretrain"].pop("workers")
    kept = {key: block[key] for key in ("preset", "token_patch", "wholebody", "pretrain")}
    return {"settings": kept, "train": [c.name for c in train], "held_out": [c.name for c in held_out]}


def _load_checkpoint(folder: Path, identity: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    path = folder / LATEST
    if not resume:
        if path.is_file():
            raise UserError(f"{folder}: there is a pretraining already; go on with --c or give another folder with -o")
        return None
    if not path.is_file():
        raise UserError(f"--c: no {LATEST} in {folder}; start without --c")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); the file is damaged or cut off") from error
    if checkpoint["identity"]["settings"] != identity["settings"]:
        raise UserError(f"--c: the run in {folder} was begun with other settings; give the same -preset and --set")
    if checkpoint["identity"] != identity:
        raise UserError(f"--c: the run in {folder} was begun with other cases; give the same -d and -f")
    return checkpoint


def _save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint under a temporary name, then rename it, so that there is always a whole one."""
    partial = path.with_name(f".partial_{path.name}")
    torch.save(state, partial)
    os.replace(partial, path)


def _export(
    folder: Path,
    settings: Settings,
    model: nn.Module,
    cases: list[Case],
    licences: dict[str, Any],
    fold: int | None,
    software: dict[str, str],
) -> None:
    names = [case.name.split("/")[0] for case in cases]
    whole = settings.wholebody
    contract = Contract(
        preset=settings.preset, **settings.sizes.encoder, token_patch=settings.token_patch,
        grid=whole.grid, patch=whole.patch, k=whole.k,
        method="fratmae_notext", text_tower=None, epochs=settings.pretrain.epochs,
        datasets=[{"name": n, "cases": names.count(n), "licence": licence} for n, licence in licences.items()],
        left_out_fold=fold, software={"python": platform.python_version()} | software,
    )  # fmt: skip
    save_artefact(folder, model.encoders, contract)
    print(f"encoders and their contract: {folder}")
    print(f"next: FRATMAE_PRETRAINED={folder} nnUNetv2_train ID 3d_fullres 0 -tr FratMAETrainer [-p {PLANS_NAME}]")
