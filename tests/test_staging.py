"""Staging: labels and folds, the network, loss and metrics against references, training and prediction by command."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunet_fratmae import predict_stage
from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.networks.staging import FratMAEStaging, summarise
from nnunet_fratmae.stage_data import (
    StagingStudies,
    WeightedCrossEntropy,
    central_window,
    class_weights,
    list_studies,
)
from nnunet_fratmae.stage_metrics import stage_metrics
from nnunet_fratmae.staging_trainer import FratMAEStagingTrainer, other_bodies
from plans.settings import Pretrain, Settings, Staging, WholeBody
from plans.staging import NETWORK, read_cohort, read_labels, staging_plans
from plans.store import Study
from pretraining.pretrain import _left_out
from tests.orientations import store_in_all_orientations
from tests.test_plans import stock_plans, write_artefact

PATCH, TOKEN = (8, 24, 32), (4, 8, 8)
SMALL = {"patch_size": PATCH, "token_patch": TOKEN, "embed_dim": 24, "depth": 4, "num_heads": 2}
STAGES = ["I", "II", "III", "IV", "early", "advanced", ""]


# ---------------------------------------------------------------------------------------------------- labels and folds


def clinical(folder: Path, text: str) -> Path:
    (folder / "clinical.csv").write_text(text, encoding="utf-8")
    return folder / "clinical.csv"


@pytest.fixture
def table(tmp_path) -> Path:
    rows = [f"c{i},{'18F-FDG' if i % 2 else '68Ga-PSMA'},{stage}" for i, stage in enumerate(STAGES)]
    return clinical(tmp_path, "\n".join(["case_id,tracer,stage", *rows, "elsewhere,18F-FDG,IV"]))


@pytest.mark.parametrize(
    "target, classes, expected",
    [
        ("risk", ["early", "advanced"], ["early", "early", "advanced", "advanced", "early", "advanced", None]),
        ("stage", ["I", "II", "III", "IV"], ["I", "II", "III", "IV", None, None, None]),
        ("tracer", ["18F-FDG", "68Ga-PSMA"], ["68Ga-PSMA", "18F-FDG"] * 3 + ["68Ga-PSMA"]),
    ],
)
def test_labels_of_a_target(table, target, classes, expected):
    found, labels = read_labels(table, target, [f"c{i}" for i in range(7)])
    assert found == classes
    assert [labels.get(f"c{i}") for i in range(7)] == expected and "elsewhere" not in labels


def test_a_column_of_the_users_own_is_a_target_and_does_not_disturb_the_others(tmp_path):
    path = clinical(tmp_path, "case_id,stage,response\na,I,partial\nb,IV, complete \nc,II,unknown\n")
    assert read_labels(path, "response", "abc") == (["complete", "partial"], {"a": "partial", "b": "complete"})
    assert read_labels(path, "risk", "abc")[1] == {"a": "early", "b": "advanced", "c": "early"}


@pytest.mark.parametrize(
    "text, target, says",
    [
        (None, "risk", "clinical.csv is not there"),
        ("case_id,stage\na,I\nb,II\n", "risk", "has 1 class"),
        ("case_id,stage\na,I\nb,IV\n", "colour", "needs one column colour"),
        ("case_id,note\n" + "".join(f"{chr(97 + i)},{i}\n" for i in range(21)), "note", "has 21 different values"),
    ],
)
def test_tables_without_classes_are_refused_in_one_line(tmp_path, text, target, says):
    path = clinical(tmp_path, text) if text else tmp_path / "clinical.csv"
    with pytest.raises(UserError, match=says) as error:
        read_labels(path, target, [chr(97 + i) for i in range(21)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [{"target": "age"}, {"epochs": 0}, {"patience": 0}, {"dropout": 1.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(UserError, match=f"staging.{next(iter(wrong))}"):
        Staging(**wrong)


PLANS = {
    "transpose_forward": [1, 2, 0],
    "fratmae": Settings(
        preset="vit_tiny", token_patch=(8, 16, 16), wholebody=WholeBody((32, 48, 64), (16, 48, 64), 2)
    ).to_json(),
    "configurations": {
        "3d_fullres": {"data_identifier": "fullres", "architecture": {}, "patch_size": [1, 1, 1]},
        "wholebody": {"inherits_from": "3d_fullres", "data_identifier": "whole"},
    },
}  # fmt: skip


@pytest.fixture
def preprocessed(tmp_path) -> Path:
    """Ten cases with segmentations, two without; c9 has no stage; the table's other stages alternate."""
    folder = tmp_path / "Dataset007_X"
    for name, count in (("fullres", 10), ("whole", 12)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"c{i}.b2nd").touch()
            (folder / name / f"c{i}_seg.b2nd").touch()
    rows = [f"c{i},{'' if i == 9 else 'I' if i % 2 else 'IV'}" for i in range(12)]
    clinical(folder, "\n".join(["case_id,stage", *rows]))
    return folder


