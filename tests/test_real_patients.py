"""The whole way on real patients by stock commands and stock plans (slow; needs ../shared/data).

python -m pytest -m slow tests/test_real_patients.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import SimpleITK as sitk

from tests.conftest import Workspace
from tests.orientations import least_agreement, store_in_all_orientations

STUDIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "sts_petct"
TRAIN, UNSEEN = ["STS_002", "STS_005", "STS_008", "STS_011", "STS_014"], "STS_026"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not STUDIES.is_dir(), reason="no shared data")]


@pytest.fixture(scope="module")
def patients(tmp_path_factory) -> Workspace:
    """Five patients planned by stock nnU-Net, pretrained on and trained on for a few minutes; a sixth as dataset 8."""
    workspace = Workspace(tmp_path_factory.mktemp("patients"))
    for dataset_id, cases in ((7, TRAIN), (8, [UNSEEN])):
        source = workspace.folder / f"studies{dataset_id}"
        for case in cases:
            shutil.copytree(STUDIES / case, source / case)
        workspace.run(f"fratmae_convert_pairs --keep-names -i {source} -d {dataset_id} -n Sarcoma --ct CTres.nii.gz "
                      "--pet SUV.nii.gz --seg SEG.nii.gz -np 2")  # fmt: skip
    workspace.run("fratmae_plan_and_preprocess -d 7 -preset vit_tiny -np 2")
    workspace.run(f"fratmae_pretrain -d 7 -m fratmae_notext -device cpu -o {workspace.folder}/pretraining "
                  "--set pretrain.epochs=2 pretrain.patches_per_case=4 pretrain.batch_size=4 "
                  "pretrain.workers=0")  # fmt: skip
    workspace.run("nnUNetv2_plan_and_preprocess -d 7 -c 3d_fullres -np 2 --verify_dataset_integrity")
    path = workspace.preprocessed / "Dataset007_Sarcoma" / "nnUNetPlans.json"
    finetune = {"epochs": 3, "iterations": 20, "val_iterations": 2, "batch_size": 2, "learning_rate": 1e-3}
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"fratmae": {"finetune": finetune}}), encoding="utf-8"
    )
    output = workspace.run("nnUNetv2_train 7 3d_fullres 0 -tr FratMAETrainer -device cpu",
                           FRATMAE_PRETRAINED=f"{workspace.folder}/pretraining")  # fmt: skip
    assert "0 missing, 0 left over" in output
    return workspace


def test_four_orientations_on_stock_plans(patients, tmp_path):
    images = patients.raw / "Dataset008_Sarcoma" / "imagesTr"
    store_in_all_orientations(images, UNSEEN, tmp_path / "in")
    patients.run(f"nnUNetv2_predict -d 7 -i {tmp_path}/in -o {tmp_path}/out -c 3d_fullres -f 0 -tr FratMAETrainer "
                 "-device cpu --save_probabilities")  # fmt: skip
    assert least_agreement(tmp_path / "in", tmp_path / "out") >= 0.999


def test_moved_model_predicts_as_before(patients, tmp_path):
    images = patients.raw / "Dataset008_Sarcoma" / "imagesTr"
    patients.run(f"nnUNetv2_predict -d 7 -i {images} -o {tmp_path}/before -c 3d_fullres -f 0 -tr FratMAETrainer "
                 "-device cpu")  # fmt: skip
    (model,) = patients.results.glob("*/FratMAETrainer__nnUNetPlans__3d_fullres")
    moved = tmp_path / "elsewhere"
    shutil.copytree(model, moved)
    elsewhere = {f"nnUNet_{name}": "" for name in ("raw", "preprocessed", "results")}
    patients.run(f"nnUNetv2_predict_from_modelfolder -i {images} -o {tmp_path}/after -m {moved} -f 0 -device cpu",
                 **elsewhere)  # fmt: skip
    before, after = (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / when / f"{UNSEEN}.nii.gz")))
                     for when in ("before", "after"))  # fmt: skip
    assert before.any() and (before == after).all()
