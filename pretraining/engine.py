"""The training loop of stage 1: any number of GPUs, checkpoints, held-out curve, export (paper section 2.4)."""

from __future__ import annotations

import math
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import blosc2
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from nnunet_fratmae.artefact import compare
from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.locks import alone_in
from nnunet_fratmae.base.units import MODALITIES
from plans.contract import Contract
from plans.settings import Settings
from plans.views import Batches, Views
from pretraining.checkpoint import BEST, LATEST, PREVIOUS, check_run, load_latest, save
from pretraining.data import Case, DiskPatches, MemoryPatches, case_weights
from pretraining.evaluation import Share, evaluate, hold_out_patches
from pretraining.export import export
from pretraining.method import Method
from pretraining.methods import CLASSES
from pretraining.monitor import Monitor
from pretraining.recipe import (
    BETAS,
    ONE_GPU,
    choose_micro_batch,
    choose_patches,
    hold_out,
    learning_rate,
    parameter_groups,
    pass_sizes,
)


class Pretraining:
    """One run: `run` trains, with a checkpoint after every epoch, and exports the encoders at the end."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        cases: list[Case],
        licences: dict[str, Any],
        fold: int | None,
        fabric: Fabric,
        resume: bool,
    ) -> None:
        """Raises UserError: nothing to resume, a run that is there already, other settings or cases than the run's."""
        self.folder, self.cases, self.licences, self.fold, self.fabric = folder, cases, licences, fold, fabric
        # Now, not at the end: a package may be updated during the weeks of a run
        self.software = {package: version(package) for package in ("torch", "timm", "nnunetv2", "nnunet-fratmae")}
        self.train, held_out = hold_out(cases, settings.pretrain.held_out, settings.pretrain.seed)
        self.settings = settings = choose_patches(settings, len(self.train))
        self.options = options = settings.pretrain
        self.batch_size = min(options.batch_size, len(self.train) * options.patches_per_case)
        self.micro = choose_micro_batch(options, self.batch_size, fabric.world_size)
        passes = pass_sizes(options, self.micro, fabric.world_size)
        self.identity = _identity(settings, self.train, held_out, passes)
        checkpoint = self._checkpoint(resume)
        method = CLASSES[options.method].build(settings, cases, fabric)
        optimizer = torch.optim.AdamW(
            parameter_groups(method, options.weight_decay), lr=options.learning_rate, betas=BETAS
        )
        self.history: list[dict[str, Any]] = []
        self.epoch, self.step, self.sums = 0, 0, _empty_sums(method)
        if checkpoint:
            if problems := compare(method.state_dict(), checkpoint["model"]):
                raise UserError(f"--c: the checkpoint in {folder} does not fit this network ({problems[0][:200]})")
            method.load_state_dict(checkpoint["model"])
            self.history, self.epoch = checkpoint["history"], checkpoint["epoch"]
            self.step, self.sums = checkpoint["step"], checkpoint["sums"]
        self.network, self.optimizer = fabric.setup(method, optimizer)
        if checkpoint:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.held_out = hold_out_patches(held_out, settings, method, fabric)
        self._prepare_loader()
        self.signal: int | None = None

    @property
    def method(self) -> Method:
        return self.network.module

    def run(self) -> None:
        """Raises UserError: a loss that is not finite, a checkpoint that cannot be written, or another process that
        writes to the folder."""
        with alone_in(self.folder) if self.fabric.is_global_zero else nullcontext():
            self._run()

    def _run(self) -> None:
        steps = self.batches.steps
        done = self.epoch * steps + self.step
        monitor = None
        if self.fabric.is_global_zero:
            monitor = Monitor(self.folder, self.settings, self.method.flops(), self.fabric, is_resumed=done > 0)
            monitor.introduce(self.method, self.train, self.held_out, steps)
        before = self._listen()
        is_quiet = not self.fabric.is_global_zero
        try:
            with tqdm(total=self.options.epochs * steps, initial=done, desc="Pretraining", disable=is_quiet) as bar:
                while self.epoch < self.options.epochs:
                    row = self._train_epoch(bar) | self._judge()
                    if monitor:
                        self.history.append(row)
                        monitor.log(self.history, self.held_out)
                        self._picture(monitor)
                    self.epoch, self.step, self.sums = self.epoch + 1, 0, _empty_sums(self.method)
                    self._keep()
        finally:
            self._end_loader()
            for number, handler in before.items():
                signal.signal(number, handler)
            if monitor:
                monitor.close(is_done=self.epoch == self.options.epochs)
        if monitor:
            export(self._state(), self.folder)
            print(f"encoders, contract and model card: {self.folder}")
            print(f"next: FRATMAE_PRETRAINED={self.folder} nnUNetv2_train ID 3d_fullres 0 -tr FratMAETrainer "
                  "[-p FratMAEPlans]")  # fmt: skip

    def _picture(self, monitor: Monitor) -> None:
        is_last = self.epoch + 1 == self.options.epochs
        if self.held_out is not None and (is_last or self.epoch % self.options.picture_every == 0):
            with self.fabric.autocast(), torch.no_grad():
                monitor.picture(self.method, self.held_out, self.epoch)

    # ------------------------------------------------------------------------------------------------------- an epoch

    def _train_epoch(self, bar: tqdm) -> dict[str, Any]:
        self.network.train()
        self.batches.epoch, self.batches.first_step = self.epoch, self.step
        start, waited, first_step = time.perf_counter(), 0.0, self.step
        passes = iter(self.loader)
        while self.step < self.batches.steps:
            waited += self._train_step(passes)
            self.step += 1
            bar.update()
            bar.set_postfix_str(f"epoch {self.epoch} " + " ".join(
                f"{name} {value:.3f}" for name, value in self.last.items()))  # fmt: skip
            self._leave_if_asked()
        seconds, steps = time.perf_counter() - start, self.step - first_step  # none if it was left while judging
        means = {name if name == "gradient_norm" else f"train_{name}": total / count if count else None
                 for name, (total, count) in self.sums.items()}  # fmt: skip
        return {
            "epoch": self.epoch, **means, "learning_rate": self.optimizer.param_groups[0]["lr"], "seconds": seconds,
            "patches_per_second": steps * self.batches.batch_size / seconds if steps else None,
            "data_wait": waited / seconds if steps else None,
        } | self.method.measures()  # fmt: skip

    def _train_step(self, passes: Iterator) -> float:
        """One optimiser step; the seconds spent waiting for data."""
        options, steps = self.options, self.batches.steps
        key = (options.seed, self.epoch, self.step)
        mask = self.method.draw(self.batches.batch_size, key)  # of the whole batch, on any number of GPUs
        rate = learning_rate(self.epoch * steps + self.step, options.epochs * steps,
                             round(options.warmup_epochs * steps), options.learning_rate)  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        waited, parts, suspects = 0.0, {}, []
        for number, place in enumerate(self.batches.places):
            start = time.perf_counter()
            image, cases = next(passes)
            waited += time.perf_counter() - start
            is_last = number + 1 == len(self.batches.places)
            with self.fabric.no_backward_sync(self.network, enabled=not is_last):
                loss, losses = self.network(*self._inputs(image, cases, mask[place]))
                self.fabric.backward(loss / len(self.batches.places))
            cases = self.fabric.to_device(cases)
            suspects.append(torch.where(loss.isfinite(), -1 - cases, cases))
            for name, value in losses.items():
                parts[name] = parts.get(name, 0.0) + value.detach() / len(self.batches.places)
        norm = float(self.fabric.clip_gradients(
            self.network, self.optimizer, max_norm=options.clip, error_if_nonfinite=False
        ))  # fmt: skip
        self.last = {name: self.fabric.all_reduce(value).item() for name, value in parts.items()}
        self._check(norm, torch.cat(suspects))
        self.optimizer.step()
        for name, value in (*self.last.items(), ("gradient_norm", norm)):
            if name == "text" and value == 0:  # no two prompts met in this step (ContextAlign)
                continue
            total, count = self.sums[name]
            self.sums[name] = (total + value, count + 1)
        return waited

    def _inputs(self, image: Tensor, cases: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, list[str | None]]:
        """Arguments of the method for one pass."""
        if self.options.shuffle_partner:
            image[:, 0] = image[:, 0].roll(1, dims=0)  # always the CT, so that the PET keeps its prompt
        prompts = [self.train[i].prompt for i in cases.tolist()]
        return self.fabric.to_device(image), self.fabric.to_device(mask), prompts

    def _check(self, norm: float, suspects: Tensor) -> None:
        """Stop before a step that would spoil the weights, on all processes together.

        Args:
            suspects: the numbers of the cases where the loss of their pass is not finite, -1 minus them elsewhere.
        """
        broken = [value for value in self.last.values() if not math.isfinite(value)]
        if broken or not math.isfinite(norm):
            numbers = self.fabric.all_gather(suspects).flatten().tolist()
            found = {n for n in numbers if n >= 0} or {-1 - n for n in numbers}
            names = ", ".join(sorted(self.train[n].name for n in found))
            what = f"loss is {broken[0]}" if broken else f"gradient's norm is {norm}"
            is_there = (self.folder / LATEST).is_file()
            saved = f"the last good weights are in {LATEST}" if is_there else "there is no checkpoint yet"
            raise UserError(f"the {what} in epoch {self.epoch}, step {self.step}, with the cases {names}; {saved}; "
                            "look for broken images and go on with --c, or begin anew (-o) with a lower "
                            "pretrain.learning_rate")  # fmt: skip

    def _judge(self) -> dict[str, float | None]:
        """The held-out curve, by all processes together."""
        if self.held_out is None:
            return {}
        self.network.eval()
        with self.fabric.autocast():
            return evaluate(self.method, self.held_out, Share(self.micro, self.fabric, self._leave_if_asked))

    # ---------------------------------------------------------------------------------------------------- surroundings

    def _prepare_loader(self) -> None:
        options, fabric = self.options, self.fabric
        samples = len(self.train) * options.patches_per_case
        weights = case_weights(self.train, list(self.licences), options.dataset_weights)
        views = Views(weights, len(self.train), self.settings.wholebody, options)
        self.batches = Batches(
            samples, self.batch_size, self.micro, fabric.global_rank, fabric.world_size, options.seed
        )
        if options.store == "memory":
            self.loader: Any = MemoryPatches(self.train, views, self.batches, fabric.device)
            return
        self.loader = DataLoader(
            DiskPatches(self.train, views), batch_sampler=self.batches, num_workers=options.workers,
            persistent_workers=options.workers > 0, pin_memory=fabric.device.type == "cuda",
            worker_init_fn=_start_loading,
        )  # fmt: skip

    def _end_loader(self) -> None:
        """End the loading processes. They do not listen to signals, so Python, at its exit after an error (whose
        traceback holds on to the iterator), would wait for them forever."""
        iterator = getattr(self.loader, "_iterator", None)
        self.loader = None
        if iterator is not None:
            iterator._shutdown_workers()

    def _listen(self) -> dict[int, Any]:
        """SIGTERM and SIGUSR1 (SLURM, nnssl's habit) end the run after the step, or the pass over held-out cases, with
        a checkpoint; what they did before."""

        def note(number: int, _: Any) -> None:
            self.signal = number

        return {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def _leave_if_asked(self) -> None:
        """Save and leave if any process had a signal; called by all of them together."""
        if self._is_asked_to_stop():
            self._keep()
            self.fabric.barrier()  # a process that leaves early has the launcher kill the one that is saving
            name = signal.Signals(self.signal or signal.SIGTERM).name
            print(f"\n{name}: saved after step {self.step} of epoch {self.epoch}; go on with --c", file=sys.stderr)
            sys.exit(128 + (self.signal or signal.SIGTERM))

    def _is_asked_to_stop(self) -> bool:
        if self.fabric.world_size == 1:
            return self.signal is not None
        asked = torch.tensor(float(self.signal is not None), device=self.fabric.device)
        return self.fabric.all_reduce(asked, reduce_op="sum").item() > 0

    def _keep(self) -> None:
        """The latest checkpoint, and the best one where this epoch was the best."""
        if not self.fabric.is_global_zero:
            return
        state = self._state()
        if not self.step:
            errors = [_mean_error(row) for row in self.history]
            if errors[-1] is not None and errors[-1] == min(e for e in errors if e is not None):
                save(state, self.folder / BEST)
            if self.options.keep_every and self.epoch % self.options.keep_every == 0:
                save(state, self.folder / f"checkpoint_epoch_{self.epoch:04d}.pth")
        save(state, self.folder / LATEST)  # at the end: a run killed before it does the epoch, and the others, again

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.method.state_dict(), "optimizer": self.optimizer.state_dict(),
            "history": self.history, "epoch": self.epoch, "step": self.step, "sums": self.sums,
            "identity": self.identity, "contract": asdict(self._contract()),
        }  # fmt: skip

    def _checkpoint(self, resume: bool) -> dict[str, Any] | None:
        if not resume:
            if any((self.folder / name).is_file() for name in (LATEST, PREVIOUS)):
                raise UserError(f"{self.folder}: there is a pretraining already; go on with --c or give another folder "
                                "with -o")  # fmt: skip
            return None
        checkpoint = load_latest(self.folder)
        begun, mine = {**dict.fromkeys(self.identity), "passes": {}, **checkpoint.get("identity", {})}, self.identity
        where = f"--c: the run in {self.folder} was begun with"
        if begun["settings"] != mine["settings"]:
            raise UserError(f"{where} other settings; give the same -m, -preset and --set")
        if any(begun[side] != mine[side] for side in ("train", "held_out")):
            raise UserError(f"{where} other cases; give the same -d and -f")
        for what, size in begun["passes"].items():
            if size != mine["passes"][what]:
                micro, rest = (size, 0) if what == ONE_GPU else divmod(size, self.fabric.world_size)
                way_out = "take another -num_gpus" if rest else f"set pretrain.micro_batch_size={micro}"
                raise UserError(f"{where} passes of {size} patches {what}, and their result hangs on that; {way_out}")
        check_run(checkpoint, self.folder)
        return checkpoint

    def _contract(self) -> Contract:
        names, whole = [case.dataset for case in self.cases], self.settings.wholebody
        return self.method.contract(self.settings, {
            "grid": whole.grid, "patch": whole.patch, "k": whole.k, "stack": whole.stack,
            "method": self.options.method, "epochs": self.options.epochs, "left_out_fold": self.fold,
            "datasets": [{"name": n, "cases": names.count(n), "licence": c} for n, c in self.licences.items()],
            "software": {"python": platform.python_version()} | self.software,
        })  # fmt: skip