def test_folds_are_nnunets_restricted_to_labels(preprocessed):
    """A user's smaller training set is kept, and cases without a segmentation train only."""
    split = [{"train": ["c0", "c1", "c2", "c9"], "val": ["c4", "c5"]}, {"train": ["c4", "c5"], "val": ["c9"]}]
    (preprocessed / "splits_final.json").write_text(json.dumps(split), encoding="utf-8")
    cohort = read_cohort(preprocessed, PLANS, 0)
    assert cohort.training == {"c0": 1, "c1": 0, "c2": 1, "c10": 1, "c11": 0}
    assert cohort.validation == {"c4": 1, "c5": 0}
    assert cohort.notes[0] == "1 cases without risk in clinical.csv are left out: c9"
    assert "2 cases without a segmentation (imagesPt) have risk and train in every fold" in cohort.notes
    assert cohort.notes[-2:] == ["5 training cases: 2 early, 3 advanced", "2 validation cases: 1 early, 1 advanced"]
    with pytest.raises(UserError, match="fold 1 of Dataset007_X: 4 training cases .* 0 validation cases"):
        read_cohort(preprocessed, PLANS, 1)
    with pytest.raises(UserError, match="folds 0 to 1"):
        read_cohort(preprocessed, PLANS, 2)


def test_the_split_that_is_made_anew_is_nnunets(preprocessed):
    """No case without a segmentation gets into splits_final.json, or FratMAETrainer would look for its labels."""
    sides = [read_cohort(preprocessed, PLANS, fold) for fold in range(5)]
    split = json.loads((preprocessed / "splits_final.json").read_text(encoding="utf-8"))
    assert {case for fold in split for case in fold["val"]} == {f"c{i}" for i in range(10)}
    assert all(not side.training.keys() & side.validation.keys() for side in sides)


def test_without_any_segmentation_the_classes_are_spread_over_the_folds(preprocessed):
    shutil.rmtree(preprocessed / "fullres")
    sides = [read_cohort(preprocessed, PLANS, fold) for fold in range(5)]
    assert sorted(case for side in sides for case in side.validation) == sorted(f"c{i}" for i in range(12) if i != 9)
    for side in sides:
        assert set(side.validation.values()) == {0, 1} and not side.training.keys() & side.validation.keys()


@pytest.mark.parametrize("grid, k, warned", [((40, 48, 64), 1, 0), ((40, 48, 64), 2, 1), ((40, 48, 72), 1, 1)])
def test_whole_bodies_of_another_size_than_in_pretraining_are_pointed_out(grid, k, warned, tmp_path):
    """The artefact saw every slice of a grid of 40 x 48 x 64."""
    artefact = str(write_artefact(tmp_path / "artefact"))
    settings = Settings(preset="vit_tiny", token_patch=(4, 8, 8), wholebody=WholeBody(grid, (16, 48, 64), k))
    block = json.loads(json.dumps(replace(settings, pretrained=artefact).to_json()))
    warnings = other_bodies({"fratmae": block})
    assert len(warnings) == warned and all(f"plans have coronal slices of a grid of {grid}" in w for w in warnings)
    block["finetune"]["from_scratch"] = True
    assert other_bodies({"fratmae": block}) == []


def test_pretraining_leaves_out_who_will_validate_the_staging(preprocessed):
    """Without a segmentation nnU-Net has no folds, and the first command that needs them makes them."""
    shutil.rmtree(preprocessed / "fullres")
    left_out = _left_out(preprocessed, PLANS, 1)
    assert left_out and left_out == read_cohort(preprocessed, PLANS, 1).validation.keys()
    (preprocessed / "splits_final.json").unlink()
    (preprocessed / "clinical.csv").unlink()
    assert _left_out(preprocessed, PLANS, 1) == set(), "nothing to segment, nothing to classify: for pretraining only"


