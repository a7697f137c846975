"""Settings, units, the pure plans extension and the contract of artefacts."""

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.units import PRETRAINING_UNITS, units_contract
from plans.channels import find_modalities
from plans.contract import Contract, read_contract
from plans.extension import extend_plans
from plans.front_door import affine_to_units, hwd_axes, intensity_properties
from plans.settings import Finetune, Settings, override
from plans.vit_pair import choose_sizes, follow_artefact

DATASET_JSON = {"channel_names": {"0": "CT", "1": "CT"}, "fratmae": {"modalities": ["CT", "PET"]}}


def stock_plans(shape_zyx=(326, 400, 380), transpose=(0, 1, 2), scheme="CTNormalization") -> dict:
    """Plans as stock nnU-Net writes them, as far as the extension reads them; shape in the array's (z, y, x)."""
    properties = {"mean": 100.0, "std": 250.0, "percentile_00_5": -800.0, "percentile_99_5": 1100.0}
    pet = {"mean": 7.0, "std": 8.0, "percentile_00_5": 1.0, "percentile_99_5": 51.0}  # as LesionTracer's plans
    fullres = {
        "patch_size": [128, 128, 128],
        "batch_size": 2,
        "median_image_size_in_voxels": [shape_zyx[axis] for axis in transpose],
        "spacing": [(3.0, 2.0, 2.0)[axis] for axis in transpose],
        "normalization_schemes": [scheme, scheme],
        "architecture": {"network_class_name": "PlainConvUNet", "arch_kwargs": {}, "_kw_requires_import": []},
    }
    return {
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIOWithReorient",
        "transpose_forward": list(transpose),
        "foreground_intensity_properties_per_channel": {"0": properties, "1": pet},
        "configurations": {"2d": {"patch_size": [256, 256]}, "3d_fullres": fullres},
    }


def test_whole_bodies_get_the_papers_sizes():
    plans, warnings = extend_plans(stock_plans(), DATASET_JSON, Settings())
    config = plans["configurations"]["3d_fullres"]
    kwargs = config["architecture"]["arch_kwargs"]
    assert config["patch_size"] == [192, 32, 160]  # the plans' axes are SI, AP, LR
    assert kwargs["patch_size"] == [32, 160, 192] and kwargs["token_patch"] == [8, 16, 16]
    assert (kwargs["embed_dim"], kwargs["depth"], kwargs["num_heads"]) == (768, 12, 12)
    assert plans["fratmae"]["wholebody"] == {
        "grid": [160, 160, 192], "patch": [32, 160, 192], "k": 2, "stack": "coronal",
    }  # fmt: skip
    assert warnings == [] and json.dumps(plans)


@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
@pytest.mark.parametrize("spacing_zyx", [(5.0, 0.98, 0.98), (3.0, 0.98, 0.98), (1.0, 4.0, 4.0)])
def test_long_voxels_get_a_patch_of_the_papers_proportions_in_mm(spacing_zyx, transpose):
    """1 : 5 : 6 along AP, LR, SI, with as many voxels; in plans of any axes."""
    plans = stock_plans((2000, 2000, 2000), transpose)
    plans["configurations"]["3d_fullres"]["spacing"] = [spacing_zyx[axis] for axis in transpose]
    planned = extend_plans(plans, DATASET_JSON, Settings(finetune=Finetune(gpu_memory_target=1000)))[0]
    sizes = dict(zip(transpose, planned["configurations"]["3d_fullres"]["patch_size"], strict=True))
    token = planned["fratmae"]["token_patch"]
    patch, spacing = ([of[axis] for axis in (1, 2, 0)] for of in (sizes, spacing_zyx))  # H, W, D
    unit = (math.prod(spacing) * 32 * 160 * 192 / (1 * 5 * 6)) ** (1 / 3)  # mm, of a patch with the paper's voxels
    for voxels, mm, share, step in zip(patch, spacing, (1, 5, 6), token, strict=True):
        assert abs(voxels * mm - share * unit) <= step / 2 * mm + 1e-6 and voxels % step == 0


