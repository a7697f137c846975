"""Plans that somebody edited: any value is right, or refused in one line before anything is built."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nnunet_fratmae import fill_missing, predict_stage
from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.trainer import prepare_plans
from plans import plan_and_preprocess
from plans.extension import extend_plans
from plans.fields import build
from plans.planner import finish_plans
from plans.reader import check_plans, check_whole_body, load_plans, read_plans, resolve
from plans.settings import Settings, override
from plans.staging import joint_plans, staging_plans
from pretraining import pretrain
from tests.test_plans import DATASET_JSON, stock_plans

NASTY = [
    None, True, False, 0, 1, -1, 3, 10**9, 10**400, 2.5, -0.5, 1e308, math.inf, -math.inf, math.nan, "", "two", "../x",
    "a\x00b", "x" * 5000, [], {}, [0, 1, 2], [1.0, 2.0], [10**9] * 3, [None], [[1]], {"a": 1}, "CTNormalization",
]  # fmt: skip
"""Values of every type of JSON, those that a slip of the hand makes among them."""
KWARGS = ("configurations", "3d_fullres", "architecture", "arch_kwargs")
SHARE = 10  # of these values a field gets every tenth, its neighbour the next; all of all take minutes, and were tried
DATASET = DATASET_JSON | {"labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz", "numTraining": 5}


def planned(tiny: bool = True) -> dict:
    """FratMAE plans as the planner writes them, with what nnU-Net needs to preprocess."""
    plans = stock_plans((48, 40, 56), (1, 2, 0)) | {
        "dataset_name": "Dataset007_T", "plans_name": "FratMAEPlans", "label_manager": "LabelManager",
        "transpose_backward": [2, 0, 1], "experiment_planner_used": "FratMAEPlanner",
    }  # fmt: skip
    del plans["configurations"]["2d"]
    plans["configurations"]["3d_fullres"] |= {
        "data_identifier": "FratMAEPlans_3d_fullres", "preprocessor_name": "DefaultPreprocessor",
        "use_mask_for_norm": [False, False], "batch_dice": True,
    }  # fmt: skip
    settings = Settings(preset="vit_nano") if tiny else Settings()
    return json.loads(json.dumps(finish_plans(plans, DATASET, settings)))


def joint() -> dict:
    """Plans of a joint model, whose classifier fratmae_predict_stage reads."""
    plans = joint_plans(planned(), "3d_fullres", ["early", "advanced"])
    return json.loads(json.dumps(plans))


def leaves(part, path=()) -> list[tuple]:
    """The paths to every value of a JSON, containers included."""
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    return [(*path, key) for key, _ in items] + [one for key, value in items for one in leaves(value, (*path, key))]


def replaced(plans: dict, path: tuple, value) -> dict:
    """A copy with one value replaced, or taken out where `value` is Ellipsis."""
    plans = copy.deepcopy(plans)
    part = plans
    for key in path[:-1]:
        part = part[key]
    if value is ...:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return plans


def one_line(error: UserError) -> str:
    said = str(error)
    assert "\n" not in said and "\x00" not in said and len(said) < 900, said
    return said


def use(plans: dict) -> None:
    """What our commands do with plans that were read, up to the networks."""
    check_plans(plans, "FratMAEPlans.json", DATASET)
    resolve(plans["configurations"], "3d_fullres")
    again, _ = prepare_plans(plans, "3d_fullres", DATASET)
    json.dumps(again)
    check_whole_body(plans, "FratMAEPlans.json")
    staging_plans(plans, ["early", "advanced"])
    plan_and_preprocess._reopened(plans)
    fill_missing.dispensable(plans)
    kwargs = again["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert math.prod(kwargs["patch_size"]) <= 2**28 and all(map(math.isfinite, kwargs["scale"] + kwargs["shift"]))


@pytest.mark.parametrize("plans", [planned(), joint()], ids=["planned", "joint"])
def test_any_value_of_any_field_is_right_or_refused_in_one_line(plans, monkeypatch):
    monkeypatch.delenv("FRATMAE_PRETRAINED", raising=False)
    use(plans)
    tried = refused = 0
    values = [*NASTY, ...]
    for number, path in enumerate(leaves(plans)):
        if path[-1] == "pretrained":
            continue  # the name of a folder
        for value in values[number % SHARE :: SHARE]:
            tried += 1
            try:
                use(replaced(plans, path, copy.deepcopy(value)))
            except UserError as error:
                one_line(error)
                refused += 1
    assert refused > tried / 2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PLANNED = planned()


@hypothesis_settings(deadline=None, max_examples=50)
@given(st.sampled_from([path for path in leaves(PLANNED) if path[-1] != "pretrained"]), json_values)
def test_any_json_in_any_place_is_right_or_refused(path, value):
    try:
        use(replaced(PLANNED, path, value))
    except UserError as error:
        one_line(error)


@pytest.mark.parametrize("plans", NASTY, ids=lambda value: type(value).__name__)
def test_a_file_of_anything_else_is_no_plans(plans, tmp_path):
    (tmp_path / "FratMAEPlans.json").write_text(json.dumps(plans), encoding="utf-8")
    with pytest.raises(UserError, match=r"FratMAEPlans\.json: ") as error:
        read_plans(tmp_path / "FratMAEPlans.json")
    one_line(error.value)


def edited(**values) -> dict:
    """Plans with values of dotted keys of the block "fratmae"; a double underscore is the dot."""
    plans = planned()
    for key, value in values.items():
        *path, last = key.split("__")
        part = plans["fratmae"]
        for name in path:
            part = part[name]
        part[last] = value
    return plans


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("finetune__batch_size", 0, "fratmae.finetune.batch_size must be at least 1, not 0"),
        ("finetune__batch_size", 10**9, "fratmae.finetune.batch_size must be at most 65536, not 1000000000"),
        ("finetune__batch_size", "two", 'fratmae.finetune.batch_size="two": must be a whole number or null'),
        ("finetune__batch_size", 2.5, "fratmae.finetune.batch_size=2.5: must be a whole number"),
        ("finetune__batch_size", True, "fratmae.finetune.batch_size=true: must be a whole number"),
        ("staging__workers", 10**6, "fratmae.staging.workers must be at most 256"),
        ("pretrain__seed", 2**40, "fratmae.pretrain.seed must be at most 4294967295"),
        ("finetune__learning_rate", math.nan, "fratmae.finetune.learning_rate must be a finite number, not NaN"),
        ("finetune__learning_rate", 100, "fratmae.finetune.learning_rate must be at most 1"),
        ("finetune__epochs", None, "fratmae.finetune.epochs=null: must be a whole number"),
        ("wholebody__grid", [4096] * 3, "fratmae.wholebody.grid .* has more than 2.7e+08 voxels"),
        ("finetune", [1], r"fratmae.finetune must be {...}, not \[1\]"),
        ("finetune__batchsize", 2, "fratmae: unknown key finetune.batchsize; there are patch, batch_size"),
        ("preset", "vit_x", "fratmae.preset .-preset. vit_x: unknown; there are vit_l"),
    ],
)
def test_a_wrong_setting_is_named_with_file_and_field(key, value, says, tmp_path):
    path = tmp_path / "FratMAEPlans.json"
    path.write_text(json.dumps(edited(**{key: value})), encoding="utf-8")
    with pytest.raises(UserError, match=says.replace("+", r"\+")) as error:
        read_plans(path)
    assert str(error.value).startswith(f"{path}: fratmae")
    with pytest.raises(UserError, match=says.replace("+", r"\+")):
        plan_and_preprocess.planned_settings(path, [])


@pytest.mark.parametrize(
    "assignment, says",
    [
        ("finetune.batch_size=0", "fratmae.finetune.batch_size must be at least 1, not 0"),
        ("finetune.batch_size=true", "must be a whole number"),
        ("finetune.learning_rate=NaN", "must be a finite number"),
        ("pretrain.workers=1e3", "must be a whole number"),
        ("pretrain.batch_size=1000000000", "must be at most 65536"),
        ("pretrain.dataset_weights=[0,0]", "one of them must be above 0"),
        ("pretrain.dataset_weights=[1e400]", "must be a finite number"),
        ("token_patch=[1,1,1] finetune.patch=[64,64,64]", "has 262144 tokens"),
        ("finetune.patch=[256,256,256] finetune.batch_size=1000", "fratmae.finetune.batch_size 1000 of patches"),
        ("staging.target=", "staging.target must be"),
        ("pretrained=a\nb", "must be a line"),
    ],
)
def test_settings_of_the_command_line_have_the_same_bounds(assignment, says):
    with pytest.raises(UserError, match=says) as error:
        override(Settings(), assignment.split(" "))
    one_line(error.value)


def test_what_was_right_stays_right():
    """The ends of what the settings' own words allow, and 1 for 1.0."""
    block = {"finetune": {"learning_rate": 1, "mirror_axes": "", "layer_decay": 1, "foreground": 1},
             "staging": {"patience": None, "workers": 0},
             "pretrain": {"held_out": 0, "dataset_weights": [0, 2]}}  # fmt: skip
    assert build(Settings, block, "fratmae.").finetune.learning_rate == 1.0
    check_plans(planned(tiny=False), "FratMAEPlans.json", DATASET)


