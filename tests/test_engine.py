"""The pretraining run: it learns, resumes exactly, keeps its checkpoint, exports what loads again."""

import json
import multiprocessing
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import blosc2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nnunet_fratmae.artefact import check_artefact, load_encoders
from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.networks.unetr import FratMAEUNETR
from plans.settings import Preset, Pretrain, Settings, WholeBody
from pretraining import checkpoint, engine, evaluation, launch, monitor, recipe
from pretraining.data import Case

TINY = Preset(24, 4, 2, decoder_dim=24, decoder_depth=1, decoder_heads=2, unetr_features=4)


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    monkeypatch.setattr("plans.settings.PRESETS", {"vit_tiny": TINY})
    monkeypatch.setattr("plans.contract.PRESETS", {"vit_tiny": TINY})


@pytest.fixture
def cases(tmp_path):
    """Six volumes of one value each, CT = c and PET = -c."""
    found = []
    for i, value in enumerate((-1.5, 1.4, -0.5, 0.9, 0.5, -1.0)):
        volume = np.full((2, 16, 24, 40), value, dtype=np.float16) * np.array([1, -1], np.float16)[:, None, None, None]
        path = tmp_path / f"case{i}.b2nd"
        blosc2.asarray(volume, urlpath=str(path), chunks=(1, 1, 24, 40), blocks=(1, 1, 24, 40))
        found.append(Case(path, f"Dataset001_Toy/case{i}", (0, 1)))
    return found


def toy_settings(**pretrain) -> Settings:
    options = {"epochs": 2, "batch_size": 2, "workers": 0, "held_out": 0.2, "learning_rate": 1e-2}
    options |= {"patches_per_case": 1, "method": "fratmae_notext", "pet_scale": 0.0, "ct_shift": 0.0}
    options |= {"picture_every": 99} | pretrain
    whole = WholeBody(grid=(16, 24, 40), patch=(8, 24, 40), k=2)
    return Settings(preset="vit_tiny", token_patch=(4, 8, 8), wholebody=whole, pretrain=Pretrain(**options))


def start(folder, cases, resume=False, **pretrain) -> engine.Pretraining:
    fabric = launch.make_fabric("cpu", 1, 1, True)
    return engine.Pretraining(folder, toy_settings(**pretrain), cases, {"Dataset001_Toy": "CC0"}, None, fabric, resume)