def _start_loading(_: int) -> None:
    """A signal to the whole process group must not take the loading processes away from a run that is saving."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    blosc2.set_nthreads(1)  # a coronal slice is too small for more, and the processes are many


def _empty_sums(method: Method) -> dict[str, tuple[float, int]]:
    """Sum and count of each part of the loss (and of the gradient's norm) over the steps of an epoch."""
    return dict.fromkeys((*method.parts, "gradient_norm"), (0.0, 0))


def _mean_error(row: dict[str, Any]) -> float | None:
    values = [row.get(f"held_out_{modality}") for modality in MODALITIES]
    return None if None in values else sum(values) / len(values)


def _identity(settings: Settings, train: list[Case], held_out: list[Case], passes: dict[str, int]) -> dict[str, Any]:
    """What makes a run this run: all that shapes its result. What only shapes its speed may change between a run and
    its resumption, the number of GPUs too, and so may the settings of fine-tuning."""
    block = settings.to_json()
    for name in ("workers", "store", "picture_every", "keep_every", "micro_batch_size"):
        block["pretrain"].pop(name)
    kept = {key: block[key] for key in ("preset", "token_patch", "wholebody", "pretrain")}
    sides = {"train": [c.name for c in train], "held_out": [c.name for c in held_out]}
    return {"settings": kept, "passes": passes, **sides}