def test_stock_plans_of_other_configurations_stay_right():
    plans = stock_plans() | {"dataset_name": "Dataset007_T"}
    plans["configurations"]["3d_lowres"] = {"data_identifier": "x", "inherits_from": "3d_fullres"}
    check_plans(plans, "nnUNetPlans.json", DATASET)
    extend_plans(plans, DATASET, Settings())


@pytest.mark.parametrize(
    "path, value, says",
    [
        (("configurations", "3d_fullres"), ..., "configurations?.*3d_fullres"),
        (("configurations", "3d_fullres", "spacing"), [0, 1, 1], "configurations.3d_fullres.spacing must be at least"),
        (("configurations", "3d_fullres", "patch_size"), [4096] * 3, "3d_fullres.patch_size .* voxels"),
        (("configurations", "3d_fullres", "normalization_schemes"), ["../x", "a"], "the name of one of nnU-Net's"),
        (("configurations", "wholebody", "inherits_from"), "wholebody", "leads back to itself"),
        (("configurations", "wholebody", "inherits_from"), "nowhere", "configuration nowhere is not in the plans"),
        (("configurations", "wholebody", "data_identifier"), "../Dataset008_Other", "is no name of a folder"),
        (("configurations", "wholebody", "data_identifier"), "/tmp", "is no name of a folder"),
        (("configurations", "wholebody", "data_identifier"), "gt_segmentations", "where nnU-Net keeps the labels"),
        (("configurations", "wholebody", "data_identifier"), "FratMAEPlans_3d_fullres", "that of 3d_fullres, too"),
        (("configurations", "3d_fullres", "data_identifier"), "..", "is no name of a folder"),
        (("plans_name",), "../FratMAEPlans", "plans_name: is no name"),
        (("dataset_name",), "a/b", "dataset_name: is no name"),
        (("transpose_forward",), [0, 0, 1], "transpose_forward=.*: must be 0, 1 and 2 in some order"),
        (("transpose_backward",), [0, 1, 2], "transpose_backward=.* must be .2, 0, 1., which undoes"),
        (("foreground_intensity_properties_per_channel", "1"), ..., "channel.1 is missing; put it back"),
        (("foreground_intensity_properties_per_channel", "0", "std"), math.inf, "0.std must be a finite number"),
        ((*KWARGS, "axes"), [0, 1, 1], "arch_kwargs.axes=.* order"),
        ((*KWARGS, "shift"), [math.inf, 0], "arch_kwargs.shift must be a finite number"),
        ((*KWARGS, "embed_dim"), 10**6, "those of no preset"),
        ((*KWARGS, "rm"), 1, "unknown key rm"),
    ],
)
def test_nnunets_part_is_read_with_the_same_care(path, value, says, tmp_path):
    folder = tmp_path / "Dataset007_T"
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(DATASET), encoding="utf-8")
    (folder / "FratMAEPlans.json").write_text(json.dumps(replaced(planned(), path, value)), encoding="utf-8")
    with pytest.raises(UserError, match=says) as error:
        load_plans(folder)
    assert one_line(error.value).startswith(f"{folder / 'FratMAEPlans.json'}: ")


