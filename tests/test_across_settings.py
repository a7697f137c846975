"""Pretrained encoders under other settings: the same function of the same patient, or one line that refuses.

What a patient is to an encoder: HU and SUV along H, W, D (to anterior, to the right, to the head). Plans may store it
along other axes, in another order of channels and normalised by other constants; the tokens must not know. Voxel size
is no part of the function: pretraining resizes every body to one grid (paper section 2.2), fine-tuning reads native
voxels (section 2.4), and the encoders see voxels in both.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization, NoNormalization
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from safetensors.torch import load_file, save_file

from nnunet_fratmae.artefact import load_encoders, load_pretrained, save_artefact
from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.units import PRETRAINING_UNITS, to_units
from nnunet_fratmae.networks.vit import ViTEncoder, dual_encoders
from nnunet_fratmae.trainer import prepare_plans
from plans.extension import extend_plans
from plans.front_door import intensity_properties
from plans.settings import PRESETS, Settings
from tests.test_plans import contract, stock_plans

TOKEN, PATCH = (4, 8, 8), (8, 24, 16)  # a grid of 2 x 3 x 2 tokens
TRANSPOSES = list(itertools.permutations(range(3)))
SCHEMES = {"CTNormalization": CTNormalization, "NoNormalization": NoNormalization}
few = hypothesis_settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def artefact(tmp_path_factory) -> Path:
    """Encoders of random weights, pretrained on patches of another shape than any below, of an axial stack."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("across") / "artefact"
    folder.mkdir()
    encoders = dual_encoders((16, 16, 8), TOKEN, **PRESETS["vit_tiny"].encoder)
    terms = contract(patch=(16, 16, 8), grid=(16, 16, 32), k=2, stack="axial")
    save_artefact(folder, encoders.state_dict(), terms)
    return folder


def plans_for(artefact: Path | None, transpose=(0, 1, 2), **finetune: Any) -> dict[str, Any]:
    h, w, d = PATCH
    plans = stock_plans((d, h, w), transpose)
    plans["fratmae"] = {
        "preset": "vit_tiny", "token_patch": TOKEN, "pretrained": artefact and str(artefact),
        "finetune": {"patch": PATCH, "batch_size": 2, **finetune},
    }  # fmt: skip
    return json.loads(json.dumps(plans))


def channels(*names: str) -> dict[str, Any]:
    return {"channel_names": dict(enumerate(names)), "fratmae": {"modalities": list(names)}}


def a_patient(seed: int = 0, shape=PATCH) -> dict[str, torch.Tensor]:
    """HU and SUV (H, W, D), beyond what pretraining keeps on both sides."""
    generator = torch.Generator().manual_seed(seed)
    uniform = {name: torch.rand(shape, generator=generator) for name in ("CT", "PET")}
    return {"CT": uniform["CT"] * 4500 - 1500, "PET": uniform["PET"] ** 3 * 60}


def as_preprocessed(patient: dict[str, torch.Tensor], plans: dict[str, Any], names: list[str]) -> torch.Tensor:
    """(1, C, *plans' axes): the file's (z, y, x), normalised and transposed by what nnU-Net itself does."""
    config, volumes = plans["configurations"]["3d_fullres"], []
    for channel, name in enumerate(names):
        array = patient.get(name, torch.ones(patient["CT"].shape)).permute(2, 0, 1).numpy()  # (z, y, x) = (D, H, W)
        properties = plans["foreground_intensity_properties_per_channel"][str(channel)]
        normalise = SCHEMES[config["normalization_schemes"][channel]](False, properties)
        volumes.append(normalise.run(array.astype(np.float32).copy()).transpose(plans["transpose_forward"]))
    return torch.from_numpy(np.stack(volumes))[None]


