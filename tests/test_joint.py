"""The joint branch of FratMAETrainer: the loss and its gradients by hand, the stream of studies, stock commands."""

import csv
import itertools
import json
from pathlib import Path

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch.nn.parallel import DistributedDataParallel

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.joint import JointLoss, PatchesAndStudies, add_branch, endless
from nnunet_fratmae.networks.staging import FratMAEJoint, FratMAEStaging
from nnunet_fratmae.networks.vit import ViTEncoder
from nnunet_fratmae.predict_stage import read_model
from nnunet_fratmae.stage_data import WeightedCrossEntropy, class_weights
from nnunet_fratmae.trainer import FratMAETrainer
from plans.settings import Settings, override
from plans.views import Batches
from plans.vit_pair import JOINT_NETWORK, NETWORK
from tests.test_networks import PATCH, SMALL, TOKEN, small_network

STUDY = (12, 16, 40)  # another grid of tokens than that of PATCH, of another number
STAGES = {"patch_size": STUDY, "classes": ["a", "b", "c"], "dropout": 0.0}
KWARGS = {"patch_size": PATCH, "token_patch": TOKEN, **SMALL, "features": 4}


def joint_network(**kwargs) -> FratMAEJoint:
    torch.manual_seed(0)
    return FratMAEJoint(2, 2, **KWARGS, stages=STAGES, **kwargs)


# --------------------------------------------------------------------------------------------------------- the network


def test_the_segmentation_does_not_notice_the_classifier():
    """The same weights at the start, the same logits, all names of the plain network, and the rest is .seg_layers."""
    plain, joint = small_network(axes=(1, 2, 0)), joint_network(axes=(1, 2, 0)).eval()
    weights = joint.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(weights.pop(name), value), name
    assert weights and all(".seg_layers." in name for name in weights)
    image = torch.randn(2, 2, *(PATCH[(1, 2, 0).index(axis)] for axis in range(3)))
    assert torch.equal(joint(image), plain(image))
    logits, classes = joint((image, torch.randn(3, 2, *STUDY)))
    assert torch.equal(logits, plain(image)) and classes.shape == (3, 3)


def test_the_classifier_is_that_of_the_staging_network():
    """On another grid than the patches', whatever axes and units the plans have; its weights have the same names."""
    joint = joint_network(axes=(2, 0, 1), scale=(2.0, 3.0), shift=(1.0, -1.0)).eval()
    staging = FratMAEStaging(2, 2, STUDY, TOKEN, **SMALL, classes=STAGES["classes"]).eval()
    staging.load_state_dict({k: v for k, v in joint.state_dict().items() if not k.startswith("decoder.")})
    studies = torch.randn(2, 2, *STUDY)
    torch.testing.assert_close(joint.classify(studies), staging(studies))


def test_positions_of_another_grid_are_those_of_an_encoder_made_for_it():
    own, other = ViTEncoder(PATCH, TOKEN, **SMALL), ViTEncoder(STUDY, TOKEN, **SMALL)
    other.load_state_dict(own.state_dict())
    volume = torch.randn(1, 1, *STUDY)
    assert torch.equal(own.embed(volume, positions=other.positions), other.embed(volume))


def test_plans_alone_describe_the_network():
    kwargs = json.loads(json.dumps(KWARGS | {"stages": STAGES}))
    network = get_network_from_plans(JOINT_NETWORK, kwargs, [], 2, 2, deep_supervision=False)
    assert isinstance(network, FratMAEJoint) and network.classes == ["a", "b", "c"]


