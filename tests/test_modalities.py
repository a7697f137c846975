"""Networks of CT alone and of PET alone, training with a modality missing now and then, predicting where one is."""

import errno
import gzip
import json
import os
import shutil
import sys

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_fratmae import fill_missing
from nnunet_fratmae.artefact import NNUNET_NAME, load_encoders, save_artefact
from nnunet_fratmae.augmentation import MissingModality
from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.networks.staging import FratMAEStaging
from nnunet_fratmae.networks.vit import dual_encoders
from nnunet_fratmae.staging_trainer import FratMAEStagingTrainer
from nnunet_fratmae.trainer import FratMAETrainer, check_other_folds, prepare_plans
from plans.channels import find_channels
from plans.extension import extend_plans
from plans.front_door import absent_value, absent_values
from plans.planner import finish_plans
from plans.settings import PRESETS, Settings, override
from plans.vit_pair import training_memory
from pretraining.data import list_cases
from tests.test_networks import PATCH, SMALL, TOKEN, small_network
from tests.test_plans import DATASET_JSON, contract, stock_plans

LABELS = {"background": 0, "lesion": 1}
TRANSPOSES = [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
CT_FIRST, PET_FIRST = DATASET_JSON, {"channel_names": {"0": "PET", "1": "CT"}}
CT_ONLY, PET_ONLY = {"channel_names": {"0": "CT"}}, {"channel_names": {"0": "SUV"}}


# ------------------------------------------------------------------------------------------------- what is said where


@pytest.mark.parametrize(
    "dataset_json, wanted, expected",
    [
        (CT_FIRST, None, {"CT": 0, "PET": 1}),
        (PET_FIRST, None, {"CT": 1, "PET": 0}),
        (PET_FIRST, "both", {"CT": 1, "PET": 0}),
        (PET_FIRST, "CT", {"CT": 1}),
        (PET_FIRST, "PET", {"PET": 0}),
        (CT_ONLY, None, {"CT": 0}),
        (PET_ONLY, "PET", {"PET": 0}),
        ({"channel_names": {"0": "CT"}, "fratmae": {"modalities": ["PET"]}}, None, {"PET": 0}),
    ],
)
def test_channels_are_those_of_the_dataset_or_the_wanted_ones(dataset_json, wanted, expected):
    found = find_channels(dataset_json, wanted)
    assert found == expected and list(found) == sorted(found), "CT comes first whatever the order of the channels"


@pytest.mark.parametrize("dataset_json, wanted", [(CT_ONLY, "PET"), (CT_ONLY, "both"), (PET_ONLY, "both")])
def test_a_channel_that_is_not_there_is_one_line(dataset_json, wanted):
    with pytest.raises(UserError, match=r"dataset.json: (CT|PET) alone, (CT|PET) is needed here; .*modalities=") as e:
        find_channels(dataset_json, wanted)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "assignments, says",
    [
        (["modalities=MR"], "both, CT, PET"),
        (["finetune.modality_dropout=1"], "below 1"),
        (["finetune.modality_dropout=-0.1"], "at least 0"),
        (["modalities=CT", "finetune.modality_dropout=0.3"], "needs CT and PET"),
        (["modalities=PET", "finetune.misalignment=5"], "needs CT and PET"),
    ],
)
def test_settings_that_make_no_sense_are_refused(assignments, says):
    with pytest.raises(UserError, match=says):
        override(Settings(), assignments)


def test_dropout_of_the_only_modality_is_refused():
    with pytest.raises(UserError, match="modality_dropout needs CT and PET, and fratmae.modalities is CT"):
        extend_plans(stock_plans(), CT_ONLY, override(Settings(), ["finetune.modality_dropout=0.3"]))


