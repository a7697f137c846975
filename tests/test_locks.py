"""One command at a time: locks that hold between processes and end with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.locks import locked
from nnUNet_raw_conversion.raw_dataset import OPTIONS, RawDataset

HOLD = """
import sys, time
from pathlib import Path
from nnunet_fratmae.base.locks import locked
with locked(Path(sys.argv[1]), "the table"):
    print("in", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock `tmp_path / "lock"`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as process:
        assert process.stdout.readline() == b"in\n"
        yield process
        process.kill()


def test_another_process_keeps_us_out_until_it_is_killed(tmp_path, holder):
    with pytest.raises(UserError, match="^the table is being written by another command") as refused, \
         locked(tmp_path / "lock", "the table"):  # fmt: skip
        pass
    assert refused.value.code == "IN_USE" and "\n" not in str(refused.value)
    holder.kill()
    holder.wait()
    with locked(tmp_path / "lock", "the table"):
        assert (tmp_path / "lock").stat().st_mode & 0o077 == 0
    assert not list(tmp_path.iterdir())


def test_we_wait_for_another_process(tmp_path, holder):
    holder.kill()  # between now and the end of our patience
    with locked(tmp_path / "lock", "the table", patience=30):
        pass


def test_lock_ends_with_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "lock", "x"):
        raise KeyError
    with locked(tmp_path / "lock", "x"):
        pass


def test_lock_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="file cannot be written to"), locked(tmp_path / "file" / "lock", "x"):
        pass


def test_two_commands_for_one_dataset(raw):
    first, second = RawDataset(7, "T"), RawDataset(7, "T")
    with first.locked(), first.locked():
        with pytest.raises(UserError, match="dataset 7 .* another command"), second.locked():
            pass
        with pytest.raises(UserError, match="dataset 7 .* another command"), second:
            pass
        first.resume({})
        first.finish()  # which renames the folder that is locked
        with pytest.raises(UserError, match="dataset 7 .* another command"), RawDataset(7, "T").locked():
            pass
    assert sorted(path.name for path in first.folder.iterdir()) == [OPTIONS, "dataset.json"]
    with second.locked():
        pass


def test_two_datasets_of_one_number_at_once(raw):
    """Both were free when the commands began; the second is told when it is done, not nnU-Net."""
    first, second = RawDataset(7, "A"), RawDataset(7, "B")
    with first.locked(), second.locked():
        first.resume({})
        second.resume({})
        first.finish()
        with pytest.raises(UserError, match="this ID is taken"):
            second.finish()


def test_nothing_is_left_of_a_lock_under_which_nothing_was_written(raw):
    raw.mkdir()
    with RawDataset(7, "T").locked():
        pass
    assert not list(raw.iterdir())
