"""What a dataset may have besides one lesion label: several labels, regions, an ignore label, further channels."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.trainer import FratMAETrainer
from plans.channels import channel_modalities, find_channels, find_modalities
from plans.extension import count_classes, extend_plans
from plans.settings import Finetune, Settings
from tests.conftest import Workspace
from tests.test_plans import stock_plans

ONE = {"background": 0, "lesion": 1}
SEVERAL = {"background": 0, "node": 1, "bone": 2, "spleen": 3}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "hot": 3}
IGNORE = {"background": 0, "lesion": 1, "ignore": 2}
REGIONS_IGNORE = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
SETS = {"one": ONE, "several": SEVERAL, "regions": REGIONS, "ignore": IGNORE, "regions and ignore": REGIONS_IGNORE}


def dataset(labels: dict, names: tuple[str, ...] = ("CT", "PET")) -> dict:
    foreground = [name for name in labels if name not in ("background", "ignore")]
    return {
        "channel_names": {str(i): name for i, name in enumerate(names)}, "labels": labels, "file_ending": ".nii.gz",
        "numTraining": 5, "regions_class_order": list(range(1, len(foreground) + 1)),
    }  # fmt: skip


@pytest.fixture
def make_trainer(preprocessed_toy):
    """A trainer on the CPU for a dataset.json, from plans as stock nnU-Net writes them, ready to train."""
    def make(dataset_json: dict, configuration: str = "3d_fullres", **config) -> FratMAETrainer:
        channels = len(dataset_json["channel_names"])
        plans = stock_plans((48, 16, 32)) | {"dataset_name": "Dataset007_T", "label_manager": "LabelManager"}
        properties = plans["foreground_intensity_properties_per_channel"]
        properties |= {str(i): properties["0"] for i in range(2, channels)}
        plans["configurations"]["3d_fullres"] |= {
            "data_identifier": "data", "spacing": [6.0, 4.0, 5.0], "batch_dice": True,
            "use_mask_for_norm": [False] * channels,
            "normalization_schemes": (["CTNormalization"] * 2 + ["NoNormalization"] * channels)[:channels],
        }  # fmt: skip
        if configuration != "3d_fullres":
            there = plans["configurations"].get(configuration, {})
            plans["configurations"][configuration] = {"inherits_from": "3d_fullres"} | there | config
        plans["fratmae"] = {"preset": "vit_tiny", "token_patch": [8, 16, 16], "finetune": {"batch_size": 2}}
        trainer = FratMAETrainer(plans, configuration, 0, dataset_json, torch.device("cpu"))
        trainer.initialize()
        return trainer

    return make


def batch(trainer: FratMAETrainer, values: list[int]) -> dict[str, torch.Tensor]:
    """As nnU-Net's loader hands it over, transforms included: regions are one channel each, ignored is another."""
    patch = tuple(trainer.configuration_manager.patch_size)
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor(values)[torch.randint(0, len(values), (2, 1, *patch), generator=generator)]
    manager = trainer.label_manager
    transforms = trainer.get_validation_transforms(
        None, is_cascaded=False, foreground_labels=manager.foreground_labels,
        regions=manager.foreground_regions if manager.has_regions else None, ignore_label=manager.ignore_label,
    )  # fmt: skip
    image = torch.randn(2, trainer.num_input_channels, *patch, generator=generator)
    cases = [transforms(image=x, segmentation=y.to(torch.int16)) for x, y in zip(image, labels, strict=True)]
    return {
        "data": torch.stack([c["image"] for c in cases]),
        "target": torch.stack([c["segmentation"] for c in cases]),
    }


def plain_values(labels: dict) -> list[int]:
    return sorted({int(v) for value in labels.values() for v in np.atleast_1d(value)})


@pytest.mark.parametrize("labels", SETS.values(), ids=SETS)
def test_trains_with_the_labels_of_the_dataset(labels, make_trainer):
    """As many outputs as nnU-Net's label manager wants, every parameter learns, the validation step scores each."""
    trainer = make_trainer(dataset(labels))
    heads = trainer.label_manager.num_segmentation_heads
    data = batch(trainer, plain_values(labels))
    with torch.no_grad():
        assert trainer.network(data["data"]).shape[1] == heads == count_classes({"labels": labels})
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    losses = [float(trainer.train_step(data)["loss"]) for _ in range(2)]
    assert np.isfinite(losses).all() and losses[1] < losses[0]
    assert not [name for name, p in trainer.network.named_parameters() if torch.equal(before[name], p)]
    scored = trainer.validation_step(data)
    foreground = heads if trainer.label_manager.has_regions else heads - 1
    assert len(scored["tp_hard"]) == foreground and np.isfinite(scored["loss"])