@pytest.mark.parametrize(
    "spacing_zyx, token, median",
    [
        ((3.0, 2.0, 2.0), (8, 16, 16), None),  # what nnU-Net calls isotropic keeps the paper's
        ((5.0, 0.98, 0.98), (16, 16, 4), None),  # 16 x 16 x 20 mm, where 8 x 16 x 16 would be 80 mm long
        ((10.0, 2.0, 2.0), (16, 16, 4), (200, 200, 60)),
        ((1.0, 4.0, 4.0), (4, 8, 16), None),
        ((20.0, 5.0, 5.0), (4, 4, 2), (30, 40, 12)),  # few voxels: halved until there are enough tokens
    ],
)
def test_long_voxels_get_short_tokens_and_the_decoder_as_many_strides(spacing_zyx, token, median):
    h, w, d = median or (2000, 2000, 2000)
    plans = stock_plans((d, h, w))
    plans["configurations"]["3d_fullres"]["spacing"] = list(spacing_zyx)
    planned = extend_plans(plans, DATASET_JSON, Settings(finetune=Finetune(gpu_memory_target=1000)))[0]
    assert tuple(planned["fratmae"]["token_patch"]) == token
    kwargs = planned["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert math.prod(p // t for p, t in zip(kwargs["patch_size"], token, strict=True)) >= 128
    assert tuple(np.prod(kwargs["strides"], 0)) == token


@hypothesis_settings(deadline=None)
@given(
    st.tuples(st.integers(8, 700), st.integers(8, 700), st.integers(8, 900)),
    st.tuples(st.floats(0.5, 20), st.floats(0.5, 20), st.floats(0.5, 20)),
)
def test_sizes_fit_together_whatever_the_spacing(median, spacing):
    chosen = choose_sizes(Settings(finetune=Finetune(gpu_memory_target=1000)), median, spacing=spacing)
    token, patch, whole = chosen.token_patch, chosen.finetune.patch, chosen.wholebody
    assert all(t in (2, 4, 8, 16) for t in token)
    for sizes in (patch, whole.patch):
        assert all(p % t == 0 for p, t in zip(sizes, token, strict=True)) and sizes != token
    assert whole.k * whole.patch[0] <= whole.grid[0]


def test_the_argument_is_not_changed():
    plans = stock_plans()
    before = copy.deepcopy(plans)
    extend_plans(plans, DATASET_JSON, Settings())
    assert plans == before


@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 2, 0), (1, 0, 2), (2, 0, 1)])
def test_axes_name_height_width_depth(transpose):
    """A marked array in (z, y, x), transposed as nnU-Net does and permuted by the axes, comes out as (y, x, z)."""
    array = np.zeros((5, 3, 4))  # z, y, x
    assert array.transpose(transpose).transpose(hwd_axes(transpose)).shape == (3, 4, 5)


@hypothesis_settings(deadline=None)
@given(st.tuples(st.integers(8, 700), st.integers(8, 700), st.integers(8, 900)))
def test_chosen_sizes_always_fit_together(median):
    """Whole tokens everywhere, the patch covers the median study up to the paper's size, the slab fits the grid."""
    chosen = choose_sizes(Settings(), median)
    token, patch, whole = chosen.token_patch, chosen.finetune.patch, chosen.wholebody
    assert all(p % t == 0 for p, t in zip(patch, token, strict=True))
    assert all(p % t == 0 for p, t in zip(whole.patch, token, strict=True))
    assert all(p >= min(m, limit) for p, m, limit in zip(patch, median, (32, 160, 192), strict=True))
    assert whole.k * whole.patch[0] <= whole.grid[0]
    assert whole.patch[1:] == whole.grid[1:] or max(whole.grid) > 192
    assert 2 <= chosen.finetune.batch_size <= 16


def test_settings_of_the_user_are_kept():
    wanted = Settings(preset="vit_s", token_patch=(4, 8, 8), finetune=Finetune(patch=(16, 48, 64), batch_size=5))
    plans, _ = extend_plans(stock_plans(), DATASET_JSON, wanted)
    assert plans["configurations"]["3d_fullres"]["patch_size"] == [64, 16, 48]
    assert plans["configurations"]["3d_fullres"]["batch_size"] == 5
    assert plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["embed_dim"] == 384


