"""From a pretraining with text to weights for other tasks and to retrieval, by the commands."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from nnunet_fratmae.artefact import load_pretrained
from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.units import to_units
from nnUNet_raw_conversion.clinical import ClinicalRecord
from pretraining.retrieve import candidates, classify, scores


@pytest.fixture(scope="module")
def aligned(phantoms, text_tower) -> Path:
    """A run of the arm fratmae on the phantoms, with a tiny text tower from a folder."""
    folder = text_tower.parent / "aligned"
    phantoms.run(f"fratmae_pretrain -d 7 -device cpu -o {folder} --set pretrain.text_tower={text_tower} "
                 "pretrain.text_weights=null pretrain.held_out=0.4")  # fmt: skip
    return folder


def test_run_with_text_leaves_contract_card_and_projections(aligned):
    contract = json.loads((aligned / "encoders.json").read_text(encoding="utf-8"))
    assert contract["method"] == "fratmae" and "/" not in contract["text_tower"]
    card = (aligned / "model_card.md").read_text(encoding="utf-8")
    assert "Dataset007_Phantom: 6 cases" in card and "held_out_PET" in card
    assert {k.split(".")[0] for k in load_file(aligned / "context_align.safetensors")} == {"context_align"}
    row = json.loads((aligned / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert row["train_text"] > 0 and "gain_PET" in row and row["mean_guess_CT"] > 0


def test_any_checkpoint_can_be_exported(aligned, phantoms, tmp_path):
    phantoms.run(f"fratmae_export -m {aligned} -o {tmp_path}/again")
    for name in ("encoders.safetensors", "encoders.json", "model_card.md", "context_align.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (aligned / name).read_bytes()
    phantoms.run(f"fratmae_export -m {aligned} -chk checkpoint_best.pth -o {tmp_path}/best")
    output = phantoms.run(f"fratmae_export -m {aligned} -chk nothing.pth -o {tmp_path}/no", expect=1)
    assert "there are checkpoint_best.pth, checkpoint_latest.pth" in output and not (tmp_path / "no").exists()


def test_encoders_serve_other_tasks(aligned):
    encoders = load_pretrained(aligned)
    suv = 4 * torch.rand(1, 1, 32, 48, 64)
    tokens = encoders["PET"](to_units("PET", suv))
    assert tokens.shape == (1, 1 + 4 * 3 * 4, 96)
    hu = 100 * suv[..., :16, :32, :48]
    maps = load_pretrained(aligned, (16, 32, 48))["CT"].feature_maps(to_units("CT", hu), [3, 4])
    assert [m.shape for m in maps] == [(1, 96, 2, 2, 3)] * 2
    with pytest.raises(ValueError, match="this encoder takes \\(32, 48, 64\\)"):
        encoders["CT"](to_units("CT", hu))
    with pytest.raises(ValueError, match="layers 1 to 4"):
        encoders["PET"].feature_maps(to_units("PET", suv), [3, 5])
    with pytest.raises(UserError, match="no multiple of the token patch"):
        load_pretrained(aligned, (15, 32, 48))
    torch.testing.assert_close(to_units("CT", torch.tensor([-2000.0, 0, 3000])), torch.tensor([0, 1024, 2524]) / 500)


def test_retrieval_writes_a_table(aligned, phantoms, tmp_path):
    output = phantoms.run(f"fratmae_retrieve -d 7 -m {aligned} -device cpu -o {tmp_path}/found.csv")
    with (tmp_path / "found.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and sum(row["held_out"] == "yes" for row in rows) == 2
    assert {row["diagnosis_retrieved"] for row in rows} <= {row["diagnosis"] for row in rows}
    assert "diagnosis, 2 cases held out:" in output and "balanced over values" in output
    assert "diagnosis, 4 cases trained on:" in output and "never seen" not in output


def test_an_artefact_retrieves_as_its_run_does(aligned, text_tower, phantoms, tmp_path):
    """With the tower in another place, and of which cases it was trained on nothing is known."""
    phantoms.run(f"fratmae_export -m {aligned} -o {tmp_path}/artefact")
    moved = shutil.copytree(text_tower, tmp_path / "moved")
    tables = []
    for model, tower in ((aligned, ""), (tmp_path / "artefact", f"--text_tower {moved}")):
        phantoms.run(f"fratmae_retrieve -d 7 -m {model} {tower} -device cpu -o {tmp_path}/found.csv")
        with (tmp_path / "found.csv").open(encoding="utf-8") as file:
            tables.append([{k: v for k, v in row.items() if k != "held_out"} for row in csv.DictReader(file)])
    assert tables[0] == tables[1] and "\nphantom_000,," in (tmp_path / "found.csv").read_text(encoding="utf-8")
    output = phantoms.run(f"fratmae_retrieve -d 7 -m {tmp_path}/artefact -device cpu -o {tmp_path}/no.csv", expect=1)
    assert "error: text tower " in output and "Traceback" not in output and not (tmp_path / "no.csv").exists()


def test_retrieval_wants_the_grid_of_the_run(aligned, phantoms, tmp_path):
    """A store on another grid would be looked at in a corner."""
    path = phantoms.preprocessed / "Dataset007_Phantom" / "FratMAEPlans.json"
    text = path.read_text(encoding="utf-8")
    plans = json.loads(text)
    plans["fratmae"]["wholebody"]["grid"] = [64, 48, 64]
    path.write_text(json.dumps(plans), encoding="utf-8")
    try:
        output = phantoms.run(f"fratmae_retrieve -d 7 -m {aligned} -device cpu -o {tmp_path}/no.csv", expect=1)
    finally:
        path.write_text(text, encoding="utf-8")
    assert "its whole-body grid is [64, 48, 64], not [32,48,64]" in output and "Traceback" not in output


def test_retrieval_needs_text(pretraining, phantoms, tmp_path):
    output = phantoms.run(f"fratmae_retrieve -d 7 -m {pretraining} -device cpu -o {tmp_path}/found.csv", expect=1)
    assert "was pretrained without text" in output and "Traceback" not in output


def test_values_are_found_by_the_mean_of_their_prompts():
    records = [ClinicalRecord("a", "18F-FDG", "melanoma", 50, "M"), ClinicalRecord("b", "18F-FDG", None, 40, "F"),
               ClinicalRecord("c", "68Ga-PSMA"), ClinicalRecord("d", None, "melanoma")]  # fmt: skip
    assert candidates(records, "tracer") == {
        "18F-FDG": ["<tracer> 18F FDG <age> 40 <sex> F", "<tracer> 18F FDG <diagnosis> melanoma <age> 50 <sex> M"],
        "68Ga-PSMA": ["<tracer> 68Ga PSMA"],
    }
    assert list(candidates(records, "diagnosis")) == ["melanoma"]
    torch.manual_seed(0)
    texts = {"a": normalize(torch.randn(3, 8), dim=1), "b": normalize(torch.randn(2, 8), dim=1)}
    pets = normalize(torch.randn(5, 8), dim=1)
    values, similarity = classify(pets, texts)
    for i in range(5):
        cosine = {v: float(torch.cosine_similarity(pets[i], t.mean(0), dim=0)) for v, t in texts.items()}
        assert values[i] == max(cosine, key=cosine.get)
        assert similarity[i].tolist() == pytest.approx(list(cosine.values()), abs=1e-5)


def test_scores_match_a_reference():
    pairs = [("a", "a"), ("a", "a"), ("a", "b"), ("b", "b"), ("c", "a")]
    assert scores(pairs) == pytest.approx((3 / 5, (2 / 3 + 1 + 0) / 3, 3 / 5))
