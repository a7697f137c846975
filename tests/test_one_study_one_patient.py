"""A study is of one patient, however its headers spell the number and name the departments."""

from __future__ import annotations

import pytest

from nnUNet_raw_conversion.trial import find_visits
from tests.dicom_files import write_ct, write_pet

PET, CT = (6, 18, 24), (9, 36, 40)
ONE = {"StudyInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4"}


def visits_of(folder):
    return find_visits([folder], progress=False)[0]


@pytest.mark.parametrize(
    ("pet", "ct"),
    [("4711", "0004711"), ("Ab-12", "AB 12"), ("4711", ""), ("", "4711"), ("4711", "unknown"), ("4711", "KH4711-2")],
)
def test_spellings_of_one_number(tmp_path, pet, ct):
    write_pet(tmp_path / "pet", patient=pet, shape=PET, **ONE)
    write_ct(tmp_path / "ct", patient=ct, shape=CT, **ONE)
    write_pet(tmp_path / "x", patient="other", shape=PET, study="9")
    visits = [visit for visit in visits_of(tmp_path) if visit.patient != "other"]
    assert [(visit.patient, visit.problem) for visit in visits] == [(pet or ct, "")]
    assert {one.modality for one in visits[0].series} == {"CT", "PT"}
    assert {pet, ct} - {"", "unknown"} <= set(visits[0].numbers)


def test_another_study_with_the_other_spelling_is_the_same_patients(tmp_path):
    write_pet(tmp_path / "pet", patient="4711", shape=PET, **ONE)
    write_ct(tmp_path / "ct", patient="0004711", shape=CT, **ONE)
    write_pet(tmp_path / "late", patient="0004711", shape=PET, date="20220101")
    write_pet(tmp_path / "x", patient="other", shape=PET, study="9")
    assert sorted(visit.patient for visit in visits_of(tmp_path)) == ["4711", "4711", "other"]


@pytest.mark.parametrize(
    ("one", "other"),
    [({"PatientBirthDate": "19500101"}, {"PatientBirthDate": "19600101"}), ({"PatientSex": "F"}, {"PatientSex": "M"})],
)
def test_different_people_stay_apart(tmp_path, one, other):
    """Two people whose study UID was made the same by hand."""
    write_pet(tmp_path / "a", patient="0012", shape=PET, **ONE | {"PatientBirthDate": None} | one)
    write_pet(tmp_path / "b", patient="12", shape=PET, **ONE | {"PatientBirthDate": None} | other)
    assert len(visits_of(tmp_path)) == 2


def test_different_numbers_with_a_pet_each_stay_apart(tmp_path):
    write_pet(tmp_path / "a", patient="A1", shape=PET, series="a", **ONE)
    write_pet(tmp_path / "b", patient="B2", shape=PET, series="b", **ONE)
    assert {visit.patient for visit in visits_of(tmp_path)} == {"A1", "B2"}


def test_two_departments_of_one_study(tmp_path):
    nothing = {"PatientBirthDate": None, "PatientAge": None}
    write_pet(tmp_path / "pet", patient="12", shape=PET, InstitutionName="UK Nuklearmedizin", **ONE | nothing)
    write_ct(tmp_path / "ct", patient="12", shape=CT, InstitutionName="UK Radiologie", **ONE | nothing)
    (visit,) = visits_of(tmp_path)
    assert not visit.problem
    write_pet(tmp_path / "x", patient="12", shape=PET, study="7", InstitutionName="Bonn", **nothing)
    write_pet(tmp_path / "y", patient="13", shape=PET, study="8")
    assert all("institutions" in visit.problem for visit in visits_of(tmp_path) if visit.patient == "12")
