"""The key table of pseudonyms, and texts without what identifies a patient."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion import pseudonyms
from nnUNet_raw_conversion.pseudonyms import (
    Key,
    assign,
    check_keys,
    key_file,
    only_user,
    read_keys,
    same_number,
    who,
    write_keys,
)


def wanted(*patients: str, trial: str = "HD18", timepoint: str = "20200101") -> list[Key]:
    return [Key("", trial, patient, timepoint, f"/in/{patient}") for patient in patients]


def test_new_patients_get_the_next_numbers():
    keys = [Key("GHSG_0007", "HD18", "a", "20200101")]
    named = assign(keys, wanted("b", "a", "c"), "GHSG")
    assert named[1].case_id == "GHSG_0007"
    assert {named[0].case_id, named[2].case_id} == {"GHSG_0008", "GHSG_0009"}
    assert {key.patient for key in keys} == {"a", "b", "c"}


def test_order_of_the_numbers_is_not_that_of_the_patients():
    patients = [f"{i:03d}" for i in range(50)]
    named = assign([], wanted(*patients), "GHSG")
    assert sorted(key.case_id for key in named) != [key.case_id for key in named]
    assert len({key.case_id for key in named}) == 50


def test_pseudonyms_are_stable_over_runs_and_added_patients(tmp_path):
    path = tmp_path / "keys.csv"
    keys: list[Key] = []
    first = {k.patient: k.case_id for k in assign(keys, wanted("Müller", "12", "0012"), "GHSG")}
    write_keys(path, keys)
    keys = read_keys(path)
    again = {k.patient: k.case_id for k in assign(keys, wanted("5", "0012", "müller", "12"), "GHSG")}
    assert {name: again[name.lower()] for name in first} == first
    assert again["5"] == "GHSG_0004"


def test_same_number_in_two_trials_is_two_patients():
    keys: list[Key] = []
    named = assign(keys, wanted("12", trial="HD16") + wanted("12", trial="HD17"), "GHSG")
    assert len({key.case_id for key in named}) == 2
    again = assign(keys, wanted("12", trial="HD17") + wanted("12", trial="HD16"), "GHSG")
    assert [key.case_id for key in again] == [key.case_id for key in named[::-1]]


def test_rows_of_a_user_without_trial_and_time_point_fit_any(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("case_id;patient\nKoeln-7;12\n", encoding="utf-8")
    keys = read_keys(path)
    first, later = assign(keys, wanted("12") + wanted("12", timepoint="20210101"), "GHSG")
    assert first.case_id == "Koeln-7" and later.case_id == "GHSG_0001"
    write_keys(path, keys)
    assert read_keys(path)[1] == Key("Koeln-7", "HD18", "12", "20200101", "/in/12")


def test_key_table_is_for_its_owner_only(tmp_path):
    path = tmp_path / "new" / "keys.csv"
    write_keys(path, [Key("A_0001", "", "x")])
    path.chmod(0o644)
    write_keys(path, [Key("A_0001", "", "x")])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["keys.csv"]


def test_key_table_lies_beside_the_input(tmp_path):
    assert key_file(None, tmp_path / "export") == tmp_path.resolve() / "key_export.csv"
    assert key_file(tmp_path / "k.csv", tmp_path / "export") == tmp_path.resolve() / "k.csv"


@pytest.mark.parametrize(
    "place", ["Dataset522_GHSG/keys.csv", "Dataset1_key.csv", "results/keys.csv", ".partial_Dataset5_x/k"]
)
def test_key_table_in_a_folder_that_is_passed_on_is_refused(tmp_path, monkeypatch, place):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    with pytest.raises(UserError, match="--key-file"):
        key_file(tmp_path / place, tmp_path / "export")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("case_id,name\nA,Erika\n", "line 1"),
        ("case_id,patient,patient\nA,1,2\n", "line 1"),
        ("case_id,patient\nA 1,Erika\n", "line 2"),
        ("case_id,patient\nA_0000,Erika\n", "line 2"),
        ("case_id,patient\nA,Erika\nB,\n", "line 3"),
        ("case_id,patient\nA,Erika\na,Hans\n", "line 3"),
        ("case_id,patient\nA,Erika\nB,ERIKA\n", "line 3"),
        ("case_id,patient\nA,Erika,7\n", "line 2"),
    ],
)
def test_bad_key_tables_are_refused_without_their_content(tmp_path, text, what):
    path = tmp_path / "keys.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=what) as error:
        read_keys(path)
    assert "rika" not in str(error.value) and "\n" not in str(error.value)


def test_key_table_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="--key-file"):
        write_keys(tmp_path / "file" / "keys.csv", [])


@pytest.mark.parametrize(("a", "b"), [("0012", "12"), (" HD 5", "hd  5"), ("12.0", "012"), ("000", "000")])
def test_numbers_are_compared_as_spreadsheets_leave_them(a, b):
    assert same_number(a) == same_number(b)


def test_source_has_no_default_in_nnunet_raw(tmp_path, monkeypatch):
    """Beside the input, even if nnUNet_raw is set: datasets are shared, and with them whatever lies there."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    assert tmp_path / "raw" not in key_file(None, Path(tmp_path / "in")).parents


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
def test_no_key_table_lies_in_nnunets_folders(tmp_path, monkeypatch, variable):
    """Also not where the input lies there: raw folders are shared as a whole."""
    monkeypatch.setenv(variable, str(tmp_path / "nn"))
    with pytest.raises(UserError, match="--key-file"):
        key_file(None, tmp_path / "nn" / "originals")
    assert key_file(tmp_path / "keys.csv", tmp_path / "nn" / "originals") == tmp_path / "keys.csv"


