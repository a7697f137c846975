"""The pretraining run: it learns, resumes exactly, keeps its checkpoint, exports what loads again."""

import json
import shutil

import blosc2
import numpy as np
import pytest
import torch

from nnunet_fratmae.artefact import check_artefact, load_encoders
from nnunet_fratmae.networks.unetr import FratMAEUNETR
from nnUNet_raw_conversion.command import UserError
from plans.settings import Preset, Pretrain, Settings, WholeBody
from pretraining import engine
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
    options |= {"patches_per_case": 1} | pretrain
    whole = WholeBody(grid=(16, 24, 40), patch=(8, 24, 40), k=2)
    return Settings(preset="vit_tiny", token_patch=(4, 8, 8), wholebody=whole, pretrain=Pretrain(**options))


def run(folder, cases, resume=False, **pretrain):
    engine.pretrain(folder, toy_settings(**pretrain), cases, {"Dataset001_Toy": "CC0"}, None, "cpu", resume)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns(tmp_path, cases):
    """The masked MSE on a case it never saw falls far below the variance between the cases, which is 1.1."""
    rows = run(tmp_path / "out", cases, epochs=8, patches_per_case=6)
    assert rows[-1]["held_out_PET"] < 0.2 and rows[-1]["held_out_CT"] < 0.2
    for picture in ("progress.png", "reconstruction.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000


@pytest.mark.parametrize("cases_there, patches", [(1292, 1), (30, 40), (1, 1200)])
def test_few_cases_still_make_epochs_of_50_steps(cases_there, patches):
    settings = engine.choose_patches(toy_settings(patches_per_case=None, batch_size=24), cases_there)
    assert settings.pretrain.patches_per_case == patches
    assert engine.choose_patches(toy_settings(patches_per_case=3), cases_there).pretrain.patches_per_case == 3


class Killed(Exception):
    pass


def test_a_run_that_was_killed_goes_on_bit_exactly(tmp_path, cases, monkeypatch):
    whole = run(tmp_path / "whole", cases, epochs=4)
    original = engine._train_epoch

    def die_in_epoch_2(*args):
        if args[5] == 2:
            raise Killed
        return original(*args)

    monkeypatch.setattr(engine, "_train_epoch", die_in_epoch_2)
    with pytest.raises(Killed):
        run(tmp_path / "cut", cases, epochs=4)
    monkeypatch.setattr(engine, "_train_epoch", original)
    cut = run(tmp_path / "cut", cases, resume=True, epochs=4)
    timing = ("seconds", "patches_per_second")
    assert [{k: v for k, v in r.items() if k not in timing} for r in cut] == [
        {k: v for k, v in r.items() if k not in timing} for r in whole
    ]
    for name in ("encoders.safetensors", "encoders.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_is_not_overwritten_and_resuming_needs_one(tmp_path, cases):
    with pytest.raises(UserError, match="start without --c"):
        run(tmp_path / "out", cases, resume=True)
    run(tmp_path / "out", cases, epochs=1)
    with pytest.raises(UserError, match="go on with --c"):
        run(tmp_path / "out", cases, epochs=1)
    with pytest.raises(UserError, match="settings of the run"):
        run(tmp_path / "out", cases, resume=True, epochs=1, learning_rate=5e-3)
    with pytest.raises(UserError, match="train of the run"):
        run(tmp_path / "out", cases[:-1], resume=True, epochs=1)
    run(tmp_path / "out", cases, resume=True, epochs=1, workers=1)
    (tmp_path / "out" / "checkpoint_latest.pth").write_bytes(b"cut off")
    with pytest.raises(UserError, match="damaged"):
        run(tmp_path / "out", cases, resume=True, epochs=1)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_latest.pth"
    engine._save({"epoch": 1}, path)

    def full_disk(state, target):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        engine._save({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, cases):
    volume = np.full((2, 16, 24, 40), np.nan, dtype=np.float16)
    for case in cases:
        case.path.unlink()
        blosc2.asarray(volume, urlpath=str(case.path), chunks=(1, 1, 24, 40), blocks=(1, 1, 24, 40))
    with pytest.raises(UserError, match="the loss is nan"):
        run(tmp_path / "out", cases)
    assert not (tmp_path / "out" / "encoders.safetensors").exists()


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
        torch.testing.assert_close(value, trained[f"encoders.{name}"], rtol=0, atol=0)
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
    content = json.loads((artefact / "encoders.json").read_text()) | {"token_patch": [8, 8, 8]}
    (artefact / "encoders.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="different pretrainings"):
        check_artefact(artefact)