@pytest.mark.parametrize("labels", SETS.values(), ids=SETS)
def test_a_new_network_takes_one_voxel_in_a_hundred_for_each_lesion(labels, make_trainer):
    """Without what the features say: the probabilities are those of the biases."""
    trainer = make_trainer(dataset(labels))
    with torch.no_grad():
        trainer.bare_network().decoder["seg_layers"].head.weight.zero_()
        logits = trainer.network(torch.randn(1, 2, *trainer.configuration_manager.patch_size))[0]
    probabilities = trainer.label_manager.apply_inference_nonlin(logits)
    lesions = probabilities if trainer.label_manager.has_regions else probabilities[1:]
    assert torch.allclose(lesions, torch.tensor(0.01), rtol=0.03)


@pytest.mark.parametrize("labels", [IGNORE, REGIONS_IGNORE], ids=["labels", "regions"])
def test_what_is_ignored_has_no_weight(labels, make_trainer):
    """The loss does not change with what the network says where the label is "ignore"."""
    torch.manual_seed(0)
    trainer = make_trainer(dataset(labels))
    data = batch(trainer, plain_values(labels))
    ignored = data["target"][:, -1:] == (1 if trainer.label_manager.has_regions else labels["ignore"])
    assert 0.1 < ignored.float().mean() < 0.9
    with torch.no_grad():
        logits = trainer.network(data["data"])
        loss = trainer.loss(logits, data["target"])
        there = trainer.loss(torch.where(ignored, logits + torch.randn_like(logits), logits), data["target"])
        elsewhere = trainer.loss(torch.where(ignored, logits, logits + 3 * torch.randn_like(logits)), data["target"])
    torch.testing.assert_close(there, loss)
    assert abs(float(elsewhere - loss)) > 1e-3


values = st.lists(st.integers(1, 9), min_size=1, max_size=6, unique=True)


@hypothesis_settings(max_examples=60, deadline=None)
@given(values=values, data=st.data(), ignore=st.booleans())
def test_outputs_are_counted_as_nnunet_does(values, data, ignore):
    """Single values, lists of one and overlapping regions, with and without "ignore"."""
    labels = {"background": 0}
    for value in values:
        others = data.draw(st.lists(st.sampled_from(values), max_size=3, unique=True))
        labels[f"label {value}"] = data.draw(st.sampled_from([value, [value], sorted({value, *others})]))
    if ignore:
        labels["ignore"] = max(values) + 1
    regions = sum(name not in ("background", "ignore") for name in labels)
    order = list(range(1, regions + 1))
    assert count_classes({"labels": labels}) == LabelManager(labels, order).num_segmentation_heads


def test_regions_and_ignore_are_counted_by_the_planner():
    """A label more costs memory, "ignore" costs none, and the regions of three labels cost less than those labels."""
    sizes = Settings(finetune=Finetune(gpu_memory_target=20.0))

    def batch_size(labels: dict) -> int:
        plans, _ = extend_plans(stock_plans(), dataset(labels), sizes)
        return plans["configurations"]["3d_fullres"]["batch_size"]

    many = {"background": 0, **{f"organ {i}": i for i in range(1, 30)}}
    assert batch_size(IGNORE) == batch_size(ONE) > batch_size(many)
    assert batch_size(many | {"all": list(range(1, 30))}) == batch_size(many)  # 30 regions, or 29 labels and background


# --------------------------------------------------------------------------------------------------------- channels


@pytest.mark.parametrize(
    "names, declared, expected",
    [
        (["CT", "PET", "organs"], None, [0, 1]),
        (["noNorm", "PET", "CT"], None, [2, 1]),
        (["CT", "CT", "organs"], ["CT", "PET", "organs"], [0, 1]),
        (["zscore", "CT", "CT"], ["organs", "PET", "CT"], [2, 1]),
        (["CT", "CT", "noNorm", "noNorm"], ["PET", "CT", None, None], [1, 0]),
    ],
)
def test_further_channels_stand_beside_ct_and_pet(names, declared, expected):
    dataset_json = {"channel_names": dict(enumerate(names))}
    if declared:
        dataset_json["fratmae"] = {"modalities": declared}
    assert find_modalities(dataset_json) == expected
    assert len(channel_modalities(dataset_json)) == len(names)


@pytest.mark.parametrize(
    "names, declared",
    [
        (["CT", "noNorm"], None),  # the second may be a PET
        (["CT", "CT", "organs"], None),  # which CT is the PET?
        (["CT", "PET", "SUV"], None),
        (["CT", "CT", "CT"], ["CT", "PET"]),
        (["MR", "organs"], None),
        (["CT", "organs"], ["organs", "organs"]),
    ],
)
def test_channels_that_are_not_plain_are_refused(names, declared):
    dataset_json = {"channel_names": dict(enumerate(names))}
    if declared:
        dataset_json["fratmae"] = {"modalities": declared}
    with pytest.raises(UserError, match='"fratmae": {"modalities"') as error:
        find_channels(dataset_json)
    assert "\n" not in str(error.value)