def run(folder, cases, resume=False, **pretrain):
    start(folder, cases, resume, **pretrain).run()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_it_learns(tmp_path, cases):
    """The masked MSE on a case it never saw falls far below the variance between the cases, which is 1.1."""
    rows = run(tmp_path / "out", cases, epochs=8, patches_per_case=6)
    assert rows[-1]["held_out_PET"] < 0.2 and rows[-1]["held_out_CT"] < 0.2
    assert all(row["gradient_norm"] > 0 for row in rows)
    for picture in ("progress.png", "reconstruction.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000


@pytest.mark.parametrize("cases_there, patches", [(1292, 1), (30, 40), (1, 1200)])
def test_few_cases_still_make_epochs_of_50_steps(cases_there, patches):
    settings = recipe.choose_patches(toy_settings(patches_per_case=None, batch_size=24), cases_there)
    assert settings.pretrain.patches_per_case == patches
    assert recipe.choose_patches(toy_settings(patches_per_case=3), cases_there).pretrain.patches_per_case == 3


@pytest.mark.parametrize("ratio, masked", [(0.01, 0), (0.99, 30)])
def test_a_ratio_that_masks_nothing_or_all_is_refused(tmp_path, cases, ratio, masked):
    with pytest.raises(UserError, match=rf"mask_ratio={ratio} masks {masked} of the 30 tokens"):
        start(tmp_path / "out", cases, mask_ratio=ratio)
    assert not (tmp_path / "out").exists()


def timeless(rows):
    """Metrics without those that depend on the speed of the machine."""
    timing = ("seconds", "patches_per_second", "data_wait", "mfu")
    return [{key: value for key, value in row.items() if key not in timing} for row in rows]


class Killed(Exception):
    pass


def test_a_run_that_was_killed_goes_on_bit_exactly(tmp_path, cases, monkeypatch):
    whole = run(tmp_path / "whole", cases, epochs=4)
    original = engine.Pretraining._train_step

    def die_in_epoch_2(self, passes):
        if self.epoch == 2 and self.step == 1:
            raise Killed
        return original(self, passes)

    monkeypatch.setattr(engine.Pretraining, "_train_step", die_in_epoch_2)
    with pytest.raises(Killed):
        run(tmp_path / "cut", cases, epochs=4)
    monkeypatch.setattr(engine.Pretraining, "_train_step", original)
    assert timeless(run(tmp_path / "cut", cases, resume=True, epochs=4)) == timeless(whole)
    for name in ("encoders.safetensors", "encoders.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_is_not_overwritten_and_resuming_needs_one(tmp_path, cases):
    with pytest.raises(UserError, match="start without --c"):
        run(tmp_path / "out", cases, resume=True)
    run(tmp_path / "out", cases, epochs=1)
    with pytest.raises(UserError, match="go on with --c"):
        run(tmp_path / "out", cases, epochs=1)
    with pytest.raises(UserError, match="other settings"):
        run(tmp_path / "out", cases, resume=True, epochs=1, learning_rate=5e-3)
    with pytest.raises(UserError, match="other cases"):
        run(tmp_path / "out", cases[:-1], resume=True, epochs=1)
    run(tmp_path / "out", cases, resume=True, epochs=1, workers=1)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / checkpoint.LATEST
    checkpoint.save({"epoch": 1}, path)

    def full_disk(state, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="is the disk full"):
        checkpoint.save({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_that_does_not_read_back_is_never_the_only_one(tmp_path, monkeypatch, capsys):
    path = tmp_path / checkpoint.LATEST
    for epoch in (1, 2):
        checkpoint.save({"epoch": epoch}, path)
    monkeypatch.setattr(torch, "save", lambda state, file: file.write(b"not what was asked for"))
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.save({"epoch": 3}, path)
    assert checkpoint.load_latest(tmp_path) == {"epoch": 2}
    path.write_bytes(path.read_bytes()[:100])  # by something else
    assert checkpoint.load_latest(tmp_path) == {"epoch": 1}
    assert "damaged or cut off" in capsys.readouterr().out
    (tmp_path / checkpoint.PREVIOUS).write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.load_latest(tmp_path)


def flip_a_bit(path):
    """Of a weight, somewhere in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_every_byte_of_a_checkpoint_is_read_back(tmp_path, monkeypatch, capsys):
    """One wrong bit, which torch.load takes as it is, on a disk that lies and in a file that rots."""
    path, weights = tmp_path / checkpoint.LATEST, torch.arange(100_000.0)
    for epoch in (1, 2):
        checkpoint.save({"epoch": epoch, "weights": weights}, path)
    original, folder = torch.save, tmp_path / "empty"
    folder.mkdir()

    def lying_disk(state, file):
        original(state, file)
        file.flush()
        flip_a_bit(Path(file.name))

    monkeypatch.setattr(torch, "save", lying_disk)
    with pytest.raises(UserError, match="does not read back as it was written.*The last checkpoint is whole"):
        checkpoint.save({"epoch": 3, "weights": weights}, path)
    with pytest.raises(UserError, match="Make room; start again"):
        checkpoint.save({"epoch": 3, "weights": weights}, folder / path.name)
    assert checkpoint.load_latest(tmp_path)["epoch"] == 2
    flip_a_bit(path)
    assert not torch.equal(torch.load(path)["weights"], weights)
    assert checkpoint.load_latest(tmp_path)["epoch"] == 1
    assert "damaged or cut off" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, cases):
    volume = np.full((2, 16, 24, 40), np.nan, dtype=np.float16)
    for case in cases:
        case.path.unlink()
        blosc2.asarray(volume, urlpath=str(case.path), chunks=(1, 1, 24, 40), blocks=(1, 1, 24, 40))
    with pytest.raises(UserError, match="the loss is nan.*there is no checkpoint yet"):
        run(tmp_path / "out", cases)
    assert not (tmp_path / "out" / "encoders.safetensors").exists()


def test_a_loss_that_is_not_finite_names_the_cases_and_keeps_the_last_weights(tmp_path, cases):
    bad = start(tmp_path / "out", cases, epochs=3)
    original, victim = bad._inputs, bad.train[2].name

    def poisoned(image, numbers, mask):
        if bad.epoch == 1:
            image[numbers == 2] = np.nan
        return original(image, numbers, mask)

    bad._inputs = poisoned
    with pytest.raises(UserError, match=f"the loss is nan in epoch 1.*{victim}.*weights are in checkpoint_latest"):
        bad.run()
    state = torch.load(tmp_path / "out" / "checkpoint_latest.pth", weights_only=True)
    assert state["epoch"] == 1 and all(torch.isfinite(v).all() for v in state["model"].values())


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_are_spoilt(tmp_path, cases):
    bad = start(tmp_path / "out", cases)
    before = {name: value.clone() for name, value in bad.method.state_dict().items()}
    bad.fabric.clip_gradients = lambda *_, **__: torch.tensor(torch.inf)
    with pytest.raises(UserError, match="the gradient's norm is inf in epoch 0, step 0, with the cases Dataset001_Toy"):
        bad.run()
    assert all(torch.equal(value, before[name]) for name, value in bad.method.state_dict().items())


def test_an_error_leaves_no_loading_process_behind(tmp_path, cases, monkeypatch):
    """They ignore signals, so Python would wait for them at its exit; the traceback keeps the loader's iterator."""

    def out_of_memory(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.Pretraining, "_check", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path / "out", cases, workers=1)
    assert not multiprocessing.active_children()


def test_processes_that_know_nothing_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    launch._check_launcher(1, 1)  # a batch script without srun
    with pytest.raises(UserError, match="SLURM started 1 processes"):
        launch._check_launcher(8, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    launch._check_launcher(4, 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "8")
    launch._check_launcher(8, 1)
    with pytest.raises(UserError, match="torchrun started 8 processes"):
        launch._check_launcher(1, 1)


def test_further_nodes_need_somebody_who_starts_them(monkeypatch):
    """Else this process would wait for the others for half an hour."""
    for name in ("MASTER_ADDR", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="-num_nodes 2: nobody started the processes of the other nodes"):
        launch.make_fabric("cpu", 1, 2, True)


def set_slurm(monkeypatch, nodes: int, tasks_per_node: int) -> None:
    """The variables that srun sets for the first task, as Fabric reads them."""
    tasks = nodes * tasks_per_node
    for name, value in (("NTASKS", tasks), ("STEP_NUM_TASKS", tasks), ("NTASKS_PER_NODE", tasks_per_node),
                        ("NNODES", nodes), ("PROCID", 0), ("LOCALID", 0), ("NODEID", 0), ("JOB_ID", 4321),
                        ("JOB_NAME", "pretrain")):  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", str(value))


def test_what_srun_was_told_wrong_is_one_line(monkeypatch):
    set_slurm(monkeypatch, nodes=2, tasks_per_node=4)
    with pytest.raises(UserError, match="-num_gpus 8 on -num_nodes 1: .*ntasks-per-node"):
        launch.make_fabric("cpu", 8, 1, True)


def test_one_task_of_slurm(monkeypatch):
    """See test_pretrain_runs.py for two tasks."""
    set_slurm(monkeypatch, nodes=1, tasks_per_node=1)
    fabric = launch.make_fabric("cpu", 1, 1, True)
    assert (fabric.world_size, fabric.global_rank, fabric.is_global_zero) == (1, 0, True)
    with pytest.raises(UserError, match="SLURM started 1 processes"):
        launch.make_fabric("cpu", 2, 1, True)


def test_a_run_goes_on_on_other_gpus_only_with_the_same_negatives(tmp_path, monkeypatch):
    """12 patches meet in the contrastive loss: 4 on each of 3 GPUs, 3 on each of 4, but there is no way on 5."""
    text, plain = (Pretrain(method=method, batch_size=24) for method in ("fratmae", "fratmae_notext"))
    stray = replace(plain, shuffle_partner=True)
    assert recipe.pass_sizes(text, 4, 3) == recipe.pass_sizes(text, 3, 4) and recipe.pass_sizes(plain, 4, 3) == {}
    assert recipe.pass_sizes(stray, 4, 3) == recipe.pass_sizes(stray, 4, 6) != recipe.pass_sizes(stray, 3, 4)
    same = {"settings": {}, "train": [], "held_out": []}
    monkeypatch.setattr(engine, "check_run", lambda state, folder: None)  # there are no weights
    checkpoint.save({"identity": same | {"passes": recipe.pass_sizes(text, 4, 3)}}, tmp_path / checkpoint.LATEST)

    def resume(micro, world):
        asked = SimpleNamespace(folder=tmp_path, identity=same | {"passes": recipe.pass_sizes(text, micro, world)},
                                fabric=SimpleNamespace(world_size=world))  # fmt: skip
        return engine.Pretraining._checkpoint(asked, True)

    assert resume(3, 4)
    with pytest.raises(UserError, match="passes of 12 patches on all GPUs together.*pretrain.micro_batch_size=6"):
        resume(4, 2)
    with pytest.raises(UserError, match="passes of 12 patches.*take another -num_gpus"):
        resume(4, 5)


def test_a_signal_while_judging_saves_and_leaves_at_once(tmp_path, cases, monkeypatch):
    options = {"epochs": 2, "held_out": 0.4, "micro_batch_size": 1}
    whole = run(tmp_path / "whole", cases, **options)
    asked = start(tmp_path / "cut", cases, **options)
    original, passes = evaluation.masked_mse, []

    def signalled(*arguments):
        if asked.epoch == 1:
            passes.append(1)
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(evaluation, "masked_mse", signalled)
    with pytest.raises(SystemExit) as left:
        asked.run()
    assert left.value.code == 128 + signal.SIGTERM and len(passes) == 1, "of eight"
    state = torch.load(tmp_path / "cut" / "checkpoint_latest.pth", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, asked.batches.steps)
    monkeypatch.setattr(evaluation, "masked_mse", original)
    assert timeless(run(tmp_path / "cut", cases, resume=True, **options)) == timeless(whole)


class FakeWandb:
    """What nnU-Net's logger needs of W&B, which keeps its run in the folder."""

    def __init__(self):
        self.begun, self.logged, self.ended = [], [], []

    def init(self, project, dir, id, mode, resume):
        (latest := Path(dir) / "wandb" / "latest-run").mkdir(parents=True, exist_ok=True)
        (latest / "run-abc.wandb").touch()
        self.begun.append((id, resume))
        return SimpleNamespace(config={}, summary={}, step=0, finish=lambda exit_code: self.ended.append(exit_code),
                               log=lambda values, step: self.logged.append((step, *values)))  # fmt: skip


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path, cases, monkeypatch):
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.wandb", wandb := FakeWandb())
    original = engine.Pretraining._keep

    def die_after_epoch_0(self):
        original(self)
        raise Killed

    monkeypatch.setattr(engine.Pretraining, "_keep", die_after_epoch_0)
    with pytest.raises(Killed):
        run(tmp_path / "out", cases)
    monkeypatch.setattr(engine.Pretraining, "_keep", original)
    run(tmp_path / "out", cases, resume=True)
    assert wandb.begun == [(None, "never"), ("abc", "allow")] and wandb.ended == [1, 0]
    assert {(0, "held_out_PET"), (1, "held_out_PET")} <= set(wandb.logged)


def test_without_a_working_wandb_a_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.wandb", None)
    assert monitor._wandb(tmp_path, False) is None
    assert "W&B is not installed" in capsys.readouterr().out
    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.wandb", FakeWandb())
    (tmp_path / "wandb" / "latest-run").mkdir(parents=True)  # without its run
    assert monitor._wandb(tmp_path, True) is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "W&B cannot be used (StopIteration" in lines[0]


def test_a_signal_saves_and_leaves_within_an_epoch(tmp_path, cases):
    whole = run(tmp_path / "whole", cases, epochs=2, patches_per_case=3)
    asked = start(tmp_path / "cut", cases, epochs=2, patches_per_case=3)
    original = asked._train_step

    def signalled(passes):
        if (asked.epoch, asked.step) == (1, 2):
            signal.raise_signal(signal.SIGUSR1)
        return original(passes)

    asked._train_step = signalled
    with pytest.raises(SystemExit) as left:
        asked.run()
    assert left.value.code == 128 + signal.SIGUSR1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the handlers are gone with the run"
    state = torch.load(tmp_path / "cut" / "checkpoint_latest.pth", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 3)
    assert timeless(run(tmp_path / "cut", cases, resume=True, epochs=2, patches_per_case=3)) == timeless(whole)
    same = [(tmp_path / name / "encoders.safetensors").read_bytes() for name in ("cut", "whole")]
    assert same[0] == same[1]


def test_best_and_kept_checkpoints(tmp_path, cases):
    rows = run(tmp_path / "out", cases, epochs=5, keep_every=2)
    errors = [row["held_out_CT"] + row["held_out_PET"] for row in rows]
    best = torch.load(tmp_path / "out" / "checkpoint_best.pth", weights_only=True)
    assert best["epoch"] == int(np.argmin(errors)) + 1
    kept = sorted(p.name for p in (tmp_path / "out").glob("checkpoint_epoch_*"))
    assert kept == ["checkpoint_epoch_0002.pth", "checkpoint_epoch_0004.pth"]


@pytest.mark.parametrize("method", ["fratmae_notext", "mae"])
def test_accumulated_passes_are_one_step(tmp_path, cases, method):
    """The same weights, up to rounding, whether a batch of 4 is one pass or four; from disk or from memory."""
    options = {"epochs": 2, "batch_size": 4, "patches_per_case": 2, "method": method, "learning_rate": 1e-3}
    run(tmp_path / "one", cases, **options)
    run(tmp_path / "four", cases, micro_batch_size=1, store="memory", **options)
    one, four = (load_file(tmp_path / name / "encoders.safetensors") for name in ("one", "four"))
    for name, value in one.items():
        # A weight without gradient but for rounding may go either way, by a step of Adam (1e-3) at most
        torch.testing.assert_close(four[name], value, atol=3e-4, rtol=1e-3)
    with pytest.raises(UserError, match="cannot be cut into passes of 3"):
        start(tmp_path / "three", cases, micro_batch_size=3, **options)


class StubTower(torch.nn.Module):
    """Each prompt has a random but fixed embedding; trainable."""

    name, dim = "stub", 8

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def encode(self, prompts):
        seeds = [torch.Generator().manual_seed(sum(prompt.encode())) for prompt in prompts]
        return self.layer(torch.stack([torch.randn(8, generator=seed) for seed in seeds]))


@pytest.mark.parametrize("method, frozen", [("fratmae", True), ("mae_text", True), ("fratmae", False)])
def test_text_is_aligned_and_found_again(tmp_path, cases, monkeypatch, method, frozen):
    """Cases whose PET is hot have one prompt, cold ones another, one has none: held-out PETs find theirs."""
    monkeypatch.setattr("pretraining.text.load_tower", lambda tower, weights: StubTower())
    told = [replace(c, prompt=None if i == 4 else "<tracer> A" if i in (0, 2, 5) else "<tracer> B")
            for i, c in enumerate(cases)]  # fmt: skip
    options = {"method": method, "text_frozen": frozen, "held_out": 0.4, "epochs": 6, "patches_per_case": 8,
               "batch_size": 4, "learning_rate": 3e-3}  # fmt: skip
    rows = run(tmp_path / "out", told, **options)
    assert rows[-1]["train_text"] < rows[0]["train_text"]
    if "retrieval_top1" in rows[-1]:
        assert rows[-1]["retrieval_top1"] == 1
    contract = json.loads((tmp_path / "out" / "encoders.json").read_text(encoding="utf-8"))
    assert (contract["method"], contract["text_tower"]) == (method, "stub")
    weights = torch.load(tmp_path / "out" / "checkpoint_latest.pth", weights_only=True)["model"]
    assert any(name.startswith("text_tower") for name in weights) is not frozen


def test_weights_at_the_start_follow_the_seed(tmp_path, cases, monkeypatch):
    monkeypatch.setattr("pretraining.text.load_tower", lambda tower, weights: StubTower())
    told = [replace(c, prompt=f"<tracer> {i % 2}") for i, c in enumerate(cases)]
    runs = [start(tmp_path, told, method="fratmae", seed=seed) for seed in (3, 3, 4)]
    first, again, other = (begun.method.state_dict() for begun in runs)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    for name in ("context_align.pet_projection.weight", "fratmae.encoders.CT.cls_token"):
        assert not torch.equal(first[name], other[name])


def test_text_without_any_metadata_is_refused(tmp_path, cases):
    with pytest.raises(UserError, match="-m fratmae: no case has metadata.*-m fratmae_notext"):
        start(tmp_path / "out", cases, method="fratmae")


def test_text_that_tells_nothing_apart_is_refused(tmp_path, cases, monkeypatch):
    """The contrastive loss would be 0 throughout, which looks like success."""
    monkeypatch.setattr("pretraining.text.load_tower", lambda tower, weights: StubTower())
    alike = [replace(c, prompt="<tracer> 18F FDG") for c in cases]
    with pytest.raises(UserError, match="all cases have the same metadata .'<tracer> 18F FDG'.*-m fratmae_notext"):
        start(tmp_path / "out", alike, method="fratmae")
    told = [replace(c, prompt=f"<tracer> {i % 2}") for i, c in enumerate(cases)]
    with pytest.raises(UserError, match="pretrain.micro_batch_size=1: a pass of 1 patch has nothing to tell"):
        start(tmp_path / "out", told, method="fratmae", micro_batch_size=1)


def test_a_shuffled_partner_is_no_partner(tmp_path, cases):
    """The toy's CT tells its PET (PET = -CT): with the own partner the network uses it, with a stranger's it cannot."""
    options = {"epochs": 8, "patches_per_case": 6, "batch_size": 6, "held_out": 0.4}
    own = run(tmp_path / "own", cases, **options)[-1]
    other = run(tmp_path / "other", cases, shuffle_partner=True, **options)[-1]
    assert own["gain_PET"] > other["gain_PET"]
    with pytest.raises(UserError, match="no other patient"):
        start(tmp_path / "alone", cases, shuffle_partner=True, **options, micro_batch_size=1)


@pytest.fixture
def artefact(tmp_path, cases):
    run(tmp_path / "out", cases, epochs=1)
    return tmp_path / "out"


def network(depth=4) -> FratMAEUNETR:
    return FratMAEUNETR(2, 2, (8, 16, 32), (4, 8, 8), embed_dim=24, depth=depth, num_heads=2, features=4)


def test_export_is_what_was_trained_and_loads_without_pickle(artefact):
    trained = torch.load(artefact / "checkpoint_latest.pth", weights_only=True)["model"]
    fresh = network()
    report = load_encoders(artefact, fresh.encoders)
    for name, value in fresh.encoders.state_dict().items():
        torch.testing.assert_close(value, trained[f"fratmae.encoders.{name}"], rtol=0, atol=0)
    assert sum("0 missing, 0 left over" in line for line in report) == 2
    assert load_encoders(artefact / "encoders.safetensors", network().encoders) == report
    contract = check_artefact(artefact)
    assert contract.datasets == [{"name": "Dataset001_Toy", "cases": 6, "licence": "CC0"}]


def test_nnunet_style_export_serves_stock_pretrained_weights(artefact):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    fresh, reference = network(), network()
    load_pretrained_weights(fresh, str(artefact / "encoders_nnunet.pth"))
    load_encoders(artefact, reference.encoders)
    for name, value in reference.encoders.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[f"encoders.{name}"], value, rtol=0, atol=0)


def test_damaged_and_foreign_artefacts_are_refused_in_one_line(artefact, tmp_path):
    weights = artefact / "encoders.safetensors"
    for name, content in (("cut", weights.read_bytes()[:-1000]), ("head", weights.read_bytes()[:20]), ("empty", b"")):
        broken = tmp_path / name
        broken.mkdir()
        (broken / weights.name).write_bytes(content)
        shutil.copy(artefact / "encoders.json", broken)
        with pytest.raises(UserError, match="damaged or cut off") as error:
            check_artefact(broken)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="missing CT.blocks.4"):
        load_encoders(artefact, network(depth=8).encoders)
    content = json.loads((artefact / "encoders.json").read_text(encoding="utf-8")) | {"token_patch": [8, 8, 8]}
    (artefact / "encoders.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="different pretrainings"):
        check_artefact(artefact)
