"""The memory model against torch, sizes that fit a memory target, an artefact's plan, planning again."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.networks.staging import FratMAEJoint
from nnunet_fratmae.networks.unetr import FratMAEUNETR
from plans.extension import extend_plans
from plans.memory import FIXED_GB, GB, step_memory, tally
from plans.plan_and_preprocess import planned_settings
from plans.planner import finish_plans, reoriented
from plans.preprocessed import check_splits
from plans.settings import PRESETS, Finetune, Settings, Staging
from plans.vit_pair import MIN_TOKENS, choose_sizes, training_memory
from tests.test_plans import DATASET_JSON, stock_plans, write_artefact

WHOLE_BODY = (400, 380, 326)  # median (H, W, D) in voxels


def numbers_kept(network: torch.nn.Module, inputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> float:
    """Numbers of float32 that autograd keeps of a forward pass, besides the network's own."""
    own = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(inputs)
    del output
    return sum(kept.values()) / 4


@pytest.mark.parametrize(
    "preset, token, patch, classes, channels",
    [
        ("vit_tiny", (8, 16, 16), (16, 32, 48), 2, (0, 1)),
        ("vit_tiny", (4, 8, 8), (16, 24, 32), 4, (0, 1)),
        ("vit_tiny", (2, 4, 16), (8, 12, 32), 2, (0, 1)),
        ("vit_s", (8, 16, 16), (16, 48, 64), 2, (0, 1)),
        ("vit_tiny", (4, 8, 8), (16, 24, 32), 2, (None, 0)),
    ],
)
def test_the_count_is_what_torch_keeps(preset, token, patch, classes, channels):
    """All parameters, and within 2 % the numbers that autograd keeps of a forward pass (without the loss)."""
    sizes, batch = PRESETS[preset], 2
    network = FratMAEUNETR(2, classes, patch, token, **sizes.encoder, features=sizes.unetr_features,
                           modalities=channels)  # fmt: skip
    count = tally(sizes, token, patch, classes, modalities=len(network.encoders))
    assert count.parameters == sum(p.numel() for p in network.parameters())
    kept = numbers_kept(network, torch.randn(batch, 2, *patch))
    of_loss = math.prod(patch) * (4 * classes + 1)
    assert count.kept + count.kept_fp32 - of_loss == pytest.approx(kept / batch, rel=0.02)


def test_studies_of_a_joint_branch_are_counted():
    sizes, token, patch, study = PRESETS["vit_tiny"], (4, 8, 8), (8, 24, 32), (16, 40, 48)
    stages = {"patch_size": study, "classes": ["early", "advanced"], "dropout": 0.1}
    network = FratMAEJoint(2, 2, patch, token, **sizes.encoder, features=sizes.unetr_features, stages=stages)
    patches, studies = torch.randn(2, 2, *patch), torch.randn(3, 2, *study)
    both, alone = numbers_kept(network, (patches, studies)), numbers_kept(network, patches)

    def memory(**kwargs) -> float:
        many = 64  # patches, so that the backward pass is the fullest moment; on a CPU all numbers have four bytes
        return step_memory(sizes, token, patch, many, 2, "cpu", **kwargs)

    assert (memory(studies=(study, 3)) - memory()) * 1e9 / 4 == pytest.approx(both - alone, rel=0.05)
    planned = Settings(finetune=Finetune(gpu_memory_target=24.0), staging=Staging(batch_size=8))
    joint = replace(planned, finetune=replace(planned.finetune, stage_weight=0.1))
    batches = [choose_sizes(s, WHOLE_BODY).finetune.batch_size for s in (planned, joint)]
    assert batches[0] > batches[1] > 2


def test_memory_grows_with_everything():
    def memory(preset="vit_s", patch=(32, 96, 128), batch=2, classes=2, device="cuda") -> float:
        return step_memory(PRESETS[preset], (8, 16, 16), patch, batch, classes, device)

    assert memory() < memory(batch=3) < memory(batch=4)
    assert memory() < memory(preset="vit_b") < memory(preset="vit_l")
    assert memory() < memory(patch=(32, 96, 144))
    assert memory() < memory(classes=5)
    per_patch = [(memory(batch=5, device=d) - memory(batch=4, device=d)) for d in ("cuda", "cpu")]
    assert 1.5 < per_patch[1] / per_patch[0] < 2, "float32 keeps almost twice as much as half precision"


def test_an_idle_step_holds_weights_gradients_and_moments():
    sizes = PRESETS["vit_b"]
    smallest = step_memory(sizes, (16, 16, 16), (16, 16, 16), 1, device="cpu") - FIXED_GB["cpu"]
    assert smallest == pytest.approx(16 * tally(sizes, (16, 16, 16), (16, 16, 16)).parameters / GB, rel=0.02)


@pytest.mark.parametrize("target, batch", [(8, 2), (24, None), (40, 16), (160, 16)])
def test_whole_bodies_get_the_papers_patch_and_as_many_as_fit(target, batch):
    """The paper: 32x160x192, 16 of them on 4 x 40 GB."""
    chosen = choose_sizes(Settings(finetune=Finetune(gpu_memory_target=target)), WHOLE_BODY)
    assert chosen.finetune.patch == (32, 160, 192)
    assert chosen.finetune.batch_size == batch or (batch is None and 2 < chosen.finetune.batch_size < 16)