@pytest.mark.parametrize("segmented", [True, False])
def test_no_patient_trains_who_validates(segmented, preprocessed):
    """Two studies a patient, the second without a segmentation or all without one."""
    if not segmented:
        shutil.rmtree(preprocessed / "fullres")
    else:
        for i in range(6, 10):
            (preprocessed / "fullres" / f"c{i}.b2nd").unlink()
    rows = [f"c{i},{'I' if i % 3 else 'IV'},p{i % 6}" for i in range(12)]
    clinical(preprocessed, "\n".join(["case_id,stage,patient", *rows]))
    for fold in range(5):
        cohort = read_cohort(preprocessed, PLANS, fold)
        of = [{int(case[1:]) % 6 for case in side} for side in (cohort.training, cohort.validation)]
        assert of[1] and not of[0] & of[1] and len(of[0] | of[1]) == 6
        told = [note for note in cohort.notes if note.endswith("of patients who validate do not train in this fold")]
        assert len(told) == segmented


def test_a_store_that_is_not_on_the_grid_is_refused(tmp_path):
    """As nnUNetv2_preprocess writes it: its corner would be read for the study."""
    for name, shape in (("a", (2, 6, 7, 8)), ("b", (2, 6, 8, 7))):
        blosc2.asarray(np.zeros(shape, np.float16), urlpath=str(tmp_path / f"{name}.b2nd"))
    dataset_json = {"channel_names": {"0": "CT", "1": "PET"}}
    assert list_studies(tmp_path, {"a": 1}, dataset_json, (6, 7, 8))[0][1] == 1
    with pytest.raises(UserError, match="b.b2nd: has 6 x 8 x 7 voxels, the plans' wholebody.grid is 6 x 7 x 8"):
        list_studies(tmp_path, {"a": 1, "b": 0}, dataset_json, [6, 7, 8])


def test_fold_all_trains_and_validates_on_all(preprocessed):
    cohort = read_cohort(preprocessed, PLANS, "all")
    assert cohort.training == cohort.validation and len(cohort.training) == 11


# --------------------------------------------------------------------------------------------------------- the network


def test_plans_alone_describe_the_network():
    plans = json.loads(json.dumps(staging_plans(PLANS, ["early", "advanced"])))
    assert "architecture" not in PLANS["configurations"]["wholebody"], "the argument is not changed"
    config = plans["configurations"]["wholebody"]
    assert (config["patch_size"], config["batch_size"]) == ([16, 48, 64], 2)
    architecture = config["architecture"]
    network = get_network_from_plans(NETWORK, architecture["arch_kwargs"], [], 2, 5, deep_supervision=False)
    assert network.classes == ["early", "advanced"]
    assert network(torch.zeros(1, 2, 16, 48, 64)).shape == (1, 2)
    with pytest.raises(UserError, match="use -p FratMAEPlans"):
        staging_plans(PLANS | {"transpose_forward": [0, 1, 2]}, ["a", "b"])


