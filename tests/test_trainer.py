"""FratMAETrainer in this process: what learns and how fast, augmentation and HU and SUV, precision, mirroring."""

import json

import numpy as np
import pytest
import torch

from nnunet_fratmae.augmentation import Calibration, ScannerNoise, misalign
from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.units import to_units
from nnunet_fratmae.optimization import CosineSchedule, parameter_groups
from nnunet_fratmae.trainer import FratMAETrainer, prepare_plans
from plans.front_door import affine_to_units, hwd_axes, intensity_properties
from plans.settings import Settings, override
from tests.test_networks import SMALL, small_network
from tests.test_plans import DATASET_JSON, stock_plans

TRANSPOSES = [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
LABELS = {"background": 0, "lesion": 1}


def batch(trainer: FratMAETrainer) -> dict[str, torch.Tensor]:
    shape = (2, *trainer.configuration_manager.patch_size)
    return {"data": torch.randn(2, *shape), "target": torch.randint(0, 2, (2, 1, *shape[1:])).float()}


# ---------------------------------------------------------------------------------------------- what learns, how fast


@pytest.mark.parametrize("freeze", [False, True])
def test_every_parameter_that_learns_has_a_gradient(freeze, make_trainer):
    """So DDP needs no find_unused_parameters; what is frozen is so before DDP looks, and stays as it is."""
    trainer = make_trainer(freeze=freeze)
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    trainer.train_step(batch(trainer))
    for name, parameter in trainer.network.named_parameters():
        frozen = freeze and name.startswith("encoders.")
        assert parameter.requires_grad != frozen, name
        assert (parameter.grad is None) == frozen, name
        assert frozen or parameter.grad.abs().sum() > 0, name
        assert torch.equal(before[name], parameter) == frozen, name
    in_optimizer = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert in_optimizer == sum(p.requires_grad for p in trainer.network.parameters())


def reference_groups(network, rate, decay) -> dict[str, float]:
    """Learning rates as MAE's util/lr_decay.py gives them: a list of scales, and an index for each parameter."""
    blocks = SMALL["depth"]
    scales = [decay ** (blocks + 1 - i) for i in range(blocks + 2)]
    rates = {}
    for name, _ in network.named_parameters():
        index = blocks + 1
        if ".cls_token" in name or ".patch_embed" in name:
            index = 0
        elif ".blocks." in name:
            index = int(name.split(".blocks.")[1].split(".")[0]) + 1
        rates[name] = rate * scales[index]
    return rates


@pytest.mark.parametrize("decay", [1.0, 0.75])
def test_layer_decay_is_that_of_mae(decay):
    network = small_network()
    names = {parameter: name for name, parameter in network.named_parameters()}
    groups = parameter_groups(network, 1e-3, 0.05, decay)
    rates = {names[p]: group["lr"] for group in groups for p in group["params"]}
    assert rates == pytest.approx(reference_groups(network, 1e-3, decay))
    for group in groups:
        for parameter in group["params"]:
            has_decay = parameter.ndim > 1 and not names[parameter].endswith("cls_token")
            assert group["weight_decay"] == (0.05 if has_decay else 0.0), names[parameter]
    assert groups[0]["lr"] == 1e-3, "nnU-Net logs the first group"
    assert len(groups) == (4 if decay == 1 else 2 + 1 + 2 * SMALL["depth"] + 2)  # the last norm has no matrix


def test_encoders_warm_up_while_the_decoder_follows_the_cosine():
    network = small_network()
    schedule = CosineSchedule(torch.optim.AdamW(parameter_groups(network, 1e-3, 0.0, 1.0)), 10, encoder_warmup=4)
    for epoch in range(10):
        schedule.step(epoch)
        cosine = 1e-3 * (1 + np.cos(np.pi * epoch / 10)) / 2
        for group in schedule.optimizer.param_groups:
            rise = min(1, epoch / 4) if group["is_encoder"] else 1
            assert group["lr"] == pytest.approx(cosine * rise)


def test_a_standing_encoder_stands(make_trainer):
    """In the first epoch of the warm-up the encoders have gradients (DDP) but do not move."""
    trainer = make_trainer(encoder_warmup_epochs=2)
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    trainer.on_train_epoch_start()
    trainer.train_step(batch(trainer))
    for name, parameter in trainer.network.named_parameters():
        assert torch.equal(before[name], parameter) == name.startswith("encoders."), name


def test_from_scratch_beats_every_artefact(monkeypatch):
    monkeypatch.setenv("FRATMAE_PRETRAINED", "/nowhere")
    plans = stock_plans() | {"fratmae": {"pretrained": "/nowhere/either", "finetune": {"from_scratch": True}}}
    prepared, notes = prepare_plans(plans, "3d_fullres", DATASET_JSON)
    assert "FROM SCRATCH, as fratmae.finetune.from_scratch says" in notes[0]
    assert prepared["fratmae"]["pretrained"] == "/nowhere/either", "the plans stay, for the next training"
    plans["fratmae"]["finetune"]["from_scratch"] = False
    with pytest.raises(UserError, match="nowhere"):
        prepare_plans(plans, "3d_fullres", DATASET_JSON)


@pytest.mark.parametrize(
    "assignments, says",
    [
        (["finetune.layer_decay=0"], "above 0"),
        (["finetune.layer_decay=1.5"], "at most 1"),
        (["finetune.encoder_warmup_epochs=201"], "finetune.epochs"),
        (["finetune.freeze=true", "finetune.encoder_warmup_epochs=3"], "exclude"),
        (["finetune.freeze=true", "finetune.from_scratch=true"], "exclude"),
        (["finetune.mirror_axes=X"], "letters of H, W and D"),
        (["finetune.mirror_axes=WW"], "letters of H, W and D"),
        (["finetune.misalignment=-1"], "negative"),
        (["finetune.freeze=1"], "true or false"),
    ],
)
def test_options_that_make_no_sense_are_refused(assignments, says):
    with pytest.raises(UserError, match=says):
        override(Settings(), assignments)


# ------------------------------------------------------------------------------------------------ precision, mirroring


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_where_the_gpu_has_it(supported, make_trainer, monkeypatch):
    """nnU-Net's own autocast takes the type; nothing is left behind for others in the process."""
    trainer = make_trainer()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    trainer.device = torch.device("cuda")
    before = torch.get_autocast_dtype("cuda")
    with trainer.precision():
        assert torch.get_autocast_dtype("cuda") == (torch.bfloat16 if supported else before)
    assert torch.get_autocast_dtype("cuda") == before == torch.float16
    assert trainer.uses_bf16 == supported


@pytest.mark.parametrize("transpose", TRANSPOSES)
@pytest.mark.parametrize("letters", ["W", "", "HWD", "DH"])
def test_mirroring_follows_the_anatomy(transpose, letters, make_trainer):
    trainer = make_trainer(transpose, mirror_axes=letters)
    *_, mirrored = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    array_axis = {"H": 1, "W": 2, "D": 0}  # of (z, y, x)
    expected = sorted(transpose.index(array_axis[letter]) for letter in letters)
    assert list(mirrored or ()) == expected and trainer.inference_allowed_mirroring_axes == mirrored
    assert mirrored is None or expected, "nnU-Net's predictor takes None, but no empty tuple"


@pytest.mark.parametrize("transpose", TRANSPOSES)
@pytest.mark.parametrize("spacing", [(6.0, 4.0, 5.0), (2.0, 2.0, 2.0), (3.0, 0.98, 5.0)])
def test_rotations_of_voxels_hardly_shear(transpose, spacing, make_trainer):
    """The displacement in mm across the rotated axes is never more than that of a rotation by 15 degrees."""
    trainer = make_trainer(transpose)
    trainer.configuration_manager.configuration["spacing"] = [spacing[axis] for axis in transpose]
    (_, angle), in_plane, *_ = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    rotated = trainer.configuration_manager.spacing[1:] if in_plane else trainer.configuration_manager.spacing
    assert np.sin(angle) * max(rotated) / min(rotated) <= np.sin(np.radians(15)) * 1.02
    assert spacing != (2.0, 2.0, 2.0) or angle == pytest.approx(np.radians(15))


# -------------------------------------------------------------------------------------------------------- going on


def test_a_training_goes_on_with_what_the_plans_say_today(make_trainer, tmp_path, capsys):
    """The length of the training, its rate and its augmentation; not what the optimiser was built with."""
    begun = make_trainer(epochs=3, learning_rate=3e-4, weight_decay=0.2)
    checkpoint = tmp_path / "checkpoint.pth"
    begun.save_checkpoint(str(checkpoint))
    plans = json.loads(json.dumps(begun.plans_manager.plans))
    today = {"epochs": 7, "learning_rate": 2e-4, "mirror_axes": "", "weight_decay": 0.5}
    plans["fratmae"]["finetune"] |= today
    trainer = FratMAETrainer(plans, "3d_fullres", 0, begun.dataset_json, torch.device("cpu"))
    trainer.load_checkpoint(str(checkpoint))
    trainer.lr_scheduler.step(0)
    assert trainer.num_epochs == trainer.lr_scheduler.epochs == 7
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [2e-4] * len(trainer.optimizer.param_groups)
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[-1] is None
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.2}
    assert trainer.settings.finetune.weight_decay == 0.2
    said = capsys.readouterr().out
    assert "fratmae.finetune.epochs is 7 from now on, it was 3" in said
    assert "WARNING: fratmae.finetune.weight_decay stays 0.2" in said


