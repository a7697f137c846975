"""Planning and pretraining commands: what they write, and one clear line where the user went wrong."""

import json
import shutil
import sys

import numpy as np
import pytest
import SimpleITK as sitk

from plans import plan_and_preprocess
from pretraining import pretrain
from tests.conftest import SETTINGS


def call(main, arguments: str, monkeypatch, capsys) -> str:
    """Run a command in this process; it must fail with one line, which is returned."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code not in (0, None)
    message = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert "\n" not in message.strip()
    return message


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path


def make_raw(folders, channels=("CT", "CT")):
    raw = folders / "raw" / "Dataset003_Toy"
    raw.mkdir()
    content = {"channel_names": {str(i): c for i, c in enumerate(channels)}, "labels": {"background": 0, "lesion": 1},
               "numTraining": 0, "file_ending": ".nii.gz"}  # fmt: skip
    (raw / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return raw


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_planning_without_nnunet_variables(variable, folders, monkeypatch, capsys):
    make_raw(folders)
    monkeypatch.delenv(variable)
    assert variable in call(plan_and_preprocess.main, "-d 3", monkeypatch, capsys)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("-d 4", "no dataset with this ID"),
        ("-d 3", "no studies"),
        ("-d 3 -preset vit_x", "vit_tiny"),
        ("-d 3 --set pretrain.epoch=3", "pretrain.epochs"),
        ("-d 3 --set finetune.patch=[1,2]", "three whole numbers"),
    ],
)
def test_planning_says_what_is_wrong(arguments, says, folders, monkeypatch, capsys):
    make_raw(folders)
    assert says in call(plan_and_preprocess.main, arguments, monkeypatch, capsys)
    assert not any((folders / "preprocessed").iterdir())


def test_plans_that_are_there_take_no_settings(folders, monkeypatch, capsys):
    make_raw(folders)
    said = call(plan_and_preprocess.main, "-d 3 -plans_name Moved", monkeypatch, capsys)
    assert "-plans_name Moved: " in said and "Moved.json is not there" in said
    said = call(plan_and_preprocess.main, "-d 3 -plans_name Moved -preset vit_s", monkeypatch, capsys)
    assert "settings are for planning" in said


def test_the_plan_does_not_hang_on_how_images_lie(phantoms):
    """Phantoms stored along other axes, in a dataset that names no reader: nnU-Net's own would not turn them."""
    source, raw = phantoms.raw / "Dataset008_Phantom", phantoms.raw / "Dataset013_Permuted"
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
        for path in (source / name).iterdir():
            sitk.WriteImage(sitk.PermuteAxes(sitk.ReadImage(str(path)), [2, 0, 1]), str(raw / name / path.name))
    dataset_json = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    del dataset_json["overwrite_image_reader_writer"]
    (raw / "dataset.json").write_text(json.dumps(dataset_json), encoding="utf-8")
    sizes = [sitk.ReadImage(str(path)).GetSize() for path in (source / "labelsTr").iterdir()]  # x, y, z
    phantoms.run(f"fratmae_plan_and_preprocess -d 13 -preset vit_nano -np 1 --set {' '.join(SETTINGS)}")
    plans = json.loads(
        (phantoms.preprocessed / "Dataset013_Permuted" / "FratMAEPlans.json").read_text(encoding="utf-8")
    )
    fullres = plans["configurations"]["3d_fullres"]
    assert fullres["spacing"] == pytest.approx([11, 10, 12])  # AP, LR, SI
    assert fullres["median_image_size_in_voxels"] == [np.median([size[axis] for size in sizes]) for axis in (1, 0, 2)]
    for folder in (phantoms.raw, phantoms.preprocessed):
        shutil.rmtree(folder / "Dataset013_Permuted")


def test_what_is_not_planned_is_to_be_planned_first(folders, monkeypatch, capsys):
    assert "fratmae_plan_and_preprocess" in call(pretrain.main, "-d 3", monkeypatch, capsys)


def test_planning_refuses_other_channels(folders, monkeypatch, capsys):
    make_raw(folders, channels=("CT", "MR"))
    assert "dataset.json" in call(plan_and_preprocess.main, "-d 3", monkeypatch, capsys)


def test_pretraining_says_what_is_missing(folders, monkeypatch, capsys):
    (folders / "preprocessed" / "Dataset003_Toy").mkdir()
    assert "fratmae_plan_and_preprocess -d 3" in call(pretrain.main, "-d 3 -device cpu", monkeypatch, capsys)
    assert "no dataset" in call(pretrain.main, "-d 4 -device cpu", monkeypatch, capsys)
    monkeypatch.delenv("nnUNet_results")
    assert "nnUNet_results" in call(pretrain.main, "-d 3 -device cpu", monkeypatch, capsys)


def test_pretraining_of_the_phantoms(phantoms, pretraining):
    contract = json.loads((pretraining / "encoders.json").read_text(encoding="utf-8"))
    assert contract["datasets"] == [{"name": "Dataset007_Phantom", "cases": 6, "licence": None}]
    assert contract["token_patch"] == [8, 16, 16] and contract["grid"] == [32, 48, 64]
    names = {f.name for f in pretraining.iterdir()}
    assert {"progress.png", "reconstruction.png", "metrics.jsonl", "encoders_nnunet.pth"} <= names
    assert not [name for name in names if name.startswith(".partial")]