def test_every_parameter_learns():
    network = FratMAEStaging(2, 7, **SMALL, classes=["a", "b", "c"])
    logits = network(torch.randn(2, 2, *PATCH))
    assert logits.shape == (2, 3)
    nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_features_are_cls_mean_and_largest_of_four_layers_of_both_encoders():
    network = FratMAEStaging(2, 2, **SMALL, classes=["a", "b"]).eval()
    seen = []
    network.head["seg_layers"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    image = torch.randn(3, 2, *PATCH)
    network(image)
    assert seen[0].shape == (3, 4, 6 * 24)
    for number, name in enumerate(("CT", "PET")):
        encoder = network.encoders[name]
        x = encoder.embed(image[:, number : number + 1])
        for layer, block in enumerate(encoder.blocks):
            x = block(x)
            tokens = encoder.norm(x) if layer == 3 else x
            mean = sum(tokens[:, i] for i in range(1, 25)) / 24
            largest = torch.stack([tokens[:, i] for i in range(1, 25)]).max(0).values
            part = seen[0][:, layer, 72 * number : 72 * (number + 1)]
            torch.testing.assert_close(part, torch.cat([tokens[:, 0], mean, largest], 1), atol=1e-5, rtol=1e-4)


def test_summaries_leave_the_cls_token_out_of_mean_and_largest():
    tokens = torch.zeros(1, 3, 2)
    tokens[0, 0], tokens[0, 1:] = 5.0, torch.tensor([[1.0, 4.0], [3.0, 2.0]])
    assert summarise([tokens]).tolist() == [[[5.0, 5.0, 2.0, 3.0, 3.0, 4.0]]]


def test_all_that_is_not_pretrained_is_skipped_by_stock_pretrained_weights():
    names = FratMAEStaging(2, 2, **SMALL, classes=["a", "b"]).state_dict()
    others = [name for name in names if ".seg_layers." not in name]
    assert others and all(name.startswith(("encoders.CT.", "encoders.PET.")) for name in others)


# ------------------------------------------------------------------------------------------------------- what it learns


def test_weights_of_rare_classes_are_there_even_if_a_step_has_one_class():
    weights = class_weights([0, 0, 0, 2], 3)
    assert weights.tolist() == pytest.approx([2 / 3, 0, 2])
    logits = torch.randn(4, 3)
    loss = WeightedCrossEntropy(weights)
    for labels in ([2, 2, 2, 2], [0, 2, 0, 0]):
        logs = [-np.log(np.exp(row[y]) / np.exp(row).sum()) for row, y in zip(logits.numpy(), labels, strict=True)]
        expected = np.mean([weights[y].item() * value for y, value in zip(labels, logs, strict=True)])
        assert float(loss(logits, torch.tensor(labels))) == pytest.approx(expected, rel=1e-5)
    assert float(WeightedCrossEntropy(None)(logits, torch.zeros(4, dtype=torch.long))) > 0


def studies(folder: Path) -> list:
    """One study whose CT counts coronal slices and whose PET is warmer on one side."""
    volume = np.empty((2, 12, 24, 32), np.float16)
    volume[0], volume[1] = np.arange(12)[:, None, None] + 1, np.arange(24)[:, None] + 1
    blosc2.asarray(volume, urlpath=str(folder / "a.b2nd"), mode="w")
    return [(Study(folder / "a.b2nd", "a", (0, 1)), 1)]


def test_validation_takes_the_central_patch_as_it_is(tmp_path):
    whole = WholeBody((12, 24, 32), (3, 24, 32), 2)
    assert central_window(whole) == (slice(3, 8, 2), slice(0, 24, 1), slice(0, 32, 1))
    sample = StagingStudies(studies(tmp_path), whole)[(5, 0)]
    assert sample["target"] == 1 and sample["data"].shape == (2, 3, 24, 32)
    assert sample["data"][0, :, 0, 0].tolist() == [4, 6, 8]


def test_training_varies_phase_side_and_scale_and_repeats_itself(tmp_path):
    whole = WholeBody((12, 24, 32), (3, 24, 32), 2)
    data = StagingStudies(studies(tmp_path), whole, Pretrain(ct_shift=0), seed=3)
    samples = [data[(epoch, 0)]["data"] for epoch in range(30)]
    torch.testing.assert_close(samples[7], data[(7, 0)]["data"])
    assert {tuple(s[0, :, 0, 0].tolist()) for s in samples} == {(4, 6, 8), (5, 7, 9)}, "central, either phase"
    mirrored = [bool(s[1, 0, 0, 0] > s[1, 0, -1, 0]) for s in samples]
    assert 5 < sum(mirrored) < 25
    factors = np.log([float(s[1, 0].max() / 24) for s in samples])
    assert 0.05 < factors.std() < 0.2


# --------------------------------------------------------------------------------------------------------- the metrics


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 25), st.integers(2, 4), st.integers(0, 10**6), st.booleans())
def test_metrics_match_references(n, k, seed, coarse):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    p = rng.dirichlet(np.ones(k), n)
    if coarse:  # ties and probabilities on the bins' edges
        p = np.eye(k)[rng.integers(0, k, n)] * 0.8 + 0.2 / k
    found = stage_metrics(labels, p, [f"k{i}" for i in range(k)])
    json.dumps(found, allow_nan=False)
    guess = [max(range(k), key=lambda c: row[c]) for row in p]
    assert found["accuracy"] == pytest.approx(sum(g == y for g, y in zip(guess, labels, strict=True)) / n)
    rates = [np.mean([g == c for g, y in zip(guess, labels, strict=True) if y == c]) for c in sorted(set(labels))]
    assert found["macro_sensitivity"] == pytest.approx(np.mean(rates))
    assert sum(map(sum, found["confusion"])) == n
    brier = sum(sum((row[c] - (y == c)) ** 2 for c in range(k)) for row, y in zip(p, labels, strict=True)) / n
    assert found["brier"] == pytest.approx(brier)
    ece = 0.0
    for b in range(10):
        inside = [i for i in range(n) if b / 10 < max(p[i]) <= (b + 1) / 10]
        if inside:
            gap = np.mean([guess[i] == labels[i] for i in inside]) - np.mean([max(p[i]) for i in inside])
            ece += len(inside) / n * abs(gap)
    assert found["ece"] == pytest.approx(ece)
    areas = []
    for c in sorted(set(labels)) if k > 2 else [1]:
        pairs = [(p[i, c], p[j, c]) for i in range(n) for j in range(n) if labels[i] == c and labels[j] != c]
        areas += [np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs])] if pairs else []
    assert found["auc"] == (pytest.approx(np.mean(areas)) if areas else None)