def test_extending_twice_changes_nothing_and_edits_of_the_configuration_stay():
    once, _ = extend_plans(stock_plans(), DATASET_JSON, Settings())
    once["configurations"]["3d_fullres"]["batch_size"] = 7
    once["configurations"]["3d_fullres"]["patch_size"] = [96, 16, 80]
    twice, _ = extend_plans(once, DATASET_JSON, Settings.from_json(once["fratmae"]))
    config = twice["configurations"]["3d_fullres"]
    assert (config["batch_size"], config["patch_size"]) == (7, [96, 16, 80])
    assert config["architecture"]["arch_kwargs"]["patch_size"] == [16, 80, 96]


def test_preset_and_token_patch_follow_the_artefact():
    settings = choose_sizes(Settings(finetune=Finetune(patch=(8, 48, 16))), (40, 60, 80))
    followed = follow_artefact(settings, contract(preset="vit_tiny", token_patch=(8, 16, 16)))
    assert (followed.preset, followed.token_patch) == ("vit_tiny", (8, 16, 16))
    assert followed.finetune.patch == (8, 48, 16), "still whole tokens, so the user's patch stays"
    assert follow_artefact(settings, contract(token_patch=(16, 16, 16))).finetune.patch is None
    same = choose_sizes(followed, (40, 60, 80))
    assert follow_artefact(same, contract(preset="vit_tiny", token_patch=(8, 16, 16))) is same


@pytest.mark.parametrize(
    "configuration, extra", [("2d", {}), ("wholebody", {}), ("3d_cascade_fullres", {"previous_stage": "3d_lowres"})]
)
def test_configurations_that_fratmae_cannot_train_are_refused(configuration, extra):
    plans = stock_plans()
    plans["configurations"].setdefault(configuration, {"inherits_from": "3d_fullres", **extra})
    with pytest.raises(UserError, match="3d_fullres"):
        extend_plans(plans, DATASET_JSON, Settings(), configuration)


@pytest.mark.parametrize(
    "names, declared, expected",
    [
        (["CT", "CT"], None, [0, 1]),
        (["CT", "CT"], ["PET", "CT"], [1, 0]),
        (["CT", "PET"], None, [0, 1]),
        (["SUV", "CT"], None, [1, 0]),
        (["ct", "PT"], None, [0, 1]),
        (["a", "b"], ["PT", "ct"], [1, 0]),
        (["CT", "FDG-PET", "optical"], None, [0, 1]),
    ],
)
def test_modalities_are_found(names, declared, expected):
    dataset_json = {"channel_names": {str(i): n for i, n in enumerate(names)}}
    if declared:
        dataset_json["fratmae"] = {"modalities": declared}
    assert find_modalities(dataset_json) == expected


@pytest.mark.parametrize("names", [["CT"], ["CT", "MR"], ["CT", "DEPTH"], ["PET", "PET"], ["CT", "PET", "PET"]])
def test_other_channels_are_refused(names):
    with pytest.raises(UserError, match="dataset.json"):
        find_modalities({"channel_names": {str(i): n for i, n in enumerate(names)}})


@given(st.floats(-1000, 1400), st.floats(0, 25))
def test_units_are_the_same_through_stock_plans_and_through_ours(hu, suv):
    """HU -> stock CTNormalization -> affine equals HU -> pretraining units (no clipping inside both ranges)."""
    for modality, value, stock in (("CT", hu, (107.7, 286.3)), ("PET", suv, (7.06, 7.96))):
        units = PRETRAINING_UNITS[modality]
        scale, shift = affine_to_units(modality, "CTNormalization", {"mean": stock[0], "std": stock[1]})
        expected = pytest.approx((value - units.mean) / units.std, abs=1e-6)
        assert scale * (value - stock[0]) / stock[1] + shift == expected
        scale, shift = affine_to_units(modality, "NoNormalization", {})
        assert scale * value + shift == expected
        scale, shift = affine_to_units(modality, "CTNormalization", intensity_properties(modality))
        assert (scale, shift) == (1.0, 0.0)