@hypothesis_settings(deadline=None)
@given(
    st.tuples(st.integers(8, 700), st.integers(8, 700), st.integers(8, 900)),
    st.sampled_from(sorted(PRESETS)), st.floats(2, 100), st.integers(2, 6),
)  # fmt: skip
def test_what_is_chosen_fits_and_no_more_would(median, preset, target, classes):
    """If 128 tokens fit at all, the choice fits; one patch more would not (below 16); it shrinks only if it must."""
    chosen = choose_sizes(Settings(preset=preset, finetune=Finetune(gpu_memory_target=target)), median, classes)
    patch, batch = chosen.finetune.patch, chosen.finetune.batch_size

    def needed(patch, batch) -> float:
        return training_memory(chosen, patch, batch, classes)

    full = choose_sizes(Settings(preset=preset, finetune=Finetune(gpu_memory_target=1e6)), median, classes)
    assert full.token_patch == chosen.token_patch and full.finetune.batch_size == 16
    assert all(p % t == 0 for p, t in zip(patch, chosen.token_patch, strict=True))
    if patch != full.finetune.patch:
        assert batch == 2 and needed(full.finetune.patch, 2) > target
    if needed(patch, batch) > target:
        assert batch == 2 and math.prod(p // t for p, t in zip(patch, chosen.token_patch, strict=True)) < 2 * MIN_TOKENS
    elif batch < 16:
        assert needed(patch, batch + 1) > target


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_spacings_are_those_of_the_axes_that_the_reader_gives(order, tmp_path):
    image = sitk.GetImageFromArray(np.zeros((5, 4, 3), np.float32))  # z, y, x
    image.SetSpacing((1.0, 2.0, 5.0))
    stored = sitk.Flip(sitk.PermuteAxes(image, order), [True, False, True])
    sitk.WriteImage(stored, str(tmp_path / "a.nii.gz"))
    data, properties = SimpleITKIOWithReorient().read_images([str(tmp_path / "a.nii.gz")])
    for lies, expected in ((stored.GetSpacing(), properties["spacing"]), (stored.GetSize(), data.shape[1:])):
        assert reoriented(lies[::-1], str(tmp_path / "a.nii.gz")) == pytest.approx(list(expected))


def test_a_network_that_cannot_fit_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"vit_l: 2 patches .* about 1\d\.\d GB, more than .*=8; .*smaller -preset"):
        extend_plans(stock_plans(), DATASET_JSON, Settings(preset="vit_l"))
    given_sizes = Finetune(patch=(32, 96, 96), batch_size=2)
    extend_plans(stock_plans(), DATASET_JSON, Settings(preset="vit_l", finetune=given_sizes))  # a user's own choice


def test_regions_and_many_labels_count():
    labels = {name: i for i, name in enumerate(["background", *"abcdefgh"])}
    few, _ = extend_plans(stock_plans(), DATASET_JSON, Settings(finetune=Finetune(gpu_memory_target=16)))
    many, _ = extend_plans(stock_plans(), DATASET_JSON | {"labels": labels}, Settings.from_json(
        {"finetune": {"gpu_memory_target": 16}}))  # fmt: skip
    batches = [plans["configurations"]["3d_fullres"]["batch_size"] for plans in (few, many)]
    assert batches[1] <= batches[0]
    sizes, token, patch = Settings().sizes, (8, 16, 16), (32, 160, 192)
    assert step_memory(sizes, token, patch, 2, classes=len(labels)) > step_memory(sizes, token, patch, 2, classes=2)


# ------------------------------------------------------------------------------------------------ planning once more


def planned(tmp_path, shape_zyx=(326, 400, 380), settings=None, **edits):
    """FratMAEPlans.json of a dataset with this median shape, its block edited by hand ("part.key": value)."""
    plans = finish_plans(stock_plans(shape_zyx, (1, 2, 0)), DATASET_JSON, settings or Settings())
    plans = json.loads(json.dumps(plans))
    for key, value in edits.items():
        part, _, last = key.rpartition(".")
        (plans["fratmae"][part] if part else plans["fratmae"])[last] = value
    path = tmp_path / "FratMAEPlans.json"
    path.write_text(json.dumps(plans), encoding="utf-8")
    return path


def test_planning_again_keeps_edits_and_chooses_the_rest_anew(tmp_path, capsys):
    path = planned(tmp_path, **{"pretrain.epochs": 77, "finetune.batch_size": 5, "preset": "vit_s"})
    settings = planned_settings(path, ["finetune.epochs=9"])
    assert (settings.pretrain.epochs, settings.finetune.batch_size, settings.finetune.epochs) == (77, 5, 9)
    assert settings.preset == "vit_s"
    assert settings.token_patch is None and settings.finetune.patch is None
    assert (settings.wholebody.grid, settings.wholebody.patch, settings.wholebody.k) == (None, None, None)
    said = capsys.readouterr().out
    assert "preset=vit_s" in said and "pretrain.epochs=77" in said and "remove it to start afresh" in said
    smaller, _ = extend_plans(stock_plans((60, 41, 39), (1, 2, 0)), DATASET_JSON, settings)
    assert smaller["fratmae"]["wholebody"]["grid"] == [44, 40, 64] and smaller["fratmae"]["token_patch"] == [4, 8, 8]