@pytest.mark.parametrize("module", [predict_stage, fill_missing], ids=["predict_stage", "fill_missing"])
def test_edited_plans_of_a_model_folder_end_in_one_line(module, tmp_path):
    plans = joint()
    (tmp_path / "dataset.json").write_text(json.dumps(DATASET), encoding="utf-8")
    (tmp_path / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    module.read_model(tmp_path)
    for path in leaves(plans):
        for value in (None, -1, ...):
            (tmp_path / "plans.json").write_text(json.dumps(replaced(plans, path, value)), encoding="utf-8")
            try:
                module.read_model(tmp_path)
            except UserError as error:
                one_line(error)
    for text in ("", "{", "\xff\xfe", "[" * 100_000, "null"):
        (tmp_path / "plans.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError) as error:
            module.read_model(tmp_path)
        one_line(error.value)


@pytest.mark.parametrize("value", ["a missing block", {"wholebody": {"grid": None}}, {"wholebody": None}])
def test_pretraining_names_what_the_plans_lack(value, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "Dataset007_T"
    folder.mkdir()
    plans = planned()
    if isinstance(value, dict):
        plans["fratmae"] = value
    else:
        del plans["fratmae"]
    (folder / "dataset.json").write_text(json.dumps(DATASET), encoding="utf-8")
    (folder / "FratMAEPlans.json").write_text(json.dumps(plans), encoding="utf-8")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["fratmae_pretrain", "-d", "7", "-device", "cpu", "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        pretrain.main()
    said = str(stop.value)
    assert "unexpected" not in said and ("wholebody" in said or "fratmae is missing" in said)
    assert not Path(tmp_path / "out").exists()


def test_custom_configurations_survive_planning_again_and_are_looked_at(tmp_path):
    plans = planned()
    plans["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 3}
    check_plans(plans, "FratMAEPlans.json", DATASET)
    plans["configurations"]["mine"]["batch_size"] = 0
    check_plans(plans, "FratMAEPlans.json", DATASET)  # nobody uses it
    with pytest.raises(UserError, match="configurations.mine.batch_size must be at least 1"):
        check_plans(plans, "FratMAEPlans.json", DATASET, used=["mine"])
