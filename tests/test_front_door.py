"""The networks' front door: one warning where what they are shown cannot be HU and SUV, none where it can."""

import numpy as np
import pytest
import torch

from nnunet_fratmae.base.units import to_units
from nnunet_fratmae.networks import front_door
from nnunet_fratmae.networks.unetr import FratMAEUNETR

SIZES = {"patch_size": (16, 32, 48), "token_patch": (8, 16, 16), "embed_dim": 24, "depth": 4, "num_heads": 2,
         "features": 4}  # fmt: skip


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    monkeypatch.setattr(front_door, "_warned", False)
    monkeypatch.setattr(front_door, "ENOUGH_VOXELS", 20_000)


def body(shape=(16, 32, 48), seed=0):
    """HU and SUV of a trunk with fat, a lung and a bladder of SUV 60 that fills a fortieth."""
    rng = np.random.default_rng(seed)
    h, w, d = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    radius = np.hypot(h, w)
    hu = np.where(radius < 0.7, 40, np.where(radius < 0.9, -100, -1000)) + rng.normal(0, 10, shape)
    hu[(radius < 0.4) & (d > 0.3)] = -800
    suv = np.where(radius < 0.9, 0.8, 0.02) + rng.exponential(0.05, shape)
    suv[(radius < 0.3) & (d < -0.5)] = 60
    return torch.tensor(hu, dtype=torch.float32), torch.tensor(suv, dtype=torch.float32)


def seen(hu, suv, **options):
    """What nnU-Net makes of a study with plans of ours."""
    return torch.stack([to_units("CT", hu), to_units("PET", suv)])[None]


def warnings_of(batches, capsys, names=("CT", "PET")):
    door = front_door.Watch(list(names))
    for batch in batches:
        door.look(batch)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) <= 1
    return lines[0] if lines else ""


def test_bodies_air_and_missing_modalities_are_no_reason(capsys):
    hu, suv = body()
    air = torch.zeros(1, 2, 16, 32, 48)
    real = seen(hu, suv)
    assert not warnings_of([air] * 500 + [real] * 200 + [air] * 300 + [real], capsys)
    assert not warnings_of([seen(torch.full_like(hu, -1024), suv)] * 70, capsys)
    assert not warnings_of([seen(hu, suv * 0)] * 70, capsys)
    assert not warnings_of([real[:, :1]] * 70, capsys, ["CT"]) and not warnings_of([real[:, 1:]] * 70, capsys, ["PET"])
    z_scores = torch.stack([(v - v.mean()) / v.std() for v in (hu, suv)])[None]  # of plans that cannot be inverted
    assert not warnings_of([z_scores] * 70, capsys)


def test_what_cannot_be_is_told_once(capsys):
    hu, suv = body()
    nan = seen(hu, suv)
    nan[0, 0, 3, 4, 5] = torch.nan
    for batch, said in ((seen(hu, suv * 4000), "of the PET is above SUV 25"), (nan, "the CT has voxels that are NaN"),
                        (seen(suv, hu), "swapped"), (seen(suv, suv), "the CT has no fat and no air"),
                        (seen(hu + 1024, suv), "the CT has no fat")):  # fmt: skip
        front_door._warned = False
        assert said in warnings_of([batch] * 5, capsys)
    front_door._warned = False
    assert "are empty" in warnings_of([torch.zeros(1, 2, 16, 32, 48)] * 1100, capsys)


def test_a_bad_study_after_many_good_ones_is_told(capsys):
    hu, suv = body()
    assert "above SUV 25" in warnings_of([seen(hu, suv)] * 1000 + [seen(hu, suv * 4000)] * 200, capsys)


@pytest.mark.parametrize(("modalities", "scale"), [((0, 1), (1.0, 1.0)), ((1, 0), (2.0, 0.5)), ((None, 0), (1.0, 1.0))])
def test_the_network_looks_in_prediction_only(modalities, scale, capsys):
    channels = 2 if None not in modalities else 1
    network = FratMAEUNETR(channels, 2, **SIZES, modalities=modalities, scale=scale)
    hu, suv = body()
    x = seen(hu, suv * 4000)[0] / torch.tensor(scale).view(2, 1, 1, 1)
    x = torch.stack([x[modalities.index(channel)] for channel in range(channels)])[None]
    network.train()(x)
    assert not capsys.readouterr().err
    with torch.inference_mode():
        for _ in range(3):
            network.eval()(x)
    assert capsys.readouterr().err.count("WARNING") == 1
    assert not [name for name in network.state_dict() if "front_door" in name]


def test_a_compiled_network_is_one_graph_and_does_not_look(capsys):
    network = FratMAEUNETR(2, 2, **SIZES).eval()
    hu, suv = body()
    x = seen(hu, suv * 4000)
    with torch.inference_mode():
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        result = compiled(x)
        assert not capsys.readouterr().err
        torch.testing.assert_close(result, network(x))