def test_zscore_warns_and_goes_on():
    plans, warnings = extend_plans(stock_plans(scheme="ZScoreNormalization"), DATASET_JSON, Settings())
    assert len(warnings) == 2 and "absolute values are lost" in warnings[0]
    swapped = {"channel_names": {"0": "PET", "1": "CT"}}
    advice = extend_plans(stock_plans(scheme="ZScoreNormalization"), swapped, Settings())[1][0]
    assert 'write "fratmae": {"modalities": ["PET", "CT"]} there' in advice, "or two CTs would be read as CT and PET"
    assert plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["scale"] == [1.0, 1.0]


def test_plans_of_channels_in_another_order_do_not_go_with_an_artefact():
    """As nnUNetv2_move_plans_between_datasets leaves them: HU would be clipped to SUV 0 to 25."""
    plans = stock_plans(transpose=(1, 2, 0))
    plans["foreground_intensity_properties_per_channel"] = {
        str(i): intensity_properties(name) for i, name in enumerate(("CT", "PET"))
    }
    pet_first = {"channel_names": {"0": "PET", "1": "CT"}}
    for dataset_json, number in ((DATASET_JSON, 0), (pet_first, 2)):
        warnings = extend_plans(plans, dataset_json, Settings())[1]
        assert sum("normalised as the other modality" in warning for warning in warnings) == number
    with pytest.raises(UserError, match=r"channel 1 \(CT\) is normalised as the other modality"):
        extend_plans(plans, pet_first, Settings(pretrained="artefact"))


def test_an_artefact_that_needs_more_memory_than_was_planned_for_warns():
    planned, _ = extend_plans(stock_plans(), DATASET_JSON, Settings(preset="vit_nano"))
    settings = follow_artefact(Settings.from_json(planned["fratmae"]), contract(
        preset="vit_b", embed_dim=768, depth=12, num_heads=12, token_patch=(8, 16, 16)))  # fmt: skip
    assert extend_plans(planned, DATASET_JSON, Settings.from_json(planned["fratmae"]))[1] == []
    (warning,) = extend_plans(planned, DATASET_JSON, settings)[1]
    assert "GB on one GPU, more than finetune.gpu_memory_target=8; " in warning and "-pretrained" in warning


def test_plans_that_hide_much_from_the_encoders_warn():
    plans = stock_plans()
    plans["foreground_intensity_properties_per_channel"]["0"] |= {"percentile_00_5": -13.0, "percentile_99_5": 539.0}
    plans["image_reader_writer"] = "SimpleITKIO"
    _, warnings = extend_plans(plans, DATASET_JSON, Settings())
    assert any("clip channel 0 to -13 .. 539 HU" in w for w in warnings)
    assert any("SimpleITKIO does not look at the orientation" in w for w in warnings)


def test_settings_survive_json():
    settings = override(Settings(), ["pretrain.epochs=3", "token_patch=[4,8,8]", "finetune.learning_rate=1"])
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert settings.finetune.learning_rate == 1.0