def test_edits_outlive_a_second_stop_and_an_artefact_that_is_gone(make_trainer, tmp_path, capsys, monkeypatch):
    """Begun with 3 epochs, edited to 7, stopped, and gone on with where the artefact is not to be had: 7 epochs."""
    begun = make_trainer(epochs=3)
    checkpoint = tmp_path / "checkpoint.pth"
    begun.save_checkpoint(str(checkpoint))
    edited = json.loads(json.dumps(begun.plans_manager.plans))
    edited["fratmae"]["finetune"]["epochs"] = 7

    def go_on(plans) -> FratMAETrainer:
        folder = tmp_path / "results" / "Dataset007_T" / "FratMAETrainer__nnUNetPlans__3d_fullres" / "fold_0"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint_latest.pth").touch()
        trainer = FratMAETrainer(json.loads(json.dumps(plans)), "3d_fullres", 0, begun.dataset_json,
                                 torch.device("cpu"))  # fmt: skip
        trainer.load_checkpoint(str(checkpoint))
        return trainer

    go_on(edited).save_checkpoint(str(checkpoint))
    saved = torch.load(checkpoint, weights_only=False)["init_args"]["plans"]
    assert saved["fratmae"]["finetune"]["epochs"] == 7
    capsys.readouterr()
    monkeypatch.setenv("FRATMAE_PRETRAINED", "/nowhere")
    edited["fratmae"]["finetune"]["epochs"] = 9
    trainer = go_on(edited)
    said = capsys.readouterr().out
    assert trainer.num_epochs == 9 and "epochs is 9 from now on, it was 7" in said
    assert "WARNING: a new training would not start here: " in said and "/nowhere" in said