def test_a_class_without_cases_is_left_out_of_the_means():
    found = stage_metrics([0, 0, 2], np.array([[0.9, 0.1, 0], [0.4, 0.6, 0], [0, 0.1, 0.9]]), ["a", "b", "c"])
    assert found["sensitivity"] == {"a": 0.5, "b": None, "c": 1.0} and found["macro_sensitivity"] == 0.75
    assert stage_metrics([1], np.array([[0.2, 0.8]]), ["a", "b"])["auc"] is None


# -------------------------------------------------------------------------------------------------------- the trainer


def untrained(losses, epoch, patience, epochs=100):
    class Logger:
        def get_value(self, name, step):
            return {"val_losses": losses}[name]

    trainer = FratMAEStagingTrainer.__new__(FratMAEStagingTrainer)
    trainer.logger, trainer.current_epoch, trainer.patience, trainer.num_epochs = Logger(), epoch, patience, epochs
    return trainer


def test_training_ends_when_the_validation_no_longer_falls():
    assert not untrained([], 0, 2).is_finished()
    assert not untrained([3, 2, 2.5], 3, 2).is_finished()
    assert untrained([3, 2, 2.5, 2.1], 4, 2).is_finished()
    assert not untrained([3, 2, 2.5, 2.1], 4, None).is_finished()
    assert untrained([3, 2], 2, 5, epochs=2).is_finished()


def test_more_than_one_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="-num_gpus: .* train the folds side by side"):
        FratMAEStagingTrainer({}, "wholebody", 0, {})


TRAIN = "nnUNetv2_train 7 wholebody 0 -tr FratMAEStagingTrainer -p TracerPlans -device cpu"


@pytest.fixture(scope="module")
def tracer_plans(phantoms) -> Path:
    """Plans of their own for the phantoms, since six of them have no advanced stage: which tracer was it?"""
    folder = phantoms.preprocessed / "Dataset007_Phantom"
    plans = json.loads((folder / "FratMAEPlans.json").read_text(encoding="utf-8"))
    plans["plans_name"] = "TracerPlans"
    plans["fratmae"]["staging"] |= {"target": "tracer", "epochs": 3, "workers": 0, "learning_rate": 1e-3}
    (folder / "TracerPlans.json").write_text(json.dumps(plans), encoding="utf-8")
    return folder / "TracerPlans.json"


@pytest.fixture(scope="module")
def trained(phantoms, pretraining, tracer_plans) -> tuple[Path, str]:
    output = phantoms.run(TRAIN, FRATMAE_PRETRAINED=str(pretraining))
    return phantoms.results / "Dataset007_Phantom" / "FratMAEStagingTrainer__TracerPlans__wholebody", output