def tokens_seen(plans: dict[str, Any], dataset_json: dict[str, Any], image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens (1, 1 + N, dim) of both encoders in the network that stock nnU-Net builds from the prepared plans."""
    prepared, _ = prepare_plans(plans, "3d_fullres", dataset_json)
    config = json.loads(json.dumps(prepared))["configurations"]["3d_fullres"]
    assert list(image.shape[2:]) == config["patch_size"]
    architecture = config["architecture"]
    network = get_network_from_plans(architecture["network_class_name"], architecture["arch_kwargs"], [],
                                     image.shape[1], 2, deep_supervision=False).eval()  # fmt: skip
    load_encoders(plans["fratmae"]["pretrained"], network.encoders)
    seen: dict[str, torch.Tensor] = {}
    for name, encoder in network.encoders.items():
        encoder.norm.register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        logits = network(image)
    assert logits.shape == (1, 2, *image.shape[2:])
    return seen


def tokens_of_pretraining(artefact: Path, patient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What pretraining computes: the pretraining units of HU and SUV, along (H, W, D)."""
    encoders = load_pretrained(artefact, tuple(patient["CT"].shape))
    with torch.no_grad():
        return {name: encoder(to_units(name, patient[name])[None, None]) for name, encoder in encoders.items()}


def assert_same(seen: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(seen) == set(expected)
    for name, tokens in expected.items():
        torch.testing.assert_close(seen[name], tokens, atol=2e-4, rtol=1e-4)


# --------------------------------------------------------------------------------- axes, channels and normalisation


@pytest.mark.parametrize("transpose", TRANSPOSES)
@pytest.mark.parametrize("names", [["CT", "PET"], ["PET", "CT"]])
def test_axes_and_order_of_channels_are_not_seen(transpose, names, artefact):
    """All six orders of axes, both of channels, normalised by a stock planner's constants."""
    plans, dataset_json = plans_for(artefact, transpose), channels(*names)
    for channel, name in enumerate(names):
        plans["foreground_intensity_properties_per_channel"][str(channel)] = intensity_properties(name)
    patient = a_patient()
    assert_same(tokens_seen(plans, dataset_json, as_preprocessed(patient, plans, names)),
                tokens_of_pretraining(artefact, patient))  # fmt: skip


numbers = {"mean": st.floats(-500, 500), "std": st.floats(0.5, 500)}
ranges = {
    "CT": st.tuples(st.floats(-2000, -300), st.floats(600, 3000)),
    "PET": st.tuples(st.floats(-1, 1), st.floats(15, 80)),
}


@few
@given(data=st.data(), transpose=st.sampled_from(TRANSPOSES), scheme=st.sampled_from(sorted(SCHEMES)))
def test_constants_of_the_normalisation_are_not_seen(data, transpose, scheme, artefact):
    """Any mean and spread, and values beyond what pretraining keeps, of a PET up to SUV 80 too: the tokens are those of
    pretraining. What the plans themselves cut off is gone before any network; of the rest it is the same function."""
    plans, names = plans_for(artefact, transpose), ["CT", "PET"]
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = [scheme, scheme]
    patient = a_patient(data.draw(st.integers(0, 99)))
    left = dict(patient)
    for channel, name in enumerate(names):
        low, high = data.draw(ranges[name])
        properties = {key: data.draw(value) for key, value in numbers.items()}
        properties |= {"percentile_00_5": low, "percentile_99_5": high}
        plans["foreground_intensity_properties_per_channel"][str(channel)] = properties
        if scheme == "CTNormalization":
            left[name] = patient[name].clip(low, high)
    assert_same(tokens_seen(plans, channels(*names), as_preprocessed(patient, plans, names)),
                tokens_of_pretraining(artefact, left))  # fmt: skip


def test_padding_is_air_on_our_plans(artefact):
    """nnU-Net pads with 0; on plans in pretraining units that is air without uptake."""
    for name in ("CT", "PET"):
        assert to_units(name, torch.tensor(PRETRAINING_UNITS[name].lower)) == 0
    plans = plans_for(artefact)
    for channel, name in enumerate(("CT", "PET")):
        plans["foreground_intensity_properties_per_channel"][str(channel)] = intensity_properties(name)
    h, w, d = PATCH
    air = {name: torch.full(PATCH, PRETRAINING_UNITS[name].lower) for name in ("CT", "PET")}
    assert_same(tokens_seen(plans, channels("CT", "PET"), torch.zeros(1, 2, d, h, w)),
                tokens_of_pretraining(artefact, air))  # fmt: skip


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"scheme": "ZScoreNormalization"}, "channel 0 .CT. has ZScoreNormalization"),
        ({"reader": "SimpleITKIO"}, "SimpleITKIO does not look at the orientation"),
    ],
)
def test_what_cannot_be_undone_is_refused(changes, says, artefact):
    """z-scores of each image lost HU and SUV, a reader without orientation lost the axes: with pretrained encoders one
    line that says what to do; from scratch a warning, for there is nothing to be like."""
    plans, dataset_json = plans_for(artefact), channels("CT", "PET")
    if "scheme" in changes:
        plans["configurations"]["3d_fullres"]["normalization_schemes"] = [changes["scheme"]] * 2
    plans["image_reader_writer"] = changes.get("reader", plans["image_reader_writer"])
    with pytest.raises(UserError, match=says) as error:
        prepare_plans(plans, "3d_fullres", dataset_json)
    assert "\n" not in str(error.value) and "plan" in str(error.value)
    with pytest.raises(UserError, match=says):
        extend_plans(plans, dataset_json, Settings.from_json(plans["fratmae"]))  # as planning with -pretrained
    for block in ({"finetune": {"from_scratch": True}}, {"pretrained": None}):
        _, notes = prepare_plans(plans | {"fratmae": block}, "3d_fullres", dataset_json)
        assert any(note.startswith("WARNING") for note in notes)


