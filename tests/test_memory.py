"""How many processes fit into the memory; images that are resampled in slabs come out as in one piece."""

from __future__ import annotations

import time

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from nnunet_fratmae.base import memory
from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion import geometry
from nnUNet_raw_conversion.dicom.names import select_rois

GB = 10**9


def write_cgroup(folder, limit, used, cache):
    folder.mkdir()
    (folder / "memory.max").write_text(f"{limit}\n", encoding="utf-8")
    (folder / "memory.current").write_text(f"{used}\n", encoding="utf-8")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n", encoding="utf-8")
    return folder


def test_free_memory_is_that_of_the_container_if_it_has_less(tmp_path):
    proc = tmp_path / "meminfo"
    proc.write_text("MemTotal:       24000000 kB\nMemAvailable:   10000000 kB\n", encoding="utf-8")
    assert memory.free_memory(proc, tmp_path / "none") == 10_240_000_000
    small = write_cgroup(tmp_path / "small", 8 * GB, 5 * GB, 2 * GB)
    assert memory.free_memory(proc, small) == 5 * GB
    assert memory.free_memory(proc, write_cgroup(tmp_path / "all", "max", 5 * GB, 0)) == 10_240_000_000
    assert memory.free_memory(tmp_path / "no", tmp_path / "none") is None


@pytest.mark.parametrize(
    ("asked", "need", "free", "fit", "words"),
    [
        (4, 0, 8 * GB, 4, None),
        (4, 3 * GB, None, 4, None),
        (4, 3 * GB, 30 * GB, 4, None),
        (4, 3 * GB, 8 * GB, 2, "-np 4: 2 at once, for a study needs up to 3.0 GB and 8.0 GB of memory are free"),
        (4, 3 * GB, 2 * GB, 1, "-np 4: 1 at once, for a study needs up to 3.0 GB and 2.0 GB of memory are free; that"),
        (1, 3 * GB, 3.5 * GB, 1, None),
    ],
)
def test_processes_that_fit(monkeypatch, asked, need, free, fit, words):
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    number, line = memory.fitting(asked, need)
    assert number == fit and (line.startswith(words) if words else line == "")


@pytest.mark.parametrize("turn", [(0, 0, 0), (5, -10, 20), (0, 0, 180)])
@pytest.mark.parametrize("spacing", [(1.1, 1.3, 1.7), (5.0, 4.0, 6.0)])
def test_resampling_in_slabs(monkeypatch, turn, spacing):
    moving = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(37, 30, 33)).astype(np.float32))
    moving.SetSpacing(spacing)
    moving.SetOrigin((-20.0, 3.0, 7.0))
    moving.SetDirection(Rotation.from_euler("xyz", turn, degrees=True).as_matrix().ravel().tolist())
    reference = sitk.Image([17, 14, 41], sitk.sitkUInt8)
    reference.SetSpacing((3.0, 2.5, 4.0))
    reference.SetOrigin((-25.0, 0.0, -40.0))  # begins and ends outside of `moving`
    whole = geometry.resample_to(moving, reference, -7)
    monkeypatch.setattr(geometry, "AT_ONCE", 3000)
    slabs = geometry.resample_to(moving, reference, -7)
    np.testing.assert_allclose(sitk.GetArrayFromImage(slabs), sitk.GetArrayFromImage(whole), atol=1e-5)
    assert geometry.same_grid(slabs, reference) and slabs.GetPixelID() == sitk.sitkFloat32


def test_an_expression_that_takes_for_ever():
    began = time.monotonic()
    with pytest.raises(UserError, match="takes more than 1 s") as error:
        select_rois(["a" * 60 + "!"], "^(a|aa|a?a)+$")
    assert time.monotonic() - began < 10 and error.value.code == "ROI_PATTERN"
    with pytest.raises(UserError, match="is no regular expression"):
        select_rois(["a"], "(")