def test_sizes_that_were_said_stay_and_the_command_wins(tmp_path):
    path = planned(tmp_path, settings=Settings(preset="vit_tiny", finetune=Finetune(patch=(16, 64, 96))))
    assert planned_settings(path, []).finetune.patch == (16, 64, 96)
    settings = planned_settings(path, ["preset=vit_b", "finetune.patch=null", "finetune.gpu_memory_target=24"])
    assert (settings.preset, settings.finetune.patch, settings.finetune.gpu_memory_target) == ("vit_b", None, 24.0)


def test_planning_twice_is_planning_once(tmp_path):
    path = planned(tmp_path)
    first = json.loads(path.read_text(encoding="utf-8"))
    again = finish_plans(stock_plans((326, 400, 380), (1, 2, 0)), DATASET_JSON, planned_settings(path, []))
    assert json.loads(json.dumps(again)) == first
    assert set(first["fratmae_chosen"]) == {
        "token_patch", "wholebody.grid", "wholebody.patch", "wholebody.k", "finetune.patch", "finetune.batch_size",
        "modalities",
    }  # fmt: skip


def test_without_earlier_plans_the_defaults_count(tmp_path, capsys):
    assert planned_settings(tmp_path / "FratMAEPlans.json", []) == Settings()
    assert capsys.readouterr().out == ""


def test_a_wrong_edit_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"unknown key finetune\.epoch;"):
        planned_settings(planned(tmp_path, **{"finetune.epoch": 3}), [])


def test_plans_that_are_no_json_or_lack_a_part_are_no_riddle(tmp_path):
    path = planned(tmp_path)
    plans = json.loads(path.read_text(encoding="utf-8"))
    del plans["fratmae"]["wholebody"]
    path.write_text(json.dumps(plans), encoding="utf-8")
    assert planned_settings(path, []).wholebody.grid is None
    path.write_text(path.read_text(encoding="utf-8")[:-1] + ",", encoding="utf-8")
    with pytest.raises(UserError, match=r"FratMAEPlans.json: is no JSON \(.*line 1.*; mend it there"):
        planned_settings(path, [])


def test_folds_that_changed_are_named_before_nnunet_asserts(tmp_path, monkeypatch):
    """More folds in the preprocessed dataset, or another order within one, are none of it."""
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    raw, preprocessed = (tmp_path / part / "Dataset003_Toy" for part in ("raw", "preprocessed"))
    for folder, folds in ((raw, [["a", "b"]]), (preprocessed, [["b", "a"], ["c"]])):
        folder.mkdir(parents=True)
        check_splits(raw)
        (folder / "splits_final.json").write_text(
            json.dumps([{"train": fold, "val": ["d"]} for fold in folds]), encoding="utf-8"
        )
    check_splits(raw)
    (raw / "splits_final.json").write_text(json.dumps([{"train": ["a", "b", "e"], "val": ["d"]}]), encoding="utf-8")
    with pytest.raises(UserError, match="preprocessed/.*splits_final.json: has other folds than .*; remove it"):
        check_splits(raw)


# -------------------------------------------------------------------------------------------------------- an artefact


def test_the_plan_follows_the_artefact_and_names_it(tmp_path, monkeypatch):
    artefact = write_artefact(tmp_path / "artefact")  # vit_tiny, 4 x 8 x 8
    monkeypatch.chdir(tmp_path)
    settings = planned_settings(tmp_path / "none.json", [], "artefact")
    assert (settings.preset, settings.token_patch) == ("vit_tiny", (4, 8, 8))
    assert settings.pretrained == str(artefact), "a training may start in another folder"
    plans, _ = extend_plans(stock_plans(), DATASET_JSON, settings)
    kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert (kwargs["embed_dim"], kwargs["token_patch"]) == (192, [4, 8, 8])
    path = planned(tmp_path, settings=settings)
    assert planned_settings(path, []).pretrained == str(artefact), "it stays when planning again"
    assert planned_settings(path, ["pretrained=null"]).pretrained is None


@pytest.mark.parametrize("said", ["preset=vit_b", "token_patch=[8,16,16]"])
def test_other_sizes_than_the_artefacts_are_refused(said, tmp_path):
    with pytest.raises(UserError, match=r"the pretrained artefact .* leave it out"):
        planned_settings(tmp_path / "none.json", [said], str(write_artefact(tmp_path / "artefact")))


def test_an_artefact_beats_what_was_planned_before(tmp_path):
    path = planned(tmp_path)  # vit_b, 8 x 16 x 16
    settings = planned_settings(path, [], str(write_artefact(tmp_path / "artefact")))
    assert (settings.preset, settings.token_patch) == ("vit_tiny", (4, 8, 8))


def test_an_absent_artefact_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        planned_settings(tmp_path / "none.json", [], str(tmp_path / "nowhere"))