def test_stock_training_starts_from_the_artefact_and_says_how_good_it_is(trained):
    model, output = trained
    assert "PET encoder: 53 tensors loaded, 0 missing, 0 left over" in output
    assert "are kept" in output and "Validation of 2 cases: accuracy" in output
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text(encoding="utf-8"))
    assert summary["chosen_on_these_cases"] and not summary["trained_on_these_cases"]
    assert summary["target"] == "tracer" and summary["cases"] == len(summary["metric_per_case"]) == 2
    assert {"accuracy", "macro_sensitivity", "auc", "ece", "brier"} <= summary["mean"].keys()
    names = {path.name for path in (model / "fold_0").iterdir()}
    assert {"checkpoint_best.pth", "checkpoint_final.pth", "progress.png"} <= names
    assert "checkpoint_latest.pth" not in names
    assert {"plans.json", "dataset.json", "dataset_fingerprint.json"} <= {path.name for path in model.iterdir()}


def test_a_study_that_cannot_be_read_does_not_stop_the_others(trained, phantoms, tmp_path):
    shutil.copytree(phantoms.raw / "Dataset008_Phantom" / "imagesTr", tmp_path / "in")
    (tmp_path / "in" / "phantom_000_0001.nii.gz").write_bytes(b"cut off")
    output = phantoms.run(f"fratmae_predict_stage -i {tmp_path}/in -o {tmp_path}/out -m {trained[0]} -device cpu "
                          "--no_pictures", expect=1)  # fmt: skip
    assert "error: 1 of 2 studies are not in stages.csv, the first because of case phantom_000: " in output
    with (tmp_path / "out" / "stages.csv").open(encoding="utf-8") as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["phantom_001"]


def test_studies_that_cannot_be_are_one_line_each(trained, phantoms, tmp_path):
    """Eight ways in which a study is none; the one that is right is classified, and the exit code is 1."""
    folder = tmp_path / "in"
    folder.mkdir()
    ct, pet = (sitk.ReadImage(phantoms.raw / "Dataset008_Phantom" / "imagesTr" / f"phantom_000_000{i}.nii.gz")
               for i in (0, 1))  # fmt: skip
    ct = sitk.Cast(ct, sitk.sitkFloat32)
    moved = sitk.Image(ct)
    moved.SetOrigin(np.add(ct.GetOrigin(), (0, 30, 0)).tolist())
    hole = sitk.GetArrayFromImage(pet)
    hole[3:5] = np.nan
    hole = sitk.GetImageFromArray(hole)
    hole.CopyInformation(pet)
    studies = {
        "air": (ct * 0 - 1024, pet, "CT shows no body"), "bqml": (ct, pet * 4000, "Bq/ml"),
        "moved": (moved, pet, "not on one grid"), "nan": (ct, hole, "NaN"), "right": (ct, pet, ""),
        "slice": (ct[:, :, 9:10], pet[:, :, 9:10], "a single slice"), "swapped": (pet, ct, "is this the PET"),
        "time": (ct, sitk.JoinSeries([pet, pet]), "is 4D"), "zero": (ct, pet * 0, "zero everywhere"),
    }  # fmt: skip
    for case, (*images, _) in studies.items():
        for channel, image in enumerate(images):
            sitk.WriteImage(image, folder / f"{case}_000{channel}.nii.gz")
    output = phantoms.run(f"fratmae_predict_stage -i {folder} -o {tmp_path}/out -m {trained[0]} -device cpu "
                          "--no_pictures", expect=1)  # fmt: skip
    lines = [line for line in output.splitlines() if "refused: case" in line]
    wrong = {case: said for case, (*_, said) in studies.items() if said}
    assert len(lines) == len(wrong)
    for line, (case, said) in zip(lines, wrong.items(), strict=True):
        assert f"refused: case {case}: " in line and said in line
    assert "error: 8 of 9 studies are not in stages.csv" in output and "Traceback" not in output
    with (tmp_path / "out" / "stages.csv").open(encoding="utf-8") as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["right"]


