"""Stock nnU-Net commands, verbatim, on its own plans and on ours: train, go on, validate, predict, move the model."""

import json
import shutil

import blosc2
import pytest

from tests.conftest import Workspace
from tests.orientations import least_agreement, store_in_all_orientations

STOCK = "nnUNetv2_train 7 3d_fullres 0 -tr FratMAETrainer -device cpu"
OURS = "nnUNetv2_train 7 3d_fullres 0 -tr FratMAETrainer -p FratMAEPlans -device cpu"


def results(workspace: Workspace, plans: str):
    return workspace.results / "Dataset007_Phantom" / f"FratMAETrainer__{plans}__3d_fullres"


@pytest.fixture(scope="module")
def trained_on_ours(phantoms, pretraining) -> str:
    return phantoms.run(OURS, FRATMAE_PRETRAINED=str(pretraining))


@pytest.fixture(scope="module")
def trained_on_stock_plans(phantoms, pretraining) -> str:
    """Stock planning, untouched but for a short training."""
    phantoms.run("nnUNetv2_plan_and_preprocess -d 7 -c 3d_fullres -np 2 --verify_dataset_integrity")
    path = phantoms.preprocessed / "Dataset007_Phantom" / "nnUNetPlans.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    finetune = {"epochs": 1, "iterations": 2, "val_iterations": 1, "batch_size": 2, "patch": [16, 32, 48]}
    path.write_text(json.dumps(plans | {"fratmae": {"finetune": finetune}}), encoding="utf-8")
    return phantoms.run(STOCK, FRATMAE_PRETRAINED=str(pretraining))


def test_log_says_what_was_loaded(trained_on_ours):
    assert "CT encoder: 53 tensors loaded, 0 missing, 0 left over" in trained_on_ours
    assert "PET encoder: 53 tensors loaded, 0 missing, 0 left over" in trained_on_ours
    assert "FROM SCRATCH" not in trained_on_ours


def test_stock_plans_follow_the_artefact_and_keep_their_axes(trained_on_stock_plans, phantoms):
    assert "0 missing, 0 left over" in trained_on_stock_plans
    plans = json.loads((results(phantoms, "nnUNetPlans") / "plans.json").read_text(encoding="utf-8"))
    config = plans["configurations"]["3d_fullres"]
    kwargs = config["architecture"]["arch_kwargs"]
    assert (kwargs["embed_dim"], kwargs["token_patch"], kwargs["patch_size"]) == (96, [8, 16, 16], [16, 32, 48])
    assert plans["transpose_forward"] == [0, 1, 2] and config["patch_size"] == [48, 16, 32]  # SI, AP, LR
    assert kwargs["scale"] != [1.0, 1.0], "stock normalisation is undone by the affine"


def test_from_scratch_is_said_loudly(phantoms):
    output = phantoms.run(OURS.replace(" 0 ", " 2 ") + " --disable_checkpointing")
    assert "NO pretrained encoders, training FROM SCRATCH" in output


def test_going_on_and_validating_need_no_artefact(trained_on_stock_plans, phantoms):
    """--val and --c restore the network of the checkpoint though the artefact is gone and the plans say ViT-B."""
    for flag in ("--val", "--c"):
        output = phantoms.run(f"{STOCK} {flag}", FRATMAE_PRETRAINED="/nowhere")
        assert "Mean Validation Dice" in output


@pytest.mark.parametrize("plans", ["nnUNetPlans", "FratMAEPlans"])
def test_orientation_of_the_file_does_not_matter(plans, phantoms, trained_on_ours, trained_on_stock_plans, tmp_path):
    """One study stored in four orientations: the same lesions at the same place in space."""
    images = phantoms.raw / "Dataset008_Phantom" / "imagesTr"
    store_in_all_orientations(images, "phantom_000", tmp_path / "in")
    phantoms.run(f"nnUNetv2_predict -d 7 -i {tmp_path}/in -o {tmp_path}/out -c 3d_fullres -f 0 -tr FratMAETrainer "
                 f"-p {plans} -device cpu --save_probabilities --disable_tta -npp 1 -nps 1")  # fmt: skip
    assert least_agreement(tmp_path / "in", tmp_path / "out") >= 0.999


