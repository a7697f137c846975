"""SUL, IBW and BSA to SUVbw, decay within the frame, times that cannot be, several injections, and IBSI's reference
objects."""

from __future__ import annotations

import csv
import tarfile
from datetime import datetime

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom import body_size
from nnUNet_raw_conversion.dicom.index import scan
from nnUNet_raw_conversion.dicom.overrides import SuvOverride, read_overrides
from nnUNet_raw_conversion.dicom.suv import read_suv, suv_factors
from tests.dicom_files import DATE, DOSE_BQ, HALF_LIFE_S, WEIGHT_KG
from tests.suv_headers import REAL, header

OBJECTS = REAL / "ibsi_suv_dro"


def factor(seconds, half_life=HALF_LIFE_S):
    return 1000 * WEIGHT_KG / (DOSE_BQ * 0.5 ** (seconds / half_life))


def one(override=None, **tags):
    factors, notes = suv_factors([header(**tags)], override)
    return factors[0], " | ".join(notes)


def refusal(override=None, **tags):
    with pytest.raises(UserError) as error:
        suv_factors([header(**tags)], override)
    return error.value.code, str(error.value)


@pytest.mark.skipif(not OBJECTS.is_dir(), reason="shared data not there")
def test_reference_objects_of_ibsi(tmp_path):
    """All 17 have 0.20, 1.00 and 4.00 in their mask, as far as the steps of what is stored allow."""
    with tarfile.open(OBJECTS / "dro.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    rows = list(csv.DictReader((OBJECTS / "DRO_list.csv").open(encoding="utf-8-sig")))
    assert len(rows) == 17
    wrong = []
    for row in rows:
        folder = tmp_path / "DRO" / row["ID"]
        [series] = scan(folder / "PT", progress=False)[0]
        image, notes = read_suv(series)
        mask = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "mask" / "DRO_mask.nii.gz"))) > 0
        suv = sitk.GetArrayFromImage(image)[mask]
        found = np.array([suv.min(), np.median(suv), suv.max()])
        expected = np.array([float(row[f"SUV{what}_expected"]) for what in ("min", "med", "max")])
        step = np.diff(np.unique(suv)).min()  # 2_3 is stored in steps of 0.038
        if np.abs(found - expected).max() > max(0.005, step):
            wrong.append((row["ID"], found, notes))
    assert not wrong


# By hand, for 70 kg and 1.75 m: James 1.1 x 70 - 128 x (70/175)^2 = 77 - 20.48; with 120: 77 - 19.2; women
# 74.9 - 23.68.
# Janmahasatian: BMI 22.857142857; 648900 / (6680 + 4937.142857); women 648900 / (8780 + 5577.142857).
# Ideal: 48 + 1.06 x 23; women 45.5 + 0.91 x 23. Du Bois: 71.84 x 70^0.425 x 175^0.725 = 18481.43 cm2.
SIZES = [
    ("GML", "LBMJAMES128", "M", 56.52), ("GML", "LBMJAMES128", "F", 51.22), ("GML", "LBM", "M", 57.8),
    ("GML", "LBM", "F", 51.22), ("GML", "LBMJANMA", "M", 55.857108), ("GML", "LBMJANMA", "F", 45.196986),
    ("GML", "IBW", "M", 72.38), ("GML", "IBW", "F", 66.43), ("GML", "IBW", "O", 69.405), ("GML", "BW", "M", 70.0),
    ("GML", None, None, 70.0), ("CM2ML", "BSA", "M", 18.48143), ("CM2ML", None, "O", 18.48143),
]  # fmt: skip


@pytest.mark.parametrize(("units", "kind", "sex", "size"), SIZES)
@pytest.mark.parametrize("height", [1.75, 175])
def test_other_sizes_become_body_weight(units, kind, sex, size, height):
    value, notes = one(Units=units, SUVType=kind, PatientSex=sex, PatientSize=height)
    assert value == pytest.approx(70 / size, rel=1e-6)
    assert ("made SUVbw" in notes) == (size != 70) and ("read as cm" in notes) == (size != 70 and height > 3)