@pytest.mark.parametrize("reader", [NibabelIOWithReorient, SimpleITKIOWithReorient])
@pytest.mark.parametrize("codes", ["LPS", "RAS", "AIR", "SLP"])
def test_readers_that_reorient_give_the_axes_of_the_contract(reader, codes, tmp_path):
    """Either is taken as it is: to the head, to anterior, to the right, whatever the order in the file."""
    volume = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)  # to the right, to anterior, to the head
    image = nib.Nifti1Image(volume, np.diag([2.0, 3.0, 4.0, 1.0]))
    stored = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes))
    nib.save(image.as_reoriented(stored), tmp_path / "image.nii.gz")
    data, properties = reader().read_images([str(tmp_path / "image.nii.gz")])
    np.testing.assert_array_equal(data[0], volume.transpose(2, 1, 0))
    assert list(properties["spacing"]) == [4.0, 3.0, 2.0]


def test_spacing_is_no_part_of_the_function(artefact):
    """The same voxels at another spacing give the same encoders, only the decoder takes its steps in another order;
    resampling is nnU-Net's, before any network."""
    networks = []
    for spacing in ([3.0, 2.0, 2.0], [1.0, 4.0, 5.0]):
        plans = plans_for(artefact)
        plans["configurations"]["3d_fullres"]["spacing"] = spacing
        prepared, _ = prepare_plans(plans, "3d_fullres", channels("CT", "PET"))
        networks.append(prepared["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"])
    strides = [network.pop("strides") for network in networks]
    assert networks[0] == networks[1] and strides[0] != strides[1]


# -------------------------------------------------------------------------------------------- patch and token grid

sides = st.tuples(*(st.integers(1, 4) for _ in range(3)))