def test_ddp_and_compile_take_both_inputs_in_one_pass(tmp_path):
    """DDP complains in the second step if a parameter had no gradient in the first; one graph for both inputs."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = DistributedDataParallel(torch.compile(joint_network(), backend="eager", fullgraph=True))
        for _ in range(2):
            inputs = PatchesAndStudies(torch.randn(2, 2, *PATCH), torch.randn(1, 2, *STUDY)).to("cpu")
            logits, classes = network(inputs)
            (logits.square().mean() + classes.square().mean()).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad.abs().sum() > 0, name
        with torch.no_grad():
            assert network(torch.randn(1, 2, *PATCH)).shape == (1, 2, *PATCH)
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------ the loss


def test_loss_is_the_weighted_sum_and_that_of_the_segmentation_for_patches_alone():
    segmentation, weights = torch.nn.CrossEntropyLoss(), torch.tensor([0.5, 1.0, 2.0])
    loss = JointLoss(segmentation, WeightedCrossEntropy(weights), 0.3)
    logits, labels = torch.randn(2, 2, 3, 4, 5), torch.randint(0, 2, (2, 3, 4, 5))
    classes, stages = torch.randn(3, 3), torch.tensor([2, 0, 2])
    logs = [-torch.log(row.exp()[y] / row.exp().sum()) for row, y in zip(classes, stages, strict=True)]
    expected = sum(weights[y] * log for y, log in zip(stages, logs, strict=True)) / 3
    found = loss([logits, classes], [labels, stages])
    torch.testing.assert_close(found, segmentation(logits, labels) + 0.3 * expected)
    torch.testing.assert_close(loss.stage_loss, expected)
    assert torch.equal(loss(logits, labels), segmentation(logits, labels))


@pytest.mark.parametrize("samples, size, step", [(5, 2, 0), (5, 2, 7), (6, 3, 4), (2, 3, 5)])
def test_the_stream_of_studies_goes_on_where_it_was(samples, size, step):
    """A resumed training draws what the uninterrupted one would have, and every pass has every study."""
    whole = list(itertools.islice(endless(Batches(samples, size, size, 0, 1, 3), 0), step + 6))
    resumed = list(itertools.islice(endless(Batches(samples, size, size, 0, 1, 3), step), 6))
    assert whole[step:] == resumed
    steps = -(-samples // size)
    assert {index for batch in whole[:steps] for _, index in batch} == set(range(samples))


# --------------------------------------------------------------------------------------------------------- the trainer


@pytest.fixture(scope="module")
def joint_plans(phantoms) -> Path:
    """Plans of their own for the phantoms, since six of them have no advanced stage: which tracer was it?"""
    folder = phantoms.preprocessed / "Dataset007_Phantom"
    plans = json.loads((folder / "FratMAEPlans.json").read_text(encoding="utf-8"))
    plans["plans_name"] = "JointPlans"
    plans["fratmae"]["staging"] |= {"target": "tracer", "workers": 0}
    plans["fratmae"]["finetune"]["stage_weight"] = 0.5
    (folder / "JointPlans.json").write_text(json.dumps(plans), encoding="utf-8")
    return folder / "JointPlans.json"


@pytest.fixture
def make_trainer(phantoms, joint_plans, monkeypatch, tmp_path):
    for name, value in phantoms.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.delenv("FRATMAE_PRETRAINED", raising=False)
    dataset_json = json.loads((joint_plans.parent / "dataset.json").read_text(encoding="utf-8"))

    def make(plans: dict | None = None, **finetune) -> FratMAETrainer:
        plans = plans or json.loads(joint_plans.read_text(encoding="utf-8"))
        plans["fratmae"]["finetune"] |= finetune
        torch.manual_seed(0)
        return FratMAETrainer(plans, "3d_fullres", 0, dataset_json, torch.device("cpu"))

    return make


def batch(trainer: FratMAETrainer) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = trainer.configuration_manager.patch_size
    return {"data": torch.randn(2, 2, *shape, generator=generator),
            "target": torch.randint(0, 2, (2, 1, *shape), generator=generator).float()}  # fmt: skip


@pytest.mark.parametrize("freeze", [False, True])
def test_a_step_trains_all_that_is_to_learn_and_reports_both_losses(freeze, make_trainer, monkeypatch):
    trainer = make_trainer(freeze=freeze)
    trainer.initialize()
    trainer._start_branch()
    for module in trainer.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    studies = next(trainer.branch.stream)
    trainer.branch.stream = iter([studies])
    inputs, segmentation = batch(trainer), trainer.loss.segmentation
    with torch.no_grad():
        logits = trainer.network(inputs["data"])
        dice_ce = float(segmentation(logits, inputs["target"]))
        logs = trainer.network.classify(studies["data"]).log_softmax(1)
    weights = class_weights(list(trainer.branch.cohort.training.values()), 2)
    terms = [-weights[y] * log[y] for log, y in zip(logs, studies["target"], strict=True)]
    assert studies["data"].shape == (2, 2, *trainer.settings.wholebody.patch)
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    found = trainer.train_step(inputs)
    assert found["stage_loss"] == pytest.approx(float(sum(terms) / 2), rel=1e-5)
    assert found["loss"] == pytest.approx(dice_ce, rel=1e-5)
    for name, parameter in trainer.network.named_parameters():
        frozen = freeze and name.startswith("encoders.")
        assert (parameter.grad is None) == frozen and torch.equal(before[name], parameter) == frozen, name
        assert frozen or parameter.grad.abs().sum() > 0, name
    in_optimizer = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert in_optimizer == sum(p.requires_grad for p in trainer.network.parameters())


def test_the_encoders_learn_from_the_classes(make_trainer):
    """The gradient of a step is that of the segmentation plus the weight times that of the classes."""
    gradients = {}
    for weight in (0.5, 1.5):
        trainer = make_trainer(stage_weight=weight)
        trainer.initialize()
        trainer._start_branch()
        joined = trainer.branch.join(batch(trainer))
        trainer.network.eval()
        trainer.loss(trainer.network(joined["data"].to("cpu")), joined["target"]).backward()
        gradients[weight] = trainer.network.encoders["PET"].patch_embed.weight.grad
    of_classes = trainer.network.zero_grad() or trainer.loss.stage(
        trainer.network.classify(joined["data"].inputs[1]), joined["target"][1])  # fmt: skip
    of_classes.backward()
    torch.testing.assert_close(gradients[1.5] - gradients[0.5], trainer.network.encoders["PET"].patch_embed.weight.grad)


def test_weight_zero_is_the_plain_training(make_trainer, joint_plans):
    """No other network, plans or logs, and no label is asked for."""
    plain = make_trainer(stage_weight=0.0)
    plain.initialize()
    assert plain.plans_manager.plans["configurations"]["3d_fullres"]["architecture"] == (
        json.loads(joint_plans.read_text(encoding="utf-8"))["configurations"]["3d_fullres"]["architecture"]
    )
    assert type(plain.network).__name__ == NETWORK.split(".")[-1] and plain.branch is None
    assert plain.train_step(batch(plain)).keys() == {"loss"}
    plans = json.loads(joint_plans.read_text(encoding="utf-8"))
    plans["fratmae"]["finetune"]["stage_weight"] = 0.0
    assert add_branch(plans, "3d_fullres", 0) is plans


def test_a_resumed_training_has_all_weights_and_the_next_studies(make_trainer):
    first = make_trainer()
    first.initialize()
    first._start_branch()
    for _ in range(2):  # an epoch has 2 steps
        first.train_step(batch(first))
    path = f"{first.output_folder}/checkpoint_latest.pth"
    first.save_checkpoint(path)
    resumed = make_trainer()
    resumed.load_checkpoint(path)
    resumed._start_branch()
    for name, value in first.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value), name
    expected, found = next(first.branch.stream), next(resumed.branch.stream)
    assert torch.equal(expected["data"], found["data"]) and torch.equal(expected["target"], found["target"])
    for moments in (first.optimizer, resumed.optimizer):
        assert len(moments.state) == len(list(first.network.parameters()))


# ------------------------------------------------------------------------------------------------------------- commands

TRAIN = "nnUNetv2_train 7 3d_fullres 0 -tr FratMAETrainer -p JointPlans -device cpu"


@pytest.fixture(scope="module")
def trained(phantoms, pretraining, joint_plans) -> tuple[Path, str]:
    """Trained by the stock command from encoders_nnunet.pth, which has no weights of a classifier."""
    output = phantoms.run(f"{TRAIN} -pretrained_weights {pretraining}/encoders_nnunet.pth")
    return phantoms.results / "Dataset007_Phantom" / "FratMAETrainer__JointPlans__3d_fullres", output


def test_stock_training_validates_both(trained):
    model, output = trained
    assert "4 training cases: " in output and "val_stage_accuracy" in output and "train_stage_losses" in output
    assert "Mean Validation Dice" in output and "Classes: Validation of 2 cases: accuracy" in output
    assert (model / "fold_0" / "validation" / "summary.json").is_file()
    summary = json.loads((model / "fold_0" / "validation" / "stages.json").read_text(encoding="utf-8"))
    assert summary["target"] == "tracer" and summary["cases"] == len(summary["metric_per_case"]) == 2
    assert {"accuracy", "macro_sensitivity", "auc", "ece", "brier"} <= summary["mean"].keys()


def test_going_on_and_validating_work_and_the_latter_without_labels(trained, phantoms, joint_plans):
    assert "Mean Validation Dice" in phantoms.run(f"{TRAIN} --c")
    table = joint_plans.parent / "clinical.csv"
    aside = table.rename(table.with_name("aside.csv"))
    try:
        output = phantoms.run(f"{TRAIN} --val")
    finally:
        aside.rename(table)
    assert "Mean Validation Dice" in output and "WARNING: no validation/stages.json: " in output


def test_a_joint_model_segments_by_the_stock_command_and_classifies_by_ours(trained, phantoms, tmp_path):
    """Segmentations have the form of any other model's, and the classes are those of the validation."""
    model, _ = trained
    images = phantoms.raw / "Dataset008_Phantom" / "imagesTr"
    elsewhere = {f"nnUNet_{name}": "" for name in ("raw", "preprocessed", "results")}
    phantoms.run(f"nnUNetv2_predict_from_modelfolder -i {images} -o {tmp_path}/out -m {model} -f 0 -device cpu "
                 "--disable_tta -npp 1 -nps 1", **elsewhere)  # fmt: skip
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2
    case = json.loads((model / "fold_0" / "validation" / "stages.json").read_text(encoding="utf-8"))["metric_per_case"][
        0
    ]
    (tmp_path / "in").mkdir()
    for file in (phantoms.raw / "Dataset007_Phantom" / "imagesTr").glob(f"{case['case']}_*"):
        (tmp_path / "in" / file.name).symlink_to(file)
    phantoms.run(f"fratmae_predict_stage -i {tmp_path}/in -o {tmp_path}/stages -m {model} -device cpu --no_pictures",
                 **elsewhere)  # fmt: skip
    with (tmp_path / "stages" / "stages.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    for name, probability in case["probabilities"].items():
        assert float(row[f"p_{name}"]) == pytest.approx(probability, abs=2e-4)


# --------------------------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_trained_is_said_in_one_line_before_anything_is_written(make_trainer, joint_plans, tmp_path):
    def refused(change, says: str) -> None:
        plans = json.loads(joint_plans.read_text(encoding="utf-8"))
        change(plans)
        with pytest.raises(UserError, match=says) as error:
            make_trainer(plans)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "results").exists()

    refused(lambda plans: plans["configurations"].pop("wholebody"), "have no whole-body grid; use -p FratMAEPlans")
    refused(lambda plans: plans["fratmae"]["staging"].update(target="risk"), "stage_weight: .* has [01] class")
    refused(lambda plans: plans["fratmae"].update(modalities="CT"), "finetune.stage_weight needs CT and PET")
    table = joint_plans.parent / "clinical.csv"
    aside = table.rename(table.with_name("aside.csv"))
    try:
        refused(lambda plans: None, "clinical.csv is not there")
    finally:
        aside.rename(table)
    with pytest.raises(UserError, match="finetune.stage_weight must not be negative"):
        override(Settings(), ["finetune.stage_weight=-1"])


def test_a_model_without_a_classifier_cannot_predict_classes(joint_plans, tmp_path):
    for name in ("FratMAEPlans.json", "dataset.json"):
        (tmp_path / name.replace("FratMAEPlans", "plans")).write_text(
            (joint_plans.parent / name).read_text(encoding="utf-8"), encoding="utf-8"
        )
    with pytest.raises(UserError, match="has no classifier; give a model of FratMAEStagingTrainer"):
        read_model(tmp_path)


def test_labels_that_changed_their_classes_do_not_go_on(make_trainer, joint_plans):
    trainer = make_trainer()
    trainer.initialize()
    trainer.network.classes = ["x", "y"]
    with pytest.raises(UserError, match="this model has x, y; train anew"):
        trainer._start_branch()