def test_frozen_encoders_that_nobody_trained_are_pointed_out(make_trainer, capsys):
    make_trainer(freeze=True)
    assert "WARNING: fratmae.finetune.freeze keeps encoders as they are that nobody trained" in capsys.readouterr().out
    make_trainer()
    assert "nobody trained" not in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- augmentation


def normalised(ct_hu, pet_suv, properties) -> torch.Tensor:
    """(2, *shape) as nnU-Net's CTNormalization leaves it, the units clipped as in pretraining."""
    values = []
    for modality, volume in (("CT", ct_hu), ("PET", pet_suv)):
        scale, shift = affine_to_units(modality, "CTNormalization", properties[modality])
        values.append((to_units(modality, volume) - shift) / scale)
    return torch.stack(values)


PROPERTIES = {
    "ours": {modality: intensity_properties(modality) for modality in ("CT", "PET")},
    "stock": {"CT": {"mean": 100.0, "std": 250.0}, "PET": {"mean": 7.0, "std": 8.0}},
}


@pytest.mark.parametrize("units", ["ours", "stock"])
def test_calibration_is_a_factor_on_suv_and_an_offset_on_hu(units):
    """In HU and SUV the change is the drawn one, whatever the plans' normalisation; air and no uptake stay."""
    torch.manual_seed(3)
    ct, pet = torch.rand(3, 4, 5) * 1000 - 900, torch.rand(3, 4, 5) * 20
    ct[0, 0, 0], pet[0, 0, 0] = -1024.0, 0.0
    properties = PROPERTIES[units]
    scale, shift = zip(*(affine_to_units(m, "CTNormalization", properties[m]) for m in ("CT", "PET")), strict=True)
    transform = Calibration((0, 1), scale, shift, ct=10.0, pet=0.1)
    changed = transform._apply_to_image(normalised(ct, pet, properties), ct_offset=40 / 500, pet_factor=1.2)
    expected_ct = torch.where(ct > -1024, ct + 40, ct)
    torch.testing.assert_close(changed, normalised(expected_ct, pet * 1.2, properties), atol=1e-4, rtol=1e-4)