def test_a_moved_model_predicts_what_it_validated_however_images_lie(trained, phantoms, tmp_path):
    """No variable of nnU-Net, a study of the validation in four orientations, and the same answer to each."""
    model, _ = trained
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text(encoding="utf-8"))
    case = summary["metric_per_case"][0]
    shutil.move(model / "fold_0" / "validation", tmp_path / "validation")
    shutil.copytree(model, tmp_path / "moved")
    store_in_all_orientations(phantoms.raw / "Dataset007_Phantom" / "imagesTr", case["case"], tmp_path / "in")
    elsewhere = {f"nnUNet_{name}": "" for name in ("raw", "preprocessed", "results")}
    phantoms.run(f"fratmae_predict_stage -i {tmp_path}/in -o {tmp_path}/out -m {tmp_path}/moved -f 0 -device cpu",
                 **elsewhere)  # fmt: skip
    with (tmp_path / "out" / "stages.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["axes_permuted", "identity", "x_and_z_flipped", "y_flipped"]
    for row in rows:
        assert row["predicted"] == case["predicted"]
        for name, probability in case["probabilities"].items():
            assert float(row[f"p_{name}"]) == pytest.approx(probability, abs=2e-4)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"stages.csv", *(f"{row['case']}.png" for row in rows)}


@pytest.fixture
def in_process(phantoms, tracer_plans, monkeypatch, tmp_path):
    """Makes trainers of the phantoms with results of their own."""
    for name, value in phantoms.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("FRATMAE_PRETRAINED", raising=False)
    folder = phantoms.preprocessed / "Dataset007_Phantom"

    def make(results: str, **staging) -> FratMAEStagingTrainer:
        (tmp_path / results).mkdir(exist_ok=True)
        monkeypatch.setenv("nnUNet_results", str(tmp_path / results))
        plans = json.loads(tracer_plans.read_text(encoding="utf-8"))
        plans["fratmae"]["staging"] |= staging
        dataset_json = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        trainer = FratMAEStagingTrainer(plans, "wholebody", 0, dataset_json, torch.device("cpu"))
        trainer.save_every = 1
        return trainer

    return make


def test_a_resumed_training_repeats_the_interrupted_one(in_process):
    whole = in_process("whole", patience=None)
    whole.run_training()
    cut = in_process("cut", patience=None)
    cut.num_epochs, steps = 3, []
    cut.on_train_end = lambda: None
    cut.is_finished = lambda: len(steps) == 2 or steps.append(1)
    cut.run_training()
    resumed = in_process("cut", patience=None)
    resumed.load_checkpoint(f"{resumed.output_folder}/checkpoint_latest.pth")
    assert resumed.current_epoch == 2
    resumed.run_training()
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], value, rtol=0, atol=1e-6)
    assert resumed.logger.get_value("val_losses", None) == pytest.approx(whole.logger.get_value("val_losses", None))


def test_early_stopping_keeps_the_best_weights_and_going_on_does_not_train_further(in_process):
    trainer = in_process("stop", patience=1, epochs=50, learning_rate=3e-3)
    trainer.run_training()
    losses = trainer.logger.get_value("val_losses", None)
    assert len(losses) < 50 and int(np.argmin(losses)) == len(losses) - 2
    assert trainer.predict(trainer._validation_loader())["loss"] == pytest.approx(min(losses), abs=1e-5)
    again = in_process("stop", patience=1, epochs=50, learning_rate=3e-3)
    again.load_checkpoint(f"{again.output_folder}/checkpoint_final.pth")
    assert again.is_finished()
    again.run_training()
    assert len(again.logger.get_value("val_losses", None)) == len(losses)


@pytest.mark.parametrize(
    "configuration, plans, says",
    [("3d_fullres", "FratMAEPlans", "staging reads the whole-body grid"), ("wholebody", "FratMAEPlans", "has risk")],
)
def test_errors_of_the_trainer_are_one_line(configuration, plans, says, phantoms, in_process):
    folder = phantoms.preprocessed / "Dataset007_Phantom"
    contents = [json.loads((folder / name).read_text(encoding="utf-8")) for name in (f"{plans}.json", "dataset.json")]
    with pytest.raises(UserError) as error:
        FratMAEStagingTrainer(contents[0], configuration, 0, contents[1], torch.device("cpu"))
    assert "\n" not in str(error.value)
    assert says in str(error.value) or "1 class" in str(error.value)
    assert not list(phantoms.results.glob(f"*/FratMAEStagingTrainer__{plans}__*"))


# ------------------------------------------------------------------------------------------------------- the prediction


