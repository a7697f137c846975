"""Disks that are full: each command ends in one line that names the file, and nothing half-written is left.

Here a file cannot become larger than a limit of the process, at which the operating system refuses as on a full disk.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_fratmae.artefact import NNUNET_NAME, save_artefact
from nnunet_fratmae.base.files import WriteError, check_writable, renamed, writing_to
from nnunet_fratmae.base.locks import alone_in
from nnunet_fratmae.fill_missing import write_absent
from nnunet_fratmae.networks.vit import dual_encoders
from nnunet_fratmae.predict_stage import write_stages
from plans.preprocessed import copy_labels, planning
from plans.settings import PRESETS
from pretraining import monitor, retrieve
from pretraining.fratmae import FratMAE, FratMAEMethod
from tests.test_plans import contract

SAYS = r"cannot be written to \(.*\); what was there before is whole"


@contextmanager
def full(most_bytes: int) -> Iterator[None]:
    """Within, no file can become larger."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_artefact_is_replaced_whole_or_not_at_all(tmp_path):
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return dual_encoders((8, 16, 16), (4, 8, 8), **PRESETS["vit_nano"].encoder).state_dict()

    save_artefact(tmp_path, weights(0), contract(), {"card.md": b"first"})
    before = tree(tmp_path)
    assert len(before) == 4
    for size, name in ((4096, "encoders.safetensors"), (len(before["encoders.safetensors"]) + 4096, NNUNET_NAME)):
        with pytest.raises(WriteError, match=f"{name} {SAYS}") as error, full(size):
            save_artefact(tmp_path, weights(1), contract(), {"card.md": b"second"})
        assert "\n" not in str(error.value) and tree(tmp_path) == before
    save_artefact(tmp_path, weights(1), contract(), {"card.md": b"second"})
    assert all(tree(tmp_path)[name] != before[name] for name in ("card.md", "encoders.safetensors", NNUNET_NAME))


def test_the_tables_of_prediction_and_retrieval(tmp_path):
    rows = [(f"case_{number}", np.array([0.25, 0.75])) for number in range(99)]
    with pytest.raises(WriteError, match=f"stages.csv {SAYS}"), full(100), renamed(tmp_path / "stages.csv") as partial:
        write_stages(partial, ["early", "advanced"], rows)
    with pytest.raises(WriteError, match=f"table.csv {SAYS}"), full(100):
        retrieve._write(tmp_path / "table.csv", [{"case_id": case, "tracer": "FDG"} for case, _ in rows])
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_an_image_of_air_that_the_disk_took_a_part_of(ending, tmp_path):
    """ITK says nothing of it where the format is NIfTI."""
    header = sitk.Image([30, 40, 50], sitk.sitkInt16)
    with pytest.raises((OSError, RuntimeError)), full(100):
        write_absent(tmp_path / f"a{ending}", "CT", header)
    write_absent(tmp_path / f"a{ending}", "CT", header)
    assert np.all(sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / f"a{ending}")) == -1024)


def test_labels_that_validation_reads_are_whole_and_those_of_today(tmp_path):
    label, folder = tmp_path / "a.nii.gz", tmp_path / "preprocessed"
    folder.mkdir()
    label.write_bytes(bytes(5000))
    studies = {"a": (["a_0000.nii.gz"], str(label)), "b": (["b_0000.nii.gz"], None)}
    copy = folder / "gt_segmentations" / "a.nii.gz"
    with pytest.raises(WriteError, match=f"a.nii.gz {SAYS}"), full(1000):
        copy_labels(folder, studies, ".nii.gz")
    assert not os.listdir(copy.parent)
    copy.write_bytes(bytes(1000))  # what nnU-Net's own copying left, newer than the label
    for content in (bytes(5000), b"1" * 5000, b"older"):
        label.write_bytes(content)
        if content == b"older":
            os.utime(label, (1e9, 1e9))
        copy_labels(folder, studies, ".nii.gz")
        assert tree(copy.parent) == {"a.nii.gz": label.read_bytes()}
        assert int(copy.stat().st_mtime) == int(label.stat().st_mtime)  # so nnU-Net leaves it alone


def test_a_picture_of_a_pretraining(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "plot_reconstruction", lambda *_: None)
    (tmp_path / "reconstruction.png").write_bytes(bytes(5000))
    stub = SimpleNamespace(folder=tmp_path, settings=SimpleNamespace(wholebody=SimpleNamespace(stack="axial")))
    encoder, decoder = {"embed_dim": 12, "depth": 1, "num_heads": 1}, {"dim": 12, "depth": 1, "num_heads": 1}
    method = FratMAEMethod(FratMAE((4, 8, 16), (2, 4, 8), encoder, decoder), 0.5, is_cross_modal=True)
    held_out = SimpleNamespace(
        cases=[SimpleNamespace(name="a")], images=torch.rand(1, 2, 4, 8, 16), masks=method.fixed_masks(1)
    )
    with pytest.raises(WriteError, match=f"epoch_0003.png {SAYS}"), full(1000), torch.no_grad():
        monitor.Monitor.picture(stub, method, held_out, 3)
    assert not os.listdir(tmp_path / "pictures")
    with torch.no_grad():
        monitor.Monitor.picture(stub, method, held_out, 3)
    assert (tmp_path / "pictures" / "epoch_0003.png").stat().st_size == 5000


def test_where_nnunet_writes_in_place_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("nnunet_fratmae.base.files.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    for within in (planning, alone_in):
        with pytest.raises(WriteError, match=f"Dataset003_Toy {SAYS}"), within(tmp_path / "Dataset003_Toy"):
            raise AssertionError("begun")
    assert not os.listdir(tmp_path / "Dataset003_Toy")
    with pytest.raises(WriteError, match="no space left"):
        check_writable(tmp_path / "not" / "there")


def test_an_error_of_a_library_is_the_disks_where_that_is_full(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="a bug"), writing_to(tmp_path):
        raise RuntimeError("a bug")
    monkeypatch.setattr("nnunet_fratmae.base.files.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(WriteError, match="no space left"), renamed(tmp_path / "a") as partial:
        partial.write_bytes(b"half")
        raise RuntimeError("failed to write to file")
    monkeypatch.undo()
    with pytest.raises(WriteError, match="No space left on device"), writing_to(tmp_path):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")
    assert tree(tmp_path) == {}


def test_a_lock_is_gone_after_an_error(tmp_path):
    with pytest.raises(KeyError), alone_in(tmp_path):
        raise KeyError
    assert not os.listdir(tmp_path)