@few
@given(small=sides, more=sides)
def test_a_token_is_the_same_in_a_larger_grid(small, more):
    """Token (i, j, k) has one position embedding in every grid, and an encoder of a large patch that sees only a corner
    of it computes what an encoder of that corner does, with the same weights."""
    large = tuple(a + b for a, b in zip(small, more, strict=True))
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    big = ViTEncoder([n * t for n, t in zip(large, TOKEN, strict=True)], TOKEN, **sizes).eval()
    corner = ViTEncoder([n * t for n, t in zip(small, TOKEN, strict=True)], TOKEN, **sizes).eval()
    corner.load_state_dict(big.state_dict(), strict=True)
    places = [(i * large[1] + j) * large[2] + k for i, j, k in np.ndindex(*small)]
    assert torch.equal(corner.positions, big.positions[places])
    volume = torch.randn(1, 1, *(n * t for n, t in zip(large, TOKEN, strict=True)))
    h, w, d = (n * t for n, t in zip(small, TOKEN, strict=True))
    with torch.no_grad():
        seen = big(volume, torch.tensor([places]))
        torch.testing.assert_close(corner(volume[:, :, :h, :w, :d]), seen, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch", [(4, 8, 16), (16, 8, 32), (12, 40, 24)])
def test_any_patch_of_whole_tokens_takes_the_weights(patch, artefact):
    """From two tokens to more than in pretraining; which slices a stack took (coronal, axial, every k-th) is not in the
    weights."""
    plans, dataset_json = plans_for(artefact), channels("CT", "PET")
    plans["fratmae"]["finetune"]["patch"] = list(patch)
    for channel, name in enumerate(("CT", "PET")):
        plans["foreground_intensity_properties_per_channel"][str(channel)] = intensity_properties(name)
    patient = a_patient(shape=patch)
    assert_same(tokens_seen(plans, dataset_json, as_preprocessed(patient, plans, ["CT", "PET"])),
                tokens_of_pretraining(artefact, patient))  # fmt: skip


@pytest.mark.parametrize(
    "asked", [{"token_patch": [8, 16, 16]}, {"preset": "vit_s"}, {"preset": "vit_s", "token_patch": [2, 4, 4]}]
)
def test_token_patch_and_size_follow_the_artefact(asked, artefact):
    """The plans say otherwise, planned already or not: the network is the artefact's, and the log says so."""
    asked = {**asked, "finetune": {"patch": [8, 48, 32], "batch_size": 2}}
    as_planned, _ = extend_plans(stock_plans(), channels("CT", "PET"), Settings.from_json(asked))
    for plans in (stock_plans() | {"fratmae": asked}, as_planned):
        plans["fratmae"]["pretrained"] = str(artefact)
        prepared, notes = prepare_plans(plans, "3d_fullres", channels("CT", "PET"))
        kwargs = prepared["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        assert kwargs["token_patch"] == list(TOKEN) and kwargs["embed_dim"] == 192
        assert all(p % t == 0 for p, t in zip(kwargs["patch_size"], TOKEN, strict=True))
        assert any("follow the artefact" in note for note in notes)


# ---------------------------------------------------------------------------------------- weights that do not fit


@pytest.mark.parametrize(
    "token, sizes", [((8, 16, 16), PRESETS["vit_tiny"].encoder), (TOKEN, PRESETS["vit_tiny"].encoder | {"depth": 8}),
                     (TOKEN, PRESETS["vit_tiny"].encoder | {"embed_dim": 96})],
)  # fmt: skip
def test_a_network_of_another_shape_is_refused(token, sizes, artefact):
    """By us in one line, and by stock -pretrained_weights; nothing is loaded in part."""
    encoders = dual_encoders((8, 16, 16), token, **sizes)
    before = {name: value.clone() for name, value in encoders.state_dict().items()}
    with pytest.raises(UserError, match="does not fit the network") as error:
        load_encoders(artefact, encoders)
    assert "\n" not in str(error.value)
    if sizes["depth"] == 12:  # nnU-Net asks whether the network has its keys in the file, not the other way round
        network = torch.nn.ModuleDict({"encoders": encoders})
        with pytest.raises(AssertionError, match="shape|missing"):
            load_pretrained_weights(network, artefact / "encoders_nnunet.pth")
    assert all(torch.equal(before[name], value) for name, value in encoders.state_dict().items())


def change_weights(artefact: Path, folder: Path, change) -> Path:
    shutil.copytree(artefact, folder)
    weights = load_file(folder / "encoders.safetensors")
    change(weights)
    save_file(weights, folder / "encoders.safetensors")
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.pop("PET.blocks.3.attn.qkv.bias"),
        lambda w: w.update({"CT.pos_embed": torch.zeros(1, 5, 192)}),  # another ViT: positions that are learned
        lambda w: w.update({"CT.blocks.5.mlp.fc2.weight": torch.zeros(192, 10)}),
        lambda w: [w.update({n.replace("CT.", "MR."): w.pop(n)}) for n in list(w) if n.startswith("CT.")],
    ],
    ids=["missing", "left over", "other shape", "other modality"],
)
def test_foreign_weights_are_refused(change, artefact, tmp_path):
    folder = change_weights(artefact, tmp_path / "foreign", change)
    encoders = dual_encoders((8, 16, 16), TOKEN, **PRESETS["vit_tiny"].encoder)
    before = {name: value.clone() for name, value in encoders.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_encoders(folder, encoders)
    assert "encoders.safetensors" in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in encoders.state_dict().items())


@few
@given(share=st.floats(0.0, 0.999))
def test_weights_cut_off_anywhere_are_refused(share, artefact, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut") / "artefact"
    shutil.copytree(artefact, folder)
    weights = folder / "encoders.safetensors"
    os.truncate(weights, int(share * weights.stat().st_size))
    with pytest.raises(UserError, match="damaged or cut off"):
        load_pretrained(folder)


def test_as_many_weights_with_other_heads_are_refused(artefact, tmp_path):
    """Heads leave no trace in the shapes, so the contract has to know them."""
    folder = tmp_path / "heads"
    shutil.copytree(artefact, folder)
    path = folder / "encoders.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"num_heads": 6}), encoding="utf-8")
    with pytest.raises(UserError, match="not known to this version"):
        load_pretrained(folder)