def test_the_forms_of_james_are_told_apart():
    assert "is 1.023 times" in one(Units="GML", SUVType="LBM", PatientSex="M", PatientSize=1.75)[1]
    assert body_size.lean_body_mass_james(70, 1.75, "M", 120) / 56.52 == pytest.approx(1.0226, abs=1e-4)


@pytest.mark.parametrize(
    ("tags", "code", "field"),
    [
        ({"SUVType": "LBMJANMA", "PatientSize": 1.75}, "SUV_SEX_MISSING", "PatientSex (0010,0040)"),
        ({"SUVType": "LBMJANMA", "PatientSize": 1.75, "PatientSex": "O"}, "SUV_SEX_MISSING", "is O, not M or F"),
        ({"SUVType": "LBM", "PatientSex": "F"}, "SUV_HEIGHT", "PatientSize (0010,1020)"),
        ({"SUVType": "LBM", "PatientSex": "F", "PatientSize": 17.5}, "SUV_HEIGHT", "is 17.5 m"),
        ({"SUVType": "LBM", "PatientSex": "F", "PatientSize": 1.75, "PatientWeight": None}, "SUV_WEIGHT_MISSING", ""),
        ({"SUVType": "LBMX", "PatientSex": "F", "PatientSize": 1.75}, "SUV_UNITS", "that is not known here"),
        ({"SUVType": "BSA", "PatientSize": 1.75}, "SUV_UNITS", "SUVType (0054,1006)"),
        ({"Units": "CM2ML", "SUVType": "BW"}, "SUV_UNITS", "SUVType (0054,1006)"),
    ],
)
def test_sizes_that_are_refused(tags, code, field):
    found, message = refusal(**{"Units": "GML"} | tags)
    assert found == code and field in message


@pytest.mark.parametrize(
    ("keyword", "code", "column"),
    [
        ("PatientWeight", "SUV_WEIGHT_MISSING", "weight_kg"),
        ("RadionuclideTotalDose", "SUV_DOSE_MISSING", "dose_bq"),
        ("RadionuclideHalfLife", "SUV_HALF_LIFE", "half_life_s"),
    ],
)
def test_what_is_no_number_is_not_said_to_be_missing(keyword, code, column):
    """As scanners in Europe may write it, against the type of the field."""
    for value, said in ((b"70,5 ", "is no number"), (b"", "is missing or 0"), (None, "is missing or 0")):
        one_header = header()
        item = one_header if keyword in one_header else one_header.RadiopharmaceuticalInformationSequence[0]
        del item[keyword]
        if value is not None:
            tag = Tag(keyword)
            item[tag] = RawDataElement(tag, "DS", len(value), value, 0, False, True)
        with pytest.raises(UserError, match=f"{keyword} .*{said}; give {column} with --suv-override") as found:
            suv_factors([one_header])
        assert found.value.code == code


@pytest.mark.parametrize("half_life", [6586.2, 4057.7, 1221.8])
@pytest.mark.parametrize("duration", [60, 600, 1800])
def test_decay_within_the_frame(half_life, duration):
    """The mean of 2^-(t / T) over the frame, by summing it up."""
    t = (np.arange(200000) + 0.5) * duration / 200000
    mean = np.mean(0.5 ** ((2400 + t) / half_life))
    value, _ = one(DecayCorrection="NONE", ActualFrameDuration=1000 * duration, RadionuclideHalfLife=half_life,
                   RadiopharmaceuticalStartTime="123500")  # fmt: skip
    assert value == pytest.approx(1000 * WEIGHT_KG / (DOSE_BQ * mean), rel=1e-8)


def test_unknown_frames_without_decay_correction():
    code, message = refusal(DecayCorrection="NONE")
    assert code == "SUV_FRAME_DURATION_MISSING" and "ActualFrameDuration (0018,1242) is missing" in message
    headers = [header(DecayCorrection="NONE", AcquisitionTime=time) for time in ("131500", "131800")]
    factors, notes = suv_factors(headers)
    np.testing.assert_allclose(factors, [factor(3600), factor(3780)])
    assert any("up to 0.9%, is left out" in note for note in notes)