@pytest.mark.parametrize(
    "dataset_json, wanted, channels, scale",
    [
        (CT_FIRST, None, [0, 1], [0.5, 4.0]),
        (PET_FIRST, "CT", [1, None], [16 / 1000, 1.0]),
        (PET_FIRST, "PET", [None, 0], [1.0, 125.0]),
        (CT_ONLY, None, [0, None], [0.5, 1.0]),
        (PET_ONLY, None, [None, 0], [1.0, 125.0]),
    ],
)
def test_plans_say_which_channels_the_network_sees(dataset_json, wanted, channels, scale):
    """Stock plans of channel 0 with a spread of 250 and channel 1 with one of 8; their units are undone."""
    plans, _ = extend_plans(stock_plans(), dataset_json, Settings(modalities=wanted))
    kwargs = json.loads(json.dumps(plans))["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert kwargs["modalities"] == channels and kwargs["scale"] == pytest.approx(scale)
    used = [modality for modality, channel in zip(("CT", "PET"), channels, strict=True) if channel is not None]
    assert plans["fratmae"]["modalities"] == ("both" if len(used) == 2 else used[0])
    again, _ = extend_plans(plans, dataset_json, Settings.from_json(plans["fratmae"]))
    assert again == plans


def test_memory_is_that_of_one_encoder():
    settings = override(Settings(), ["preset=vit_b", "token_patch=[8,16,16]"])
    both = training_memory(settings, (32, 96, 96), 2, 2)
    alone = training_memory(override(settings, ["modalities=CT"]), (32, 96, 96), 2, 2)
    assert alone < 0.7 * both
    batches = [
        extend_plans(stock_plans(), CT_FIRST, Settings(preset="vit_s", modalities=m))[0]["configurations"]["3d_fullres"]
        ["batch_size"] for m in (None, "CT")
    ]  # fmt: skip
    assert batches[0] < batches[1]


@pytest.mark.parametrize("dataset_json, schemes", [(PET_FIRST, 2), (CT_ONLY, 1), (PET_ONLY, 1)])
def test_the_planner_keeps_the_units_of_what_is_there(dataset_json, schemes):
    """A plan has the whole-body grid only where there are CT and PET, and the units of all channels it stores."""
    plans = finish_plans(stock_plans(transpose=(1, 2, 0)), dataset_json, Settings(modalities=None))
    properties = plans["foreground_intensity_properties_per_channel"]
    assert len(properties) == schemes and ("wholebody" in plans["configurations"]) == (schemes == 2)
    for modality, channel in find_channels(dataset_json).items():
        assert properties[str(channel)]["percentile_99_5"] == {"CT": 1500.0, "PET": 25.0}[modality]


# -------------------------------------------------------------------------------------------------------- the networks


@pytest.mark.parametrize(
    "channels, axes",
    [((0, None), (0, 1, 2)), ((1, None), (1, 2, 0)), ((None, 0), (2, 0, 1)), ((None, 1), (1, 2, 0))],
)
def test_one_modality_has_one_encoder_and_sees_one_channel(channels, axes):
    """Along any axes the same function of that channel, whatever the other holds; every parameter learns."""
    network = small_network(modalities=channels, axes=axes, scale=(2.0, 0.5), shift=(-1.0, 3.0))
    seen = channels[0] if channels[1] is None else channels[1]
    name, scale, shift = ("CT", 2.0, -1.0) if channels[1] is None else ("PET", 0.5, 3.0)
    assert list(network.encoders) == [name]
    image = torch.randn(2, 2, *PATCH)
    stored = image.permute(0, 1, *(axes.index(i) + 2 for i in range(3)))
    other = stored.clone()
    other[:, 1 - seen] = torch.randn_like(other[:, 0])
    logits = network(stored)
    assert logits.shape == stored.shape and torch.equal(network(other), logits)
    alone = small_network(modalities=(0, None) if name == "CT" else (None, 0))
    alone.load_state_dict(network.state_dict(), strict=True)
    expected = alone(image[:, seen : seen + 1].expand(-1, 2, -1, -1, -1) * scale + shift)
    torch.testing.assert_close(logits, expected.permute(0, 1, *(axes.index(i) + 2 for i in range(3))))
    network.train()(stored).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("channels", [(None, None), (0, 0), (2, None), (0, -1)])
def test_channels_that_are_not_there_are_refused(channels):
    with pytest.raises(ValueError, match="modalities"):
        small_network(modalities=channels)


@pytest.mark.parametrize("seen, channel", [("CT", 0), ("PET", 1)])
def test_staging_of_one_modality(seen, channel):
    torch.manual_seed(0)
    network = FratMAEStaging(2, 2, PATCH, TOKEN, **SMALL, classes=["a", "b", "c"], modalities=[seen])
    image = torch.randn(2, 2, *PATCH)
    other = image.clone()
    other[:, 1 - channel] = 0
    assert list(network.encoders) == [seen] and torch.equal(network(image), network(other))
    network(image).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


# ------------------------------------------------------------------------------------------------- pretrained encoders


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    """An artefact of vit_tiny with random weights."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("artefact")
    save_artefact(folder, dual_encoders((8, 16, 16), (4, 8, 8), **PRESETS["vit_tiny"].encoder).state_dict(), contract())
    return folder


def one_encoder_network(modality: str):
    """As stock nnU-Net builds it from plain plans of two channels, PET first."""
    settings = override(Settings(modalities=modality), ["preset=vit_tiny", "token_patch=[4,8,8]"])
    plans, _ = extend_plans(stock_plans((48, 16, 32)), PET_FIRST, settings)
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    return get_network_from_plans(architecture["network_class_name"], architecture["arch_kwargs"], [], 2, 2,
                                  deep_supervision=False)  # fmt: skip


@pytest.mark.parametrize("seen, other", [("CT", "PET"), ("PET", "CT")])
def test_an_artefact_gives_the_encoder_that_is_wanted(seen, other, artefact):
    network = one_encoder_network(seen)
    *_, of_seen, of_other = load_encoders(artefact, network.encoders)
    assert f"{seen} encoder: 149 tensors loaded, 0 missing, 0 left over" in of_seen
    assert f"{other} encoder: not loaded, this network sees no {other}" in of_other
    there = torch.load(artefact / NNUNET_NAME, weights_only=True)["network_weights"]
    for name, value in network.state_dict().items():
        if name.startswith("encoders."):
            assert torch.equal(there[name], value)


def test_stock_pretrained_weights_take_the_encoder_that_is_wanted(artefact):
    """`nnUNetv2_train -pretrained_weights encoders_nnunet.pth`: what is left over in the file does not matter."""
    network = one_encoder_network("PET")
    load_pretrained_weights(network, str(artefact / NNUNET_NAME))
    there = torch.load(artefact / NNUNET_NAME, weights_only=True)["network_weights"]
    assert torch.equal(network.encoders["PET"].cls_token, there["encoders.PET.cls_token"])


def test_the_log_says_what_the_network_sees(artefact):
    plans = stock_plans() | {"fratmae": {"modalities": "CT", "pretrained": str(artefact)}}
    prepared, notes = prepare_plans(plans, "3d_fullres", PET_FIRST)
    assert "this network sees CT alone (fratmae.modalities)" in notes
    _, notes = prepare_plans(stock_plans(), "3d_fullres", CT_FIRST)
    assert "alone" not in " ".join(notes) and prepared["fratmae"]["preset"] == "vit_tiny"


# -------------------------------------------------------------------------------------------------------- the training


def augmented(trainer: FratMAETrainer, image: torch.Tensor, times: int) -> list[torch.Tensor]:
    patch = tuple(image.shape[1:])
    transforms = trainer.get_training_transforms(patch, (-0.2, 0.2), None, (0,), False)
    labels = torch.ones(1, *patch)
    return [transforms(image=image.clone(), segmentation=labels)["image"] for _ in range(times)]


@pytest.mark.parametrize("dataset_json, modalities", [(PET_FIRST, "PET"), (CT_ONLY, None)])
def test_training_on_one_modality(dataset_json, modalities, make_trainer):
    """Augmentation runs and leaves the channel that is not seen to nnU-Net; every parameter gets a gradient."""
    trainer = make_trainer(dataset_json=dataset_json, modalities=modalities, layer_decay=0.75)
    channels = len(dataset_json["channel_names"])
    shape = tuple(trainer.configuration_manager.patch_size)
    torch.manual_seed(0)
    images = torch.stack(augmented(trainer, torch.randn(channels, *shape), 2))
    assert images.shape == (2, channels, *shape) and images.isfinite().all()
    trainer.train_step({"data": images, "target": torch.randint(0, 2, (2, 1, *shape)).float()})
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.network.parameters())


@pytest.mark.parametrize("transpose", TRANSPOSES)
@pytest.mark.parametrize("dataset_json", [CT_FIRST, PET_FIRST])
def test_a_share_of_the_patches_lacks_one_modality(dataset_json, transpose, make_trainer):
    """CT and PET as often, never both, and what is missing is exactly the value that the plans give it."""
    trainer = make_trainer(transpose, dataset_json, modality_dropout=0.4)
    absent = absent_values(trainer.plans_manager.plans, trainer.configuration_manager.configuration)
    channels = find_channels(dataset_json)
    torch.manual_seed(0)
    np.random.seed(0)
    patches, lacking = 60, {"CT": 0, "PET": 0}
    for image in augmented(trainer, torch.randn(2, 16, 16, 16), patches):
        gone = [m for m, value in zip(("CT", "PET"), absent, strict=True) if (image[channels[m]] == value).all()]
        assert len(gone) < 2
        for modality in gone:
            lacking[modality] += 1
    for count in lacking.values():  # 0.2 of the patches each; within three standard deviations
        assert abs(count - 0.2 * patches) < 3 * np.sqrt(0.2 * 0.8 * patches)


def test_a_missing_modality_leaves_the_other_alone():
    image = torch.randn(2, 3, 4, 5)
    changed = MissingModality((1, 0), (-2.5, 0.75))._apply_to_image(image.clone(), missing=0)
    assert (changed[1] == -2.5).all() and torch.equal(changed[0], image[0])
    changed = MissingModality((1, 0), (-2.5, 0.75))._apply_to_image(image.clone(), missing=1)
    assert (changed[0] == 0.75).all() and torch.equal(changed[1], image[1])


def test_without_dropout_nothing_is_missing(make_trainer):
    trainer = make_trainer(dataset_json=CT_FIRST)
    transforms = trainer.get_training_transforms((16, 16, 16), (-0.2, 0.2), None, (0,), False).transforms
    assert not any("Missing" in type(getattr(t, "transform", t)).__name__ for t in transforms)


def test_folds_of_a_model_have_dropout_or_none(tmp_path):
    plans, other = (extend_plans(stock_plans(), CT_FIRST, override(Settings(), [f"finetune.modality_dropout={p}"]))[0]
                    for p in (0.0, 0.3))  # fmt: skip
    (tmp_path / "fold_1").mkdir()
    (tmp_path / "fold_1" / "checkpoint_best.pth").touch()
    (tmp_path / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    check_other_folds(tmp_path, plans, "3d_fullres", 0)
    with pytest.raises(UserError, match=r"fold_1 was trained with finetune.modality_dropout=0.0; set it so"):
        check_other_folds(tmp_path, other, "3d_fullres", 0)


# ------------------------------------------------------------------------------------------------ a missing one filled


@pytest.mark.parametrize("scheme", ["CTNormalization", "NoNormalization", "ZScoreNormalization"])
@pytest.mark.parametrize("modality, lowest", [("CT", -1024.0), ("PET", 0.0)])
def test_the_value_of_a_missing_modality_is_that_of_stock_normalisation(scheme, modality, lowest):
    from nnunetv2.preprocessing.normalization import default_normalization_schemes

    properties = {"mean": 31.0, "std": 7.5, "percentile_00_5": -13.0, "percentile_99_5": 539.0}
    stock = getattr(default_normalization_schemes, scheme)(use_mask_for_norm=False, intensityproperties=properties)
    done = stock.run(np.full((2, 3, 4), lowest, np.float32), None)
    assert done == pytest.approx(absent_value(modality, scheme, properties), rel=1e-6)


def write_image(path, voxels: np.ndarray) -> None:
    image = sitk.GetImageFromArray(voxels.astype(np.float32))
    image.SetSpacing((4.0, 5.0, 6.0))
    image.SetOrigin((-30.0, 20.0, 700.0))
    image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, -1))
    sitk.WriteImage(image, str(path))


def model_folder(folder, dataset_json, transpose=(0, 1, 2), ours=False, **settings):
    """plans.json and dataset.json as a training leaves them, with the planner's units or stock ones."""
    folder.mkdir(parents=True, exist_ok=True)
    plans = stock_plans((10, 14, 18), transpose)
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    plans["configurations"]["3d_fullres"] |= {
        "spacing": [(7.0, 4.5, 5.0)[axis] for axis in transpose], "use_mask_for_norm": [False, False],
        "data_identifier": "x", "preprocessor_name": "DefaultPreprocessor",
        "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": "resample_data_or_seg_to_shape", "resampling_fn_seg_kwargs": resampling | {"is_seg": True},
    }  # fmt: skip
    block = Settings.from_json(settings | {"preset": "vit_tiny"})
    plans = finish_plans(plans, dataset_json, block) if ours else extend_plans(plans, dataset_json, block)[0]
    dataset_json = dataset_json | {"labels": LABELS, "file_ending": ".nii.gz", "numTraining": 5}
    for name, content in (("plans.json", plans), ("dataset.json", dataset_json)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return plans, dataset_json


def fill(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sys, "argv", f"x -i {tmp_path}/in -o {tmp_path}/out -m {tmp_path}/model".split())
    fill_missing.main()


DROPOUT = {"finetune": {"modality_dropout": 0.3}}


@pytest.mark.parametrize("transpose", TRANSPOSES)
@pytest.mark.parametrize("dataset_json, ours", [(CT_FIRST, True), (PET_FIRST, True), (PET_FIRST, False)])
def test_a_filled_case_is_what_training_saw(dataset_json, ours, transpose, tmp_path, monkeypatch):
    """Stock preprocessing of the filled images: same shape and place as with both, the value of training everywhere."""
    plans, description = model_folder(tmp_path / "model", dataset_json, transpose, ours, **DROPOUT)
    channels = find_channels(dataset_json)
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    volumes = {"CT": rng.uniform(-1000, 300, (10, 14, 18)), "PET": rng.uniform(0, 9, (10, 14, 18))}
    volumes["PET"][:, :3] = 0  # a PET is 0 in places; a CT is not
    for case, there in (("whole", ("CT", "PET")), ("no_CT", ("PET",)), ("no_PET", ("CT",))):
        for modality in there:
            write_image(tmp_path / "in" / f"{case}_{channels[modality]:04d}.nii.gz", volumes[modality])
    fill(monkeypatch, tmp_path)
    manager = PlansManager(plans)
    done = {}
    for case in ("whole", "no_CT", "no_PET"):
        images = [str(tmp_path / "out" / f"{case}_{channel:04d}.nii.gz") for channel in range(2)]
        done[case] = DefaultPreprocessor(verbose=False).run_case(
            images, None, manager, manager.get_configuration("3d_fullres"), description
        )
    absent = absent_values(plans, plans["configurations"]["3d_fullres"])
    whole, _, properties = done["whole"]
    for lacks, other, value in (("CT", "PET", absent[0]), ("PET", "CT", absent[1])):
        data, _, found = done[f"no_{lacks}"]
        assert found["bbox_used_for_cropping"] == properties["bbox_used_for_cropping"], "nothing is cropped"
        assert np.array_equal(data[channels[other]], whole[channels[other]])
        np.testing.assert_allclose(data[channels[lacks]], value, atol=1e-5)
        assert not ours or value == 0, "in our units it is what nnU-Net pads with"


def test_what_is_there_is_linked_and_geometry_is_kept(tmp_path, monkeypatch, capsys):
    model_folder(tmp_path / "model", PET_FIRST, **DROPOUT)
    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / "a_b_0000.nii.gz", np.ones((3, 4, 5)))
    (tmp_path / "in" / "notes.txt").touch()
    fill(monkeypatch, tmp_path)
    assert sorted(os.listdir(tmp_path / "out")) == ["a_b_0000.nii.gz", "a_b_0001.nii.gz"]
    assert os.path.samefile(tmp_path / "in" / "a_b_0000.nii.gz", tmp_path / "out" / "a_b_0000.nii.gz")
    there, filled = (sitk.ReadImage(str(tmp_path / "out" / f"a_b_000{i}.nii.gz")) for i in range(2))
    for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(there, geometry)() == getattr(filled, geometry)()
    assert (sitk.GetArrayFromImage(filled) == -1024).all()
    assert "a_b_0001.nii.gz: no CT, -1024 HU everywhere" in capsys.readouterr().out


def test_models_and_folders_that_cannot_be_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    def refused(says: str) -> None:
        with pytest.raises(SystemExit, match=says) as error:
            fill(monkeypatch, tmp_path)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    refused("plans.json or dataset.json cannot be read")
    model_folder(tmp_path / "model", PET_ONLY)
    refused("takes one image a case")
    plans, _ = model_folder(tmp_path / "model", CT_FIRST)
    refused("no images CASE_0000")
    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / "a_0001.nii.gz", np.ones((3, 4, 5)))
    refused("a has no CT, and -m .* was not trained for that; .*modality_dropout above 0")
    model_folder(tmp_path / "model", CT_FIRST, modalities="CT")
    refused("a has no CT")
    plans, _ = model_folder(tmp_path / "model", CT_FIRST, **DROPOUT)
    (tmp_path / "in" / "a_0002.nii.gz").touch()
    refused(r"a_0002.nii.gz: the model has 2 channels \(CT, PET\)")
    (tmp_path / "in" / "a_0002.nii.gz").unlink()
    (tmp_path / "in" / "b_0000.nii.gz").touch()
    refused("b_0000.nii.gz: cannot be read")
    (tmp_path / "model" / "plans.json").write_text(
        json.dumps({k: v for k, v in plans.items() if k != "fratmae"}), encoding="utf-8"
    )
    refused("no model of FratMAETrainer")