@pytest.mark.parametrize(
    "assignment, names",
    [
        ("pretrain.epoch=3", "did you mean pretrain.epochs"),
        ("nonsense=3", "there are preset, token_patch"),
        ("pretrain=3", "unknown key"),
        ("preset=vit_x", "vit_tiny"),
        ("pretrain.epochs=many", "whole number"),
        ("pretrain.epochs=0", "at least 1"),
        ("pretrain.mask_ratio=1.0", "between 0 and 1"),
        ("token_patch=[3,8,8]", "1, 2, 4, 8, 16"),
        ("token_patch=[8,8]", "three whole numbers"),
        ("pretrain.epochs", "key=value"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(assignment, names):
    with pytest.raises(UserError, match=names) as error:
        override(Settings(), [assignment])
    assert "\n" not in str(error.value)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="no multiple of token_patch"):
        override(Settings(), ["token_patch=[8,16,16]", "finetune.patch=[32,60,64]"])
    with pytest.raises(UserError, match="finetune.patch .* single token"):
        Settings(token_patch=(8, 16, 4), finetune=Finetune(patch=(8, 16, 4)))
    with pytest.raises(UserError, match="does not fit"):
        override(Settings(), ["wholebody.grid=[40,64,64]", "wholebody.patch=[32,64,64]", "wholebody.k=2"])


def contract(**changes) -> Contract:
    values = {
        "preset": "vit_tiny", "embed_dim": 192, "depth": 12, "num_heads": 3, "token_patch": (4, 8, 8),
        "grid": (40, 48, 64), "patch": (32, 48, 64), "k": 1, "method": "fratmae_notext", "text_tower": None,
        "epochs": 1, "datasets": [], "left_out_fold": None, "software": {},
    }  # fmt: skip
    return Contract(**(values | changes))


def write_artefact(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "encoders.safetensors").write_bytes(b"")
    contract().save(folder / "encoders.json")
    content = json.loads((folder / "encoders.json").read_text(encoding="utf-8")) | changes
    (folder / "encoders.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_contract_is_read_back(tmp_path):
    read = read_contract(write_artefact(tmp_path / "a"))
    assert (read.preset, read.token_patch, read.units) == ("vit_tiny", (4, 8, 8), units_contract())


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"architecture": "PlainConvUNet"}, "no FratMAE encoder pair"),
        ({"format": "other"}, "no FratMAE encoder pair"),
        ({"units": {}}, "units"),
        ({"axes": "D W H"}, "axes"),
        ({"embed_dim": 100}, "not known to this version"),
        ({"token_patch": [3, 8, 8]}, "token_patch"),
    ],
)
def test_artefacts_of_another_kind_are_refused(tmp_path, changes, names):
    with pytest.raises(UserError, match=names):
        read_contract(write_artefact(tmp_path / "a", **changes))


def test_absent_and_unreadable_artefacts_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        read_contract(tmp_path / "nowhere")
    folder = write_artefact(tmp_path / "a")
    (folder / "encoders.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="no readable contract"):
        read_contract(folder / "encoders.safetensors")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"embed_dim": "192"}, "embed_dim"),
        ({"depth": True}, "depth"),
        ({"patch": [32, 48]}, "patch"),
        ({"patch": [4, 8, 10**9]}, "tokens"),
        ({"grid": [10**9, 48, 64]}, "grid"),
        ({"grid": [40, 48, 1e400]}, "grid"),
        ({"patch": [33, 48, 64]}, "no multiple of token_patch"),
        ({"patch": [64, 48, 64]}, "does not fit in grid"),
        ({"k": 0}, "k is 0"),
        ({"datasets": ["a"]}, "datasets"),
        ({"datasets": None}, "datasets"),
        ({"datasets": [{}]}, "datasets"),
        ({"datasets": [{"name": "a", "cases": -5}]}, "datasets"),
        ({"datasets": [{"name": "a\x1b[31m", "cases": 5}]}, "datasets"),
        ({"text_tower": "a\nb"}, "text_tower"),
        ({"software": []}, "software"),
        ({"method": "other"}, "method"),
        ({"stack": ["coronal"]}, "stack"),
        ({"preset": {}}, "preset"),
        ({"text_tower": "x" * 10**5}, "text_tower"),
        ({"format": 2}, "no FratMAE encoder pair"),
    ],
)
def test_every_part_of_a_contract_is_checked(tmp_path, changes, says):
    with pytest.raises(UserError, match=says) as error:
        read_contract(write_artefact(tmp_path / "a", **changes))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{}", b'{"a":' * 10**5, b'{"k": 1, "k": 2}', b"[]", b"7", b"{}", b"", b" " * (2**20 + 1)]
)
def test_a_contract_that_is_none_is_one_line(tmp_path, content):
    folder = write_artefact(tmp_path / "a")
    (folder / "encoders.json").write_bytes(content)
    with pytest.raises(UserError, match="encoders.json") as error:
        read_contract(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_contract_without_a_part_says_which(tmp_path):
    folder = write_artefact(tmp_path / "a")
    content = json.loads((folder / "encoders.json").read_text(encoding="utf-8"))
    del content["grid"], content["software"]
    (folder / "encoders.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="grid, software missing"):
        read_contract(folder)