class WarmColumn(nn.Module):
    """Class 1 if the PET of token column (w, d) = (1, 2) is warm, with `sharpness`."""

    classes = ["cold", "warm"]

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def forward(self, x):
        warmth = x[:, 1, :, 8:16, 16:24].mean((1, 2, 3)) - 0.5
        return torch.stack([-self.sharpness * warmth, self.sharpness * warmth], 1)


def test_probabilities_are_the_mean_over_folds():
    patch = torch.ones(2, *PATCH)
    networks = [WarmColumn(1.0), WarmColumn(4.0)]
    expected = np.mean([1 / (1 + np.exp(-2 * s * 0.5)) for s in (1.0, 4.0)])
    assert predict_stage.ensemble(networks, patch)[1] == pytest.approx(expected)
    assert predict_stage.ensemble(networks, torch.stack([patch] * 3)).shape == (3, 2)


def test_occlusion_finds_the_column_that_carried_the_decision():
    patch = torch.ones(2, *PATCH)
    patch[..., :8, :8] = 0  # an empty column is not tried
    assert len(list(predict_stage.occlude(patch, TOKEN))) == 3 * 4 - 1
    fall = predict_stage.fall_by_occlusion([WarmColumn(2.0)], patch, TOKEN)
    assert fall.shape == (3, 4) and np.unravel_index(fall.argmax(), fall.shape) == (1, 2)
    whole, without = 1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))
    assert fall[1, 2] == pytest.approx(whole - without, abs=1e-6)
    fall[1, 2] = 0
    assert np.abs(fall).max() < 1e-6


def test_the_picture_has_the_patient_upright_with_his_right_on_the_left():
    """H, W, D run to anterior, right and head; pictures want z, y, x to head, posterior and left."""
    volume = np.zeros((4, 5, 6))
    volume[3, 4, 5] = 1  # front, right, head
    turned = predict_stage.zyx_array(volume)
    assert turned.shape == (6, 4, 5) and turned[5, 0, 0] == 1
    plans = {"transpose_forward": [1, 2, 0], "fratmae": Settings(
        token_patch=(8, 16, 16), wholebody=WholeBody((32, 48, 64), (16, 48, 64), 2)).to_json()}  # fmt: skip
    properties = {"spacing": [3.0, 2.0, 1.5], "shape_after_cropping_and_before_resampling": (320, 240, 128)}
    assert predict_stage.voxel_size(plans, properties) == pytest.approx([3.0 * 128 / 64, 2 * 2.0 * 10, 1.5 * 5])


def test_models_and_images_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(UserError, match="plans.json or dataset.json cannot be read"):
        predict_stage.read_model(tmp_path)
    description = {"channel_names": {"0": "CT", "1": "CT"}, "file_ending": ".nii.gz"}
    (tmp_path / "plans.json").write_text(json.dumps(stock_plans()), encoding="utf-8")
    (tmp_path / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(UserError, match="has no classifier"):
        predict_stage.read_model(tmp_path)
    with pytest.raises(UserError, match="no fold_X/checkpoint_final.pth"):
        predict_stage.find_checkpoints(tmp_path, None, "checkpoint_final.pth")
    for fold in ("0", "3", "all"):
        (tmp_path / f"fold_{fold}").mkdir()
        (tmp_path / f"fold_{fold}" / "checkpoint_final.pth").write_bytes(b"no weights")
    found = predict_stage.find_checkpoints(tmp_path, None, "checkpoint_final.pth")
    assert [path.parent.name for path in found] == ["fold_0", "fold_3"]
    with pytest.raises(UserError, match="-f 1: .*fold_1/checkpoint_final.pth is not there"):
        predict_stage.find_checkpoints(tmp_path, ["0", "1"], "checkpoint_final.pth")
    plans = staging_plans(PLANS, ["a", "b"])
    with pytest.raises(UserError, match="cannot be read as weights"):
        predict_stage.load_network(plans, description, found[0])
    with pytest.raises(UserError, match="no images CASE_0000.nii.gz"):
        predict_stage.find_studies(tmp_path / "nowhere", description)
    sitk.WriteImage(sitk.Image(2, 3, 4, sitk.sitkFloat32), str(tmp_path / "a_0001.nii.gz"))
    with pytest.raises(UserError, match="a_0000.nii.gz is not there; every case needs 2 images"):
        predict_stage.find_studies(tmp_path, description)