@pytest.mark.parametrize(
    ("tags", "code"),
    [
        ({"SeriesTime": "000000", "AcquisitionTime": "000000", "RadiopharmaceuticalStartTime": "000000"},
         "SUV_TIME_MISSING"),
        ({"SeriesTime": "000000.00", "AcquisitionTime": "000000.000"}, "SUV_TIME_MISSING"),
        ({"SeriesTime": "00:00:00", "AcquisitionTime": None, "RadiopharmaceuticalStartTime": "160000"},
         "SUV_TIME_MISSING"),
        ({"RadiopharmaceuticalStartTime": "000000", "SeriesTime": "010000", "AcquisitionTime": "010000"},
         "SUV_TIME_MISSING"),
        ({"RadiopharmaceuticalStartTime": None, "RadiopharmaceuticalStartDateTime": DATE + "000000"},
         "SUV_TIME_MISSING"),
        ({"RadiopharmaceuticalStartTime": None}, "SUV_TIME_MISSING"),
        ({"RadionuclideHalfLife": 282276}, "SUV_TIME_MISSING"),
        ({"RadiopharmaceuticalStartTime": "120000", "SeriesTime": "120000", "AcquisitionTime": "120000"},
         "SUV_UPTAKE_ZERO"),
        ({"RadiopharmaceuticalStartTime": "131500"}, "SUV_UPTAKE_ZERO"),
        ({"RadiopharmaceuticalStartTime": "134500"}, "SUV_INJECTION_AFTER_SCAN"),
        ({"RadiopharmaceuticalStartDateTime": DATE + "134500", "RadiopharmaceuticalStartTime": "134500"},
         "SUV_INJECTION_AFTER_SCAN"),
        ({"RadiopharmaceuticalStartTime": "051500"}, "SUV_UPTAKE_TOO_LONG"),
        ({"RadiopharmaceuticalStartTime": "081500", "RadionuclideHalfLife": 4057.7}, "SUV_UPTAKE_TOO_LONG"),
        ({"RadiopharmaceuticalStartTime": "111500", "RadionuclideHalfLife": 1221.8}, "SUV_UPTAKE_TOO_LONG"),
        ({"RadiopharmaceuticalStartTime": "130000", "RadionuclideHalfLife": 122.24}, "SUV_UPTAKE_TOO_LONG"),
        ({"RadiopharmaceuticalStartDateTime": DATE + "111500"}, "SUV_TIME_CONTRADICTS"),
        ({"RadiopharmaceuticalStartDateTime": DATE + "114000"}, "SUV_TIME_CONTRADICTS"),
        ({"RadiopharmaceuticalStartTime": None, "RadiopharmaceuticalStartDateTime": DATE + "111500+0000"},
         "SUV_TIME_CONTRADICTS"),
        ({"PatientWeight": 0}, "SUV_WEIGHT_MISSING"),
        ({"PatientWeight": 70000}, "SUV_WEIGHT_IMPLAUSIBLE"),
    ],
)  # fmt: skip
def test_times_that_cannot_be(tags, code):
    assert refusal(**tags)[0] == code


@pytest.mark.parametrize(
    ("tags", "seconds", "half_life"),
    [
        ({"RadiopharmaceuticalStartTime": "091500"}, 14400, 6586.2),  # late PSMA
        ({"RadiopharmaceuticalStartTime": "101500", "RadionuclideHalfLife": 4057.7}, 10800, 4057.7),
        ({"RadiopharmaceuticalStartTime": "131500", "RadionuclideHalfLife": 122.24}, 0, 122.24),  # O-15
        ({"RadiopharmaceuticalStartTime": "131500", "RadionuclideHalfLife": 75.9}, 0, 75.9),
        ({"RadiopharmaceuticalStartTime": "131500", "ActualFrameDuration": 3600000}, 0, 6586.2),  # a dynamic sum
        ({"RadiopharmaceuticalStartDateTime": "20210225131500", "RadionuclideHalfLife": 360806}, 7 * 86400, 360806),
        ({"RadiopharmaceuticalStartDateTime": "20210302131500", "RadiopharmaceuticalStartTime": None,
          "RadionuclideHalfLife": 45721}, 2 * 86400, 45721),
        ({"RadiopharmaceuticalStartDateTime": "20210303131500", "RadiopharmaceuticalStartTime": "131500",
          "RadionuclideHalfLife": 230688, "Radiopharmaceutical": "Y-90 microspheres"}, 86400, 230688),
        # zones: the time of day is local
        ({"RadiopharmaceuticalStartDateTime": DATE + "111500+0000"}, 3600, 6586.2),
        ({"RadiopharmaceuticalStartDateTime": DATE + "171500+0000"}, 3600, 6586.2),  # five hours west
        ({"RadiopharmaceuticalStartDateTime": DATE + "064500+0000"}, 3600, 6586.2),  # India
        ({"RadiopharmaceuticalStartDateTime": DATE + "111500.00+0000", "TimezoneOffsetFromUTC": "+0100"},
         3600, 6586.2),
        ({"RadiopharmaceuticalStartDateTime": DATE + "121500+0000", "RadiopharmaceuticalStartTime": None},
         3600, 6586.2),
        # the date moved by de-identification
        ({"RadiopharmaceuticalStartDateTime": "20190617121500"}, 3600, 6586.2),
    ],
)  # fmt: skip
def test_times_that_can_be(tags, seconds, half_life):
    assert one(**tags)[0] == pytest.approx(factor(seconds, half_life), rel=1e-9)


