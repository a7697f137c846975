"""The ground floor: files that are whole or not there, names that stay inside, tables that execute nothing."""

from __future__ import annotations

import argparse
import csv
import io
import os
import pickle
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_fratmae.base.command import (
    UserError,
    dataset_number,
    end_stock_commands_in_one_line,
    nnunet_folder,
    run_command,
)
from nnunet_fratmae.base.files import WriteError, plain_name, refuse_bytes, renamed
from nnunet_fratmae.base.tables import cell_text, csv_text, inert


def test_what_was_there_stays_until_the_new_file_is_whole(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("before", encoding="utf-8")
    with pytest.raises(RuntimeError), renamed(path) as partial:
        partial.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "before" and os.listdir(tmp_path) == ["table.csv"]


def test_two_at_once_do_not_take_each_others_file(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    with renamed(path) as first:
        first.write_text("first", encoding="utf-8")
        monkeypatch.setattr("os.getpid", lambda: 1)  # process 1 is always there
        with renamed(path) as second:
            second.write_text("second", encoding="utf-8")
        assert first.read_text(encoding="utf-8") == "first"
    assert path.read_text(encoding="utf-8") == "first" and os.listdir(tmp_path) == ["table.csv"]


def test_what_a_killed_process_left_is_removed(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: 2**22 + 1)  # above the largest process number of Linux
        with renamed(path) as partial:
            left = partial
            partial.write_text("x", encoding="utf-8")
    left.write_text("half", encoding="utf-8")
    with renamed(path) as partial:
        partial.write_text("whole", encoding="utf-8")
    assert os.listdir(tmp_path) == ["table.csv"]


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    with pytest.raises(WriteError, match="gone/table.csv cannot be written"), renamed(tmp_path / "gone/table.csv") as p:
        p.write_text("x", encoding="utf-8")


@pytest.mark.parametrize("name", ["", ".", "..", "../other", "a/b", "a\\b", "/etc", ".hidden", "a\nb", None, 3, ["a"]])
def test_names_that_lead_elsewhere(name):
    with pytest.raises(UserError, match="plans.json, data_identifier"):
        plain_name(name, "plans.json, data_identifier")


@pytest.mark.parametrize("name", ["FratMAEPlans_3d_fullres", "case 1", "GHSG_0001", "a.b-c"])
def test_names_that_stay(name):
    assert plain_name(name, "x") == name


@pytest.mark.parametrize("cell", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "  =1"])
def test_formulas_are_inert(cell):
    ((written,),) = csv.reader(io.StringIO(csv_text(["a"], [[cell]]).split("\n", 1)[1], newline=""))
    assert written == f"'{cell}" and cell_text(written) == cell


@given(st.text())
def test_cells_come_back_as_they_were(cell):
    assert cell_text(inert(cell)) == cell


@pytest.mark.parametrize("number", ["-1", "+1.5", "-1e-3", "0"])
def test_numbers_are_as_they_were(number):
    assert inert(number) == number


@pytest.mark.parametrize(("name", "number"), [("Dataset007_T", 7), ("Dataset1234_T", 1234), ("Dataset520_A_1", 520)])
def test_dataset_numbers_of_any_length(name, number):
    assert dataset_number(name) == number


@pytest.mark.parametrize("name", ["Dataset_7", "Task007_T", "Dataset12_T"])
def test_no_dataset(name):
    with pytest.raises(UserError, match="is no nnU-Net dataset"):
        dataset_number(name)


def test_a_full_disk_is_one_line_that_names_no_input(tmp_path, monkeypatch, capsys):
    def main(args):
        raise OSError(28, "No space left on device", str(args.i / "Meier" / "x"))

    parser = argparse.ArgumentParser(prog="p")
    parser.add_argument("-i", type=type(tmp_path))
    monkeypatch.setattr("sys.argv", ["p", "-i", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        run_command(parser, main)
    text = str(stopped.value)
    assert "No space left on device" in text and "a file below -i" in text and "Meier" not in text


def test_a_full_disk_names_what_we_write(tmp_path, monkeypatch):
    def main(_):
        raise PermissionError(13, "Permission denied", str(tmp_path / "out.csv"))

    monkeypatch.setattr("sys.argv", ["p"])
    with pytest.raises(SystemExit, match="out.csv cannot be read or written .Permission denied."):
        run_command(argparse.ArgumentParser(prog="p"), main)


def test_the_code_of_a_refusal_comes_through_a_process():
    error = pickle.loads(pickle.dumps(UserError("PET: no", "SUV_X")))
    assert str(error) == "PET: no" and error.code == "SUV_X" and UserError("x").code == ""


def test_names_that_readers_die_of_are_refused(tmp_path, monkeypatch):
    odd = os.fsdecode(bytes(tmp_path) + b"/M\xfcller_0000.nii.gz")
    refuse_bytes([tmp_path, "M\u00fcller"])
    with pytest.raises(UserError, match="no UTF-8"):
        refuse_bytes([tmp_path, odd])
    monkeypatch.setenv("nnUNet_raw", odd)
    with pytest.raises(UserError, match="^nnUNet_raw: this folder's name is no UTF-8"):
        nnunet_folder("nnUNet_raw")


@pytest.mark.parametrize("program, is_line", [("nnUNetv2_train", True), ("nnUNetv2_predict", True), ("python", False)])
def test_stock_commands_end_in_one_line(program, is_line, monkeypatch, capsys):
    """In a script of the user's, or a notebook, it is an exception as any other."""
    seen = []
    monkeypatch.setattr(sys, "argv", [f"/bin/{program}"])
    monkeypatch.setattr(sys, "excepthook", lambda *error: seen.append(error[0]))
    end_stock_commands_in_one_line()
    sys.excepthook(UserError, UserError("x.json: is none; write one"), None)
    sys.excepthook(ValueError, ValueError("1"), None)
    assert seen == ([ValueError] if is_line else [UserError, ValueError])
    assert capsys.readouterr().err == is_line * f"\n{program}: error: x.json: is none; write one\n"
    ProcessRaisedException = type("ProcessRaisedException", (Exception,), {})  # as torch names it
    text = "-- Process 0 terminated\n  raise UserError\nnnunet_fratmae.base.command.UserError: a: is b; do c\n"
    sys.excepthook(ProcessRaisedException, ProcessRaisedException(text), None)
    assert capsys.readouterr().err == is_line * f"\n{program}: error: a: is b; do c\n"