def test_calibration_and_noise_are_as_strong_as_they_say():
    torch.manual_seed(0)
    image = torch.stack([torch.full((8, 16, 16), 2.0), torch.full((8, 16, 16), 3.0)])
    image[:, 0] = 0
    calibration = Calibration((0, 1), (1, 1), (0, 0), ct=10.0, pet=0.1)
    draws = [calibration.get_parameters() for _ in range(4000)]
    assert np.std([d["ct_offset"] for d in draws]) == pytest.approx(10 / 500, rel=0.05)
    assert np.std(np.log([d["pet_factor"] for d in draws])) == pytest.approx(0.1, rel=0.05)
    noise = ScannerNoise((0, 1), (1, 1), (0, 0), ct=30.0, pet=0.1)
    noisy = noise._apply_to_image(image.clone(), ct_noise=30 / 500, pet_noise=0.1)
    assert noisy[0, 1:].std() == pytest.approx(30 / 500, rel=0.1) and noisy[1, 1:].std() == pytest.approx(0.3, rel=0.1)
    assert not noisy[:, 0].any(), "air stays air"


def test_channels_the_other_way_round():
    image = torch.stack([torch.full((2, 3, 4), 3.0), torch.full((2, 3, 4), 2.0)])  # PET, CT
    changed = Calibration((1, 0), (1, 1), (0, 0), 10.0, 0.1)._apply_to_image(image, ct_offset=0.5, pet_factor=2.0)
    assert (changed[0] == 6.0).all() and (changed[1] == 2.5).all()


@pytest.mark.parametrize("transpose", TRANSPOSES)
def test_no_transform_of_nnunet_bends_the_intensities(transpose, make_trainer):
    """Without calibration, noise, blur and low resolution, a homogeneous body keeps its HU and SUV through all."""
    trainer = make_trainer(transpose, pet_scale=0.0, ct_shift=0.0, misalignment=6.0)
    patch = trainer.configuration_manager.patch_size
    transforms = trainer.get_training_transforms(patch, (-0.2, 0.2), None, (0,), False)
    names = [type(getattr(t, "transform", t)).__name__.removesuffix("Transform") for t in transforms.transforms]
    assert names[:-1] == ["Spatial", "ChannelMisalignment", "Calibration", "ScannerNoise", "GaussianBlur",
                          "SimulateLowResolution", "Mirror"]  # fmt: skip
    transforms.transforms = [t for t in transforms.transforms if "Noise" not in repr(t)]
    torch.manual_seed(0)
    for _ in range(20):
        image = torch.stack([torch.full(patch, 2.0), torch.full(patch, 1.5)])
        done = transforms(image=image, segmentation=torch.ones(1, *patch))["image"]
        middle = tuple(slice(n // 2 - 1, n // 2 + 1) for n in patch)
        torch.testing.assert_close(done[(0, *middle)], torch.full((2, 2, 2), 2.0), atol=1e-3, rtol=0)
        torch.testing.assert_close(done[(1, *middle)], torch.full((2, 2, 2), 1.5), atol=1e-3, rtol=0)


@pytest.mark.parametrize("transpose", TRANSPOSES)
def test_misalignment_moves_the_ct_by_millimetres(transpose):
    """A voxel of the CT is found within `mm` along every axis whatever the spacing; PET and labels stay."""
    spacing = np.array((6.0, 4.0, 5.0))[list(transpose)]
    transform = misalign(0, 9.0, spacing)
    np.random.seed(0)
    shifts = []
    for _ in range(200):
        image, labels = torch.zeros(2, 9, 11, 12), torch.ones(1, 9, 11, 12)
        image[:, 4, 5, 6] = 1
        done = transform(image=image, segmentation=labels)
        assert done["image"][1, 4, 5, 6] == 1 and done["image"][1].sum() == 1 and done["segmentation"].all()
        shifts.append(done["image"][0].nonzero()[0].numpy() - (4, 5, 6))
    assert (np.abs(shifts).max(0) == np.floor(9.0 / spacing)).all()
    axes = hwd_axes(transpose)
    assert (np.abs(shifts).max(0)[axes] == (2, 1, 1)).all()  # of H (4 mm), W (5 mm) and D (6 mm)


def test_a_missing_misalignment_transform_is_said_in_one_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "batchgeneratorsv2.transforms.spatial.channel_misalignment", None)
    plans = stock_plans() | {"fratmae": {"finetune": {"misalignment": 5}}}
    with pytest.raises(UserError, match="update it, or set finetune.misalignment=0"):
        prepare_plans(plans, "3d_fullres", DATASET_JSON)


def test_settings_of_a_training_are_in_the_plans(make_trainer):
    trainer = make_trainer(layer_decay=0.75, mirror_axes="")
    block = json.loads(json.dumps(trainer.plans_manager.plans["fratmae"]["finetune"]))
    assert (block["layer_decay"], block["mirror_axes"], block["pet_scale"]) == (0.75, "", 0.1)