def test_a_third_channel_is_said_and_not_seen(make_trainer):
    """One line in the log; the logits do not change with it, and nnU-Net's loader may hand it over as it is."""
    trainer = make_trainer(dataset(ONE, ("CT", "PET", "organs")))
    assert (
        "channel 2 is neither CT nor PET" in Path(trainer.log_file).read_text(encoding="utf-8")
        and trainer.num_input_channels == 3
    )
    data = batch(trainer, [0, 1])
    assert np.isfinite(trainer.train_step(data)["loss"])
    other = data["data"].clone()
    other[:, 2] += 100
    with torch.no_grad():
        trainer.network.eval()
        assert torch.equal(trainer.network(data["data"]), trainer.network(other))


# ----------------------------------------------------------------------------------------- what is not trained


@pytest.mark.parametrize(
    "configuration, config",
    [("2d", {"median_image_size_in_voxels": [40, 60], "spacing": [4.0, 5.0]}),
     ("3d_lowres", {"next_stage": "3d_cascade_fullres"}),
     ("3d_cascade_fullres", {"previous_stage": "3d_lowres"})],
)  # fmt: skip
def test_2d_and_cascade_are_refused_in_one_line(configuration, config, make_trainer):
    """They stay as nnU-Net planned them, for nnUNetTrainer."""
    with pytest.raises(UserError, match=f"configuration {configuration}: .* use 3d_fullres") as error:
        make_trainer(dataset(ONE), configuration, **config)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------- by the commands


def write_case(folder: Path, case: str, generator: np.random.Generator) -> None:
    """A body of water in air with two hot boxes inside each other; labels 1, 2 and, below, 3 (ignore)."""
    shape = (40, 24, 56)
    ct, pet, labels = np.full(shape, -1000.0), np.zeros(shape), np.zeros(shape, np.uint8)
    ct[6:34, 4:20, 2:54], pet[6:34, 4:20, 2:54] = 0.0, 1.0
    x, y, z = generator.integers((8, 6, 12), (20, 10, 40))
    for value, inset in ((1, 0), (2, 2)):
        box = tuple(slice(s + inset, s + n - inset) for s, n in zip((x, y, z), (10, 8, 10), strict=True))
        labels[box], pet[box] = value, 5.0 * value
    labels[:, :, :6] = 3
    images = (ct + generator.normal(0, 10, shape), pet, (ct > -500) * 7.0)
    affine = np.diag([-5.0, -5.0, 5.0, 1.0])
    for channel, image in enumerate(images):
        nib.save(nib.Nifti1Image(image.astype(np.float32), affine), folder / f"imagesTr/{case}_{channel:04d}.nii.gz")
    nib.save(nib.Nifti1Image(labels, affine), folder / f"labelsTr/{case}.nii.gz")


def test_regions_ignore_and_a_third_channel_by_the_commands(tmp_path):
    """Planned, trained and validated by the commands that users say; the summary has a Dice for each region."""
    workspace = Workspace(tmp_path)
    folder = workspace.raw / "Dataset009_Regions"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(5):
        write_case(folder, f"case_{number}", generator)
    content = dataset(REGIONS_IGNORE, ("CT", "PET", "noNorm"))
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    sizes = "token_patch=[8,16,16] finetune.patch=[16,32,48] finetune.batch_size=2 finetune.epochs=1"
    said = workspace.run("fratmae_plan_and_preprocess -d 9 -preset vit_nano -np 1 --set finetune.iterations=2 "
                         f"finetune.val_iterations=1 wholebody.grid=[16,32,48] {sizes}")  # fmt: skip
    assert "channel 2 is neither CT nor PET" in said
    plans = json.loads((workspace.preprocessed / folder.name / "FratMAEPlans.json").read_text(encoding="utf-8"))
    schemes = PlansManager(plans).get_configuration("3d_fullres").normalization_schemes
    assert schemes == ["CTNormalization", "CTNormalization", "NoNormalization"]
    train = "nnUNetv2_train 9 3d_fullres 0 -tr FratMAETrainer -p FratMAEPlans -device cpu"
    assert "channel 2 is neither CT nor PET" in workspace.run(train)
    results = workspace.results / folder.name / "FratMAETrainer__FratMAEPlans__3d_fullres" / "fold_0" / "validation"
    summary = json.loads((results / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["mean"]) == {"(1, 2)", "(2,)"}