def test_unlabelled_studies_only(phantoms, folders, monkeypatch):
    """A dataset without a label is planned and pretrained; nnU-Net's planner could not."""
    source, raw = phantoms.raw / "Dataset008_Phantom", make_raw(folders)
    shutil.copytree(source / "imagesTr", raw / "imagesPt")
    shutil.copy(source / "dataset.json", raw)
    arguments = "-d 3 -np 1 -preset vit_tiny --set wholebody.grid=[16,32,48] token_patch=[8,16,16] pretrain.epochs=1"
    arguments += " pretrain.patches_per_case=1"
    monkeypatch.setattr(sys, "argv", ["plan", *arguments.split()])
    plan_and_preprocess.main()
    arguments = "-d 3 -m fratmae_notext -device cpu --set pretrain.workers=0"
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments.split()])
    pretrain.main()
    assert list((folders / "results").glob("Dataset003_Toy/FratMAEPretraining*/encoders.safetensors"))


def test_pretraining_of_axial_stacks_of_two_datasets(phantoms):
    """The second dataset is the first under another number; the axial sizes are chosen anew."""
    for folder in (phantoms.raw, phantoms.preprocessed):
        shutil.copytree(folder / "Dataset007_Phantom", folder / "Dataset012_Again")
    out = phantoms.folder / "axial"
    try:
        phantoms.run(f"fratmae_pretrain -d 7 12 -m mae --stack axial -device cpu -o {out} --set pretrain.epochs=1 "
                     "pretrain.workers=0 pretrain.dataset_weights=[1,3]")  # fmt: skip
    finally:
        for folder in (phantoms.raw, phantoms.preprocessed):
            shutil.rmtree(folder / "Dataset012_Again")
    contract = json.loads((out / "encoders.json").read_text(encoding="utf-8"))
    assert contract["stack"] == "axial" and contract["patch"][:2] == [32, 48] and contract["patch"][2] < 64
    assert [(d["name"], d["cases"]) for d in contract["datasets"]] == [
        ("Dataset007_Phantom", 6), ("Dataset012_Again", 6),
    ]  # fmt: skip


def test_the_fold_that_is_left_out_is_nnunets(phantoms):
    """-f leaves out exactly the cases that nnU-Net validates on; the split is nnU-Net's own."""
    out = phantoms.folder / "fold"
    output = phantoms.run(f"fratmae_pretrain -d 7 -m fratmae_notext -device cpu -f 0 -o {out} "
                          "--set pretrain.epochs=1 pretrain.workers=0")  # fmt: skip
    splits = json.loads(
        (phantoms.preprocessed / "Dataset007_Phantom" / "splits_final.json").read_text(encoding="utf-8")
    )
    assert len(splits) == 5
    contract = json.loads((out / "encoders.json").read_text(encoding="utf-8"))
    assert contract["datasets"][0]["cases"] == len(splits[0]["train"]) == 6 - len(splits[0]["val"])
    assert "cases to train" in output


def test_other_studies_of_a_patient_who_validates_are_left_out_as_well(phantoms):
    """Here all studies are of two patients, so that a fold leaves out all of one."""
    preprocessed = phantoms.preprocessed / "Dataset007_Phantom"
    splits, table = (preprocessed / name for name in ("splits_final.json", "clinical.csv"))
    kept = {path: path.read_text(encoding="utf-8") for path in (splits, table) if path.is_file()}
    ids = [f"phantom_{i:03d}" for i in range(6)]
    splits.write_text(json.dumps([{"train": ids[1:], "val": ids[:1]}]), encoding="utf-8")
    table.write_text(
        "\n".join(["case_id,patient", *(f"{case},p{i % 2}" for i, case in enumerate(ids))]), encoding="utf-8"
    )
    try:
        output = phantoms.run(f"fratmae_pretrain -d 7 -m fratmae_notext -device cpu -f 0 -o {phantoms.folder}/patients "
                              "--set pretrain.epochs=1 pretrain.workers=0 pretrain.held_out=0")  # fmt: skip
    finally:
        splits.unlink()
        for path, text in kept.items():
            path.write_text(text, encoding="utf-8")
    contract = json.loads((phantoms.folder / "patients" / "encoders.json").read_text(encoding="utf-8"))
    assert contract["datasets"][0]["cases"] == 3, output


def test_pretraining_wants_the_orientation_of_the_contract(phantoms):
    path = phantoms.preprocessed / "Dataset007_Phantom" / "FratMAEPlans.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(json.dumps(json.loads(text) | {"image_reader_writer": "SimpleITKIO"}), encoding="utf-8")
    try:
        output = phantoms.run(f"fratmae_pretrain -d 7 -device cpu -o {phantoms.folder}/turned", expect=1)
    finally:
        path.write_text(text, encoding="utf-8")
    assert "error: Dataset007_Phantom: SimpleITKIO does not look at the orientation of images" in output
    assert not (phantoms.folder / "turned").exists() and "Traceback" not in output