def injections(*items):
    two = header()
    two.RadiopharmaceuticalInformationSequence = []
    for tags in items:
        two.RadiopharmaceuticalInformationSequence.append(header(**tags).RadiopharmaceuticalInformationSequence[0])
    return two


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"RadiopharmaceuticalStartTime": "101500"}, "in their times; give injection_datetime with"),
        ({"RadiopharmaceuticalStartDateTime": DATE + "101500"}, "in their times"),
        ({"RadionuclideHalfLife": 4057.7}, "in their half-lives; give half_life_s"),
        ({"RadionuclideTotalDose": 1e8, "RadiopharmaceuticalStartTime": "101500"},
         "doses and times; give dose_bq and injection_datetime with"),
        ({"Radiopharmaceutical": "68Ga-PSMA"}, "radionuclides"),
    ],
)  # fmt: skip
def test_two_injections(other, named):
    for items in (({}, other), (other, {})):
        with pytest.raises(UserError) as error:
            suv_factors([injections(*items)])
        assert error.value.code == "SUV_SEVERAL_INJECTIONS" and named in str(error.value)
        user = SuvOverride(dose_bq=DOSE_BQ, injection=datetime(2021, 3, 4, 12, 15), half_life_s=HALF_LIFE_S)
        assert suv_factors([injections(*items)], user)[0][0] == pytest.approx(factor(3600))
    assert suv_factors([injections({}, {})])[0][0] == pytest.approx(factor(3600))  # one, told twice


def test_the_reference_time_of_the_user(tmp_path):
    path = tmp_path / "suv.csv"
    path.write_text("case_id,decay_reference_datetime\nA,2021-03-04 13:05:00\n", encoding="utf-8")
    override = read_overrides(path)["A"]
    assert override == SuvOverride(decay_reference=datetime(2021, 3, 4, 13, 5))
    assert one(override)[0] == pytest.approx(factor(3000), rel=1e-9)
    assert one(override, SeriesTime="000000", AcquisitionTime="000000")[0] == pytest.approx(factor(3000), rel=1e-9)
    code, message = refusal(SuvOverride(decay_reference=datetime(2021, 3, 4, 12, 0)))
    assert code == "SUV_INJECTION_AFTER_SCAN" and "puts the injection 0.2 h after it" in message
    path.write_text("case_id,decay_reference_datetime\nA,noon\n", encoding="utf-8")
    with pytest.raises(UserError, match="decay_reference_datetime is not like 2021-03-04"):
        read_overrides(path)


def test_ge_times_without_their_creator():
    odd = header(Manufacturer="GE MEDICAL SYSTEMS", SeriesTime="160000")
    odd.add_new((0x0009, 0x100D), "UN", b"20210304131000.00 ")
    assert suv_factors([odd])[0][0] == pytest.approx(factor(3300), rel=1e-9)
    odd.add_new((0x0009, 0x0010), "LO", "SOMEBODY ELSE")  # then it is not GE's
    assert suv_factors([odd])[0][0] == pytest.approx(factor(3600), rel=1e-9)
    assert isinstance(odd, pydicom.Dataset)