def test_a_moved_model_predicts_without_our_variables(trained_on_stock_plans, phantoms, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(results(phantoms, "nnUNetPlans"), moved)
    images = phantoms.raw / "Dataset008_Phantom" / "imagesTr"
    elsewhere = {f"nnUNet_{name}": "" for name in ("raw", "preprocessed", "results")}
    phantoms.run(f"nnUNetv2_predict_from_modelfolder -i {images} -o {tmp_path}/out -m {moved} -f 0 -device cpu "
                 "--disable_tta -npp 1 -nps 1", **elsewhere)  # fmt: skip
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2


def test_plans_move_to_another_dataset(phantoms, pretraining):
    """nnU-Net's command, under another name: same block, same network; preprocessing and training work, fold all."""
    move = "nnUNetv2_move_plans_between_datasets -s 7 -t 8 -sp FratMAEPlans -tp MovedPlans"
    for command in ("nnUNetv2_extract_fingerprint -d 8 -np 1", "nnUNetv2_plan_experiment -d 8", move,
                    "nnUNetv2_preprocess -d 8 -plans_name MovedPlans -c 3d_fullres -np 1"):  # fmt: skip
        phantoms.run(command)
    source, moved = (json.loads((phantoms.preprocessed / path).read_text(encoding="utf-8"))
                     for path in ("Dataset007_Phantom/FratMAEPlans.json", "Dataset008_Phantom/MovedPlans.json"))
    assert moved["fratmae"] == source["fratmae"] and moved["fratmae_chosen"] == source["fratmae_chosen"]
    fullres = "3d_fullres"
    assert moved["configurations"][fullres]["architecture"] == source["configurations"][fullres]["architecture"]
    assert moved["configurations"]["wholebody"]["data_identifier"] == "MovedPlans_wholebody"
    output = phantoms.run(OURS.replace(" 7 ", " 8 ").replace(" 0 ", " all ").replace("FratMAEPlans", "MovedPlans"),
                          FRATMAE_PRETRAINED=str(pretraining))  # fmt: skip
    assert "53 tensors loaded" in output and "Mean Validation Dice" in output
    said = phantoms.run("fratmae_plan_and_preprocess -d 8 -plans_name MovedPlans -np 1")
    assert "MovedPlans.json" in said
    assert "nnUNetv2_train 8 3d_fullres all -tr FratMAETrainer -p MovedPlans" in said, "two cases are no five folds"
    assert (
        json.loads((phantoms.preprocessed / "Dataset008_Phantom/MovedPlans.json").read_text(encoding="utf-8")) == moved
    )
    store = phantoms.preprocessed / "Dataset008_Phantom" / "MovedPlans_wholebody"
    volumes = [blosc2.open(str(path)).shape for path in store.glob("*.b2nd") if not path.stem.endswith("_seg")]
    assert volumes == [(2, *moved["fratmae"]["wholebody"]["grid"])] * 2


def test_mirroring_at_test_time_is_left_right_only(trained_on_stock_plans, phantoms):
    import torch

    path = results(phantoms, "nnUNetPlans") / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    assert checkpoint["inference_allowed_mirroring_axes"] == (2,)  # SI, AP, LR


@pytest.mark.parametrize(
    "command, variables, says",
    [
        (STOCK.replace(" 0 ", " 1 "), {"FRATMAE_PRETRAINED": "/nowhere"}, "/nowhere"),
        (STOCK.replace("3d_fullres", "2d").replace(" 0 ", " 1 "), {}, "use 3d_fullres"),
    ],
)
def test_errors_of_the_trainer_are_one_line(command, variables, says, phantoms, trained_on_stock_plans):
    output = phantoms.run(command, expect=1, **variables)
    assert says in output.strip().splitlines()[-1] and "Traceback" not in output
    assert not list(phantoms.results.glob("*/*/fold_1"))


def test_unusable_artefacts_stop_the_training_in_one_line(phantoms, pretraining, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(pretraining, cut)
    weights = cut / "encoders.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000_000])
    other = tmp_path / "other"
    shutil.copytree(pretraining, other)
    contract = json.loads((other / "encoders.json").read_text(encoding="utf-8"))
    (other / "encoders.json").write_text(json.dumps(contract | {"architecture": "PlainConvUNet"}), encoding="utf-8")
    for artefact, says in ((cut, "damaged or cut off"), (other, "no FratMAE encoder pair")):
        output = phantoms.run(OURS.replace(" 0 ", " 1 "), expect=1, FRATMAE_PRETRAINED=str(artefact))
        assert says in output.strip().splitlines()[-1] and "Traceback" not in output
    assert not list(phantoms.results.glob("*/*/fold_1"))


def test_folds_of_one_model_share_one_network(trained_on_stock_plans, phantoms):
    """Fold 1 from scratch would be a ViT-B, and plans.json could no longer describe fold 0."""
    output = phantoms.run(STOCK.replace(" 0 ", " 1 "), expect=1)
    assert "fold_0 was trained with another architecture" in output.strip().splitlines()[-1]
    assert not list(phantoms.results.glob("*/*__nnUNetPlans__*/fold_1"))