ANY_TEXT = st.text(st.characters(), max_size=12)  # with control characters, quotes, marks, surrogates


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT, ANY_TEXT, ANY_TEXT), max_size=6))
def test_any_text_comes_back_as_it_was_and_keeps_its_pseudonym(tmp_path, texts):
    wanted = list({who(key): key for text in texts if (key := Key("", *text)).patient}.values())
    path, keys = tmp_path / "keys.csv", []
    named = assign(keys, wanted, "X")
    assert [who(key) for key in named] == [who(key) for key in wanted]
    write_keys(path, keys)
    again = read_keys(path)
    assert {key.case_id: key for key in again} == {key.case_id: key for key in keys}
    assert [key.case_id for key in assign(again, wanted, "X")] == [key.case_id for key in named]
    assert len(again) == len(keys)


@pytest.mark.parametrize(
    ("once", "later"),
    [("Erika  Meier", "Erika Meier"), (" 12 ", "12"), ("M\u00fcller", "Mu\u0308ller"), ("MU\u0308LLER", "m\u00fcller"),
     ("a\tb", "a b"), ("a\x00b", "a b"), ("M\udcfcller", "M\udcfcller"), ("=1+1", "=1+1"), ("'=x", "'=x"),
     ('a "b", c', 'a "b", c'), ("Stra\u00dfe", "STRASSE"), ("\u00a0x", "x")],
)  # fmt: skip
def test_one_patient_however_it_is_written(tmp_path, once, later):
    path, keys = tmp_path / "keys.csv", []
    (first,) = assign(keys, [Key("", "HD18", once, "20200101")], "X")
    write_keys(path, keys)
    keys = read_keys(path)
    (again,) = assign(keys, [Key("", "hd18 ", later, "20200101")], "X")
    assert again.case_id == first.case_id and len(keys) == 1


@pytest.mark.parametrize("names", [("A  B", "A B"), ("M\u00fcller", "Mu\u0308ller"), ("x", "X")])
def test_names_that_a_table_could_not_tell_apart_are_refused(names):
    keys = []
    with pytest.raises(UserError, match="there twice") as error:
        assign(keys, [Key("", "", name) for name in names], "X")
    assert error.value.code == "KEYS_SAME" and not keys and names[0] not in str(error.value)


def test_a_table_that_was_changed_meanwhile_is_told(tmp_path):
    path, keys = tmp_path / "keys.csv", []
    named = assign(keys, [Key("", "", "a"), Key("", "", "b")], "X")
    write_keys(path, keys)
    check_keys(path, named)
    write_keys(path, [replace(keys[0], case_id=keys[1].case_id), replace(keys[1], case_id=keys[0].case_id)])
    with pytest.raises(UserError, match="2 of its cases are of others"):
        check_keys(path, named)


def test_two_users_of_a_table_come_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(pseudonyms, "PATIENCE_S", 0.2)
    with only_user(tmp_path / "keys.csv"):
        with pytest.raises(UserError, match="keys.csv is being written by another command"), \
             only_user(tmp_path / "keys.csv"):  # fmt: skip
            pass
        write_keys(tmp_path / "keys.csv", [])
    assert [path.name for path in tmp_path.iterdir()] == ["keys.csv"]


def test_formulas_in_the_key_table_are_inert(tmp_path):
    write_keys(tmp_path / "k.csv", [Key("A_1", "", "=cmd|' /C calc'!A0", "", "@SUM(A1)/x")])
    assert ",'=cmd|' /C calc'!A0,,'@SUM" in (tmp_path / "k.csv").read_text(encoding="utf-8")