def test_a_model_that_sees_one_modality_does_without_the_other(tmp_path, monkeypatch):
    model_folder(tmp_path / "model", CT_FIRST, modalities="PET")
    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / "a_0001.nii.gz", np.ones((3, 4, 5)))
    fill(monkeypatch, tmp_path)
    with pytest.raises(SystemExit, match="is not empty"):
        fill(monkeypatch, tmp_path)


def test_a_bad_file_is_named_before_anything_is_written(tmp_path, monkeypatch):
    """Cut off, NaN, on another grid, 4D: there is no folder, half filled, that nnUNetv2_predict would take."""
    model_folder(tmp_path / "model", CT_FIRST, **DROPOUT)
    (tmp_path / "in").mkdir()
    good = np.random.default_rng(0).normal(size=(10, 14, 18))
    for name in ("a_0001", "b_0000", "b_0001", "c_0000"):
        write_image(tmp_path / "in" / f"{name}.nii.gz", good)
    content = gzip.decompress((tmp_path / "in" / "c_0000.nii.gz").read_bytes())

    def refused(name: str, says: str) -> None:
        with pytest.raises(SystemExit, match=says) as error:
            fill(monkeypatch, tmp_path)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
        assert sorted(os.listdir(tmp_path)) == ["in", "model"]
        write_image(tmp_path / "in" / name, good)

    (tmp_path / "in" / "c_0000.nii.gz").write_bytes(gzip.compress(content[: len(content) // 2]))
    refused("c_0000.nii.gz", "c_0000.nii.gz: ends too early")
    write_image(tmp_path / "in" / "c_0000.nii.gz", np.where(good > 2, np.nan, good))
    refused("c_0000.nii.gz", "c_0000.nii.gz: has .* NaN")
    write_image(tmp_path / "in" / "b_0001.nii.gz", good[1:])
    refused("b_0001.nii.gz", "case b: CT and PET are not on one grid .18x14x10 and 18x14x9 voxels")
    sitk.WriteImage(sitk.Image([8, 8, 8, 2], sitk.sitkInt16), tmp_path / "in" / "a_0001.nii.gz")
    refused("a_0001.nii.gz", "a_0001.nii.gz: is 4D")
    fill(monkeypatch, tmp_path)
    assert len(os.listdir(tmp_path / "out")) == 6


def test_a_full_disk_leaves_no_half_filled_folder(tmp_path, monkeypatch):
    model_folder(tmp_path / "model", CT_FIRST, **DROPOUT)
    (tmp_path / "in").mkdir()
    for name in ("a_0001", "b_0000", "b_0001"):
        write_image(tmp_path / "in" / f"{name}.nii.gz", np.ones((10, 14, 18)))

    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fill_missing, "write_absent", full)
    with pytest.raises(SystemExit, match=r"out cannot be written to \(No space left on device\)"):
        fill(monkeypatch, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["in", "model"]


def test_the_same_command_twice_at_once_is_refused_once(tmp_path, monkeypatch):
    model_folder(tmp_path / "model", CT_FIRST, **DROPOUT)
    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / "a_0001.nii.gz", np.ones((10, 14, 18)))
    write = fill_missing.write_absent

    def while_another_ends(path, *how):
        write(path, *how)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a_0001.nii.gz").write_bytes(b"the other's")

    monkeypatch.setattr(fill_missing, "write_absent", while_another_ends)
    with pytest.raises(SystemExit, match="-o .*out: is not empty"):
        fill(monkeypatch, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["in", "model", "out"] and os.listdir(tmp_path / "out") == ["a_0001.nii.gz"]


# ------------------------------------------------------------------------------------------------------ stock commands


@pytest.mark.slow
def test_a_dataset_of_pet_alone_from_plan_to_prediction(phantoms, artefact):
    """Planned without a whole-body grid, trained from the PET encoder, predicted."""
    both, alone = (phantoms.raw / name for name in ("Dataset007_Phantom", "Dataset009_PetAlone"))
    for folder in (alone / "imagesTr", alone / "imagesTs"):
        folder.mkdir(parents=True)
    shutil.copytree(both / "labelsTr", alone / "labelsTr")
    for image in (both / "imagesTr").glob("*_0001.nii.gz"):
        shutil.copy(image, alone / "imagesTr" / image.name.replace("_0001", "_0000"))
    shutil.copy(image, alone / "imagesTs" / "new_0000.nii.gz")
    dataset_json = json.loads((both / "dataset.json").read_text(encoding="utf-8")) | {"channel_names": {"0": "PET"}}
    dataset_json.pop("fratmae", None)
    (alone / "dataset.json").write_text(json.dumps(dataset_json), encoding="utf-8")
    said = phantoms.run(f"fratmae_plan_and_preprocess -d 9 -np 1 -pretrained {artefact} --set finetune.epochs=1 "
                        "finetune.patch=[16,32,48] finetune.batch_size=2 finetune.iterations=2 "
                        "finetune.val_iterations=1")  # fmt: skip
    assert "left out: pretraining and staging need CT and PET, this dataset has PET alone" in said
    assert "next: nnUNetv2_train 9 3d_fullres 0" in said
    said = phantoms.run("nnUNetv2_train 9 3d_fullres 0 -tr FratMAETrainer -p FratMAEPlans -device cpu")
    assert "PET encoder: 149 tensors loaded, 0 missing" in said and "CT encoder: not loaded" in said
    phantoms.run(f"nnUNetv2_predict -d 9 -i {alone}/imagesTs -o {phantoms.folder}/pet_alone -c 3d_fullres -f 0 -tr "
                 "FratMAETrainer -p FratMAEPlans -device cpu --disable_tta -npp 1 -nps 1")  # fmt: skip
    assert (phantoms.folder / "pet_alone" / "new.nii.gz").is_file()


def test_pretraining_and_staging_of_one_modality_are_refused(tmp_path):
    """In one line, before anything is looked for."""
    plans = finish_plans(stock_plans(transpose=(1, 2, 0)), PET_ONLY, Settings())
    needed = "dataset.json: PET alone, CT is needed here"
    with pytest.raises(UserError, match=needed):
        list_cases(tmp_path, plans, PET_ONLY)
    with pytest.raises(UserError, match=needed):
        properties = plans["foreground_intensity_properties_per_channel"]
        properties |= {str(i): properties["0"] for i in range(2)}
        pet = PET_ONLY | {"file_ending": ".nii.gz", "labels": {"background": 0, "lesion": 1}}
        FratMAEStagingTrainer(plans | {"dataset_name": "Dataset009_P"}, "wholebody", 0, pet, torch.device("cpu"))
