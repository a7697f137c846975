"""SUV factors of PET headers, derived by hand from the definition, and the voxels of real series."""

from datetime import datetime

import numpy as np
import openpyxl
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import assume, given
from hypothesis import strategies as st

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.index import scan
from nnUNet_raw_conversion.dicom.overrides import SuvOverride, read_overrides
from nnUNet_raw_conversion.dicom.suv import read_suv, suv_factors
from tests.dicom_files import (
    DATE,
    DOSE_BQ,
    HALF_LIFE_S,
    PATIENT,
    PET_ORIGIN,
    PET_SHAPE,
    PET_SPACING,
    WEIGHT_KG,
    code,
    positions,
    trunk_suv,
    write_pet,
)
from tests.suv_headers import BY_HAND, REAL, header, philips, real_headers

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="shared data not there")


def factor(seconds, weight=WEIGHT_KG, dose=DOSE_BQ, half_life=HALF_LIFE_S):
    """SUV per Bq/ml by the definition: weight in g by the dose that is left after `seconds`."""
    return 1000 * weight / (dose * 0.5 ** (seconds / half_life))


def one(override=None, **tags):
    """The factor of a series of one header, and its notes."""
    factors, notes = suv_factors([header(**tags)], override)
    return factors[0], " | ".join(notes)


def refused(override=None, **tags):
    with pytest.raises(UserError) as error:
        suv_factors([header(**tags)], override)
    message = str(error.value)
    assert "\n" not in message and PATIENT not in message and "Muster" not in message
    return message


@needs_real
def test_every_real_header_is_derived_by_hand():
    assert {path.name.removesuffix("-instances.json") for path in (REAL / "suv_headers").glob("*.json")} == set(BY_HAND)


@needs_real
@pytest.mark.parametrize("name", BY_HAND)
def test_real_headers(name):
    headers = real_headers(name)
    factors, _ = suv_factors(headers)
    np.testing.assert_allclose(factors, [BY_HAND[name]] * len(headers), rtol=1e-6)


@needs_real
def test_philips_own_factors_agree():
    """SUV per count by counts per Bq/ml is what Philips takes for SUV per Bq/ml."""
    assert BY_HAND["PHILIPS_BQML"] == pytest.approx(0.003515736 / 4.709921, rel=1e-6)
    headers = real_headers("PHILIPS_CNTS_AND_BQML_SUV")
    for one_header in headers:  # of the tenth bed, 18 min after the start
        del one_header[0x7053, 0x1000]
    # 09:35:56 - 08:30:00 = 3956 s
    expected = 1.602563 * 54000 / (238000000 * 2 ** -(3956 / 6588))
    assert suv_factors(headers)[0][0] == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(0.000551, rel=1e-3)


@needs_real
def test_real_whole_body_pet_reproduces_the_ibsi_crop():
    """GE, BQML, START: 71 kg, 388.777472 MBq at 10:35:00, scan 11:20:11 (2711 s), T = 6588 s."""
    [series] = [s for s in scan(REAL / "wholebody_fdg_dicom", progress=False)[0] if s.modality == "PT"]
    image, _ = read_suv(series)
    crop = sitk.ReadImage(str(REAL / "sts_petct" / "STS_001" / "SUV.nii.gz"))
    part = sitk.RegionOfInterest(image, crop.GetSize(), (59, 45, 0))
    difference = sitk.GetArrayFromImage(part) - sitk.GetArrayFromImage(crop)
    assert np.abs(difference).max() < 1e-3
    np.testing.assert_allclose(part.GetOrigin(), crop.GetOrigin(), atol=1e-3)
    np.testing.assert_allclose(part.GetSpacing(), crop.GetSpacing(), atol=1e-5)
    assert suv_factors([series.header])[0][0] == pytest.approx(71000 / (388777472 * 2 ** -(2711 / 6588)), rel=1e-9)


@needs_real
@pytest.mark.parametrize("patient", ["STS_002", "STS_003", "STS_008", "STS_019"])
def test_real_gml_is_suv_as_it_is(patient):
    [series] = [s for s in scan(REAL / "sts_dicom" / patient / "PET", progress=False)[0] if s.modality == "PT"]
    image, notes = read_suv(series)
    truth = sitk.ReadImage(str(REAL / "sts_petct" / patient / "SUV.nii.gz"))
    np.testing.assert_allclose(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(truth), atol=1e-4)
    np.testing.assert_allclose(image.GetOrigin(), truth.GetOrigin(), atol=1e-3)
    assert notes == ["Units GML: SUVbw as stored"]


@pytest.mark.parametrize("enhanced", [False, True])
def test_series_becomes_suv(tmp_path, enhanced):
    write_pet(tmp_path, enhanced=enhanced)
    [series], _ = scan(tmp_path, progress=False)
    image, notes = read_suv(series)
    truth = trunk_suv(positions(PET_SHAPE, PET_SPACING, PET_ORIGIN))
    np.testing.assert_allclose(sitk.GetArrayFromImage(image), truth, atol=truth.max() / 60000)
    assert notes == ["decay-corrected to the start of the scan (SeriesTime)", "60 min from injection to scan"]


@given(
    weight=st.floats(3, 200), dose=st.floats(30e6, 900e6), injected=st.integers(0, 86399),
    uptake=st.integers(300, 14400), dated=st.booleans(),
)  # fmt: skip
def test_any_time_of_day(weight, dose, injected, uptake, dated):
    """SUV x dose left = weight, also where midnight lies between injection and scan."""
    start = datetime(2021, 3, 4) + np.timedelta64(injected, "s").item()
    scanned = start + np.timedelta64(uptake, "s").item()
    assume(injected and f"{scanned:%H%M%S}" != "000000")  # a time of 00:00:00 is a blanked one
    drug = {"RadiopharmaceuticalStartTime": f"{start:%H%M%S}"}
    if dated:
        drug["RadiopharmaceuticalStartDateTime"] = f"{start:%Y%m%d%H%M%S}.000000"
    times = {f"{what}{kind}": f"{scanned:{form}}" for what in ("Series", "Acquisition")
             for kind, form in (("Date", "%Y%m%d"), ("Time", "%H%M%S"))}  # fmt: skip
    value, _ = one(PatientWeight=f"{weight:.10g}", RadionuclideTotalDose=f"{dose:.10g}", **drug, **times)
    assert value == pytest.approx(factor(uptake, weight, dose), rel=1e-8)


def test_decay_corrected_to_the_injection():
    assert one(DecayCorrection="ADMIN", RadiopharmaceuticalStartTime=None)[0] == pytest.approx(factor(0))


def test_not_decay_corrected():
    """Each slice has the decay from the injection to its own frame, here over midnight."""
    times = [("20210304", "235000"), ("20210304", "235500"), ("20210305", "000500")]
    headers = [header(DecayCorrection="NONE", RadiopharmaceuticalStartTime="230000", SeriesTime="235000",
                      AcquisitionDate=d, AcquisitionTime=t) for d, t in times]  # fmt: skip
    factors, notes = suv_factors(headers)
    np.testing.assert_allclose(factors, [factor(60 * minutes) for minutes in (50, 55, 65)])
    assert "not decay-corrected" in notes[0]
    for one_header in headers:  # the day of the last slice must then be guessed
        del one_header.AcquisitionDate
    np.testing.assert_allclose(suv_factors(headers)[0], factors)


@pytest.mark.parametrize(
    ("tags", "seconds"),
    [
        ({}, 3600),
        ({"SeriesTime": "131455.5"}, 3595.5),
        ({"SeriesTime": "13:15:00"}, 3600),  # as ACR-NEMA wrote it
        ({"SeriesTime": "134000"}, 3600),  # of a later reconstruction: the acquisition counts
        ({"SeriesTime": None}, 3600),
        ({"SeriesTime": "000000"}, 3600),  # dummies
        ({"SeriesTime": "121000", "AcquisitionTime": "130000"}, 2700),  # before the injection
        ({"SeriesDate": "19000101"}, 3600),
        ({"SeriesDate": None, "AcquisitionDate": None}, 3600),
        ({"AcquisitionDate": None, "AcquisitionTime": None}, 3600),
        # a frame from 60 to 70 min of a dynamic scan, which is decay-corrected to its start
        ({"SeriesTime": "121500", "FrameReferenceTime": 3900000, "ActualFrameDuration": 600000}, 0),
        # 20 min before the first frame, from whose start the frames count: a dummy
        ({"SeriesTime": "125500", "FrameReferenceTime": 59900, "ActualFrameDuration": 120000}, 3600),
        ({"SeriesTime": "134000", "private": {(0x0009, "GEMS_PETD_01", 0x0D): ("DT", "20210304131000")}}, 3300),
        ({"SeriesTime": "134000", "private": {(0x0009, "GEMS_PETD_01", 0x0D): ("DT", "19990101131000")}}, 3600),
        ({"SeriesTime": "130000", "Manufacturer": "Philips Medical Systems"}, 3600),
        ({"SeriesTime": "130000", "private": philips(activity=1)}, 3600),
        ({"DecayCorrection": None, "DecayCorrected": "YES", "DecayCorrectionDateTime": "20210304123000"}, 900),
    ],
)
def test_decay_reference(tags, seconds):
    assert one(**tags)[0] == pytest.approx(factor(seconds), rel=1e-9)


def test_the_earliest_slice_counts():
    headers = [header(SeriesTime="150000", AcquisitionTime=t) for t in ("132500", "131500", "132000")]
    np.testing.assert_allclose(suv_factors(headers)[0], factor(3600))


@pytest.mark.parametrize(
    ("tags", "seconds", "note"),
    [
        ({"RadiopharmaceuticalStartDateTime": DATE + "121600"}, 3540, ""),  # preferred
        ({"RadiopharmaceuticalStartDateTime": DATE + "121300"}, 3720, "contradict"),
        ({"RadiopharmaceuticalStartDateTime": "20210305121500.00"}, 3600, "only the time of day"),
        ({"RadiopharmaceuticalStartDateTime": "19000101000000"}, 3600, "only the time of day"),
        ({"RadiopharmaceuticalStartDateTime": "20210306123000", "RadiopharmaceuticalStartTime": None}, 2700, "only"),
        ({"RadiopharmaceuticalStartDateTime": "nonsense"}, 3600, ""),
        ({"RadiopharmaceuticalStartDateTime": DATE + "111500+0000", "TimezoneOffsetFromUTC": "+0100",
          "RadiopharmaceuticalStartTime": None}, 3600, ""),
        ({"RadiopharmaceuticalStartDateTime": DATE + "121500+0100"}, 3600, ""),
        ({"RadiopharmaceuticalStartTime": "1215"}, 3600, ""),
    ],
)  # fmt: skip
def test_injection(tags, seconds, note):
    value, notes = one(**tags)
    assert value == pytest.approx(factor(seconds), rel=1e-9)
    assert note in notes


def nuclide(value, meaning):
    return code(value, "SCT", meaning)


@pytest.mark.parametrize(
    ("tags", "half_life", "note"),
    [
        ({"RadionuclideHalfLife": 6588}, 6588, ""),  # as the scanner has it
        ({"RadionuclideHalfLife": None, "Radiopharmaceutical": "FDG -- fluorodeoxyglucose"}, 6586.2, "F-18 taken"),
        ({"RadionuclideHalfLife": 0, "RadionuclideCodeSequence": nuclide("C-131A3", "")}, 4057.7, "Ga-68 taken"),
        ({"RadionuclideHalfLife": None, "RadionuclideCodeSequence": nuclide("x", "Zirconium 89")}, 282276, "Zr-89"),
        ({"RadionuclideHalfLife": None, "RadionuclideCodeSequence": nuclide("x", "^11^Carbon")}, 1221.8, "C-11"),
        ({"RadionuclideHalfLife": None, "Radiopharmaceutical": "[64Cu]DOTATATE"}, 45721, "Cu-64"),
        ({"RadionuclideHalfLife": None, "Radiopharmaceutical": "68Ga-PSMA-11"}, 4057.7, "Ga-68"),
        ({"RadionuclideHalfLife": 109.8, "Radiopharmaceutical": "F-18 PSMA"}, 6588, "read as minutes"),
        ({"RadionuclideHalfLife": 14551, "Radiopharmaceutical": "Sc-44"}, 14551, "no radionuclide known"),
    ],
)
def test_half_life(tags, half_life, note):
    value, notes = one(RadiopharmaceuticalStartDateTime=DATE + "121500", **tags)
    assert value == pytest.approx(factor(3600, half_life=half_life), rel=1e-9)
    assert note in notes


def test_dose_in_mbq():
    value, notes = one(RadionuclideTotalDose=350)
    assert value == pytest.approx(factor(3600)) and "read as MBq" in notes


def test_philips_counts():
    value, notes = one(Units="CNTS", private=philips(0.000551, 1.6))
    assert value == 0.000551 and "(7053,1000)" in notes
    for no_suv in (None, 0):
        value, notes = one(Units="CNTS", private=philips(no_suv, 1.6))
        assert value == pytest.approx(1.6 * factor(3600)) and "(7053,1009)" in notes
    # with a weight of the user Philips' own SUV does not count
    value, _ = one(SuvOverride(weight_kg=35), Units="CNTS", private=philips(0.000551, 1.6))
    assert value == pytest.approx(0.8 * factor(3600))


def test_philips_factors_of_unknown_type():
    """Explicit VR files may hold private elements as UN, and de-identified ones without their creator."""
    odd = header(Units="CNTS")
    odd.add_new((0x7053, 0x1000), "UN", b"0.000551 ")
    assert suv_factors([odd])[0][0] == 0.000551


def test_a_difference_to_philips_own_factor_is_noted():
    assert "Philips' own" not in one(private=philips(2 * factor(3600), 2))[1]
    assert "SUV is 2.000 times" in one(private=philips(factor(3600), 2))[1]


def test_override_replaces_what_is_missing():
    nothing = dict.fromkeys(("PatientWeight", "RadionuclideTotalDose", "RadionuclideHalfLife",
                             "RadiopharmaceuticalStartTime"))  # fmt: skip
    everything = SuvOverride(80, 200e6, datetime(2021, 3, 4, 12, 0), 4057.7)
    assert one(everything, **nothing)[0] == pytest.approx(factor(4500, 80, 200e6, 4057.7))
    assert one(SuvOverride(weight_kg=80))[0] == pytest.approx(factor(3600, weight=80))


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"PatientWeight": None}, "PatientWeight (0010,1030) is missing or 0; give weight_kg with --suv-override"),
        ({"PatientWeight": 0}, "PatientWeight (0010,1030) is missing or 0"),
        ({"PatientWeight": 70000}, "PatientWeight (0010,1030) is 70000 kg, which cannot be"),
        ({"RadionuclideTotalDose": None}, "RadionuclideTotalDose (0018,1074) is missing or 0; give dose_bq with"),
        ({"RadionuclideTotalDose": 0}, "RadionuclideTotalDose (0018,1074) is missing or 0"),
        ({"RadionuclideTotalDose": 9.5}, "RadionuclideTotalDose (0018,1074) is 9.5 Bq, which cannot be"),  # mCi
        ({"RadionuclideTotalDose": 350000}, "is 350000 Bq, which cannot be"),  # kBq
        ({"RadiopharmaceuticalStartTime": None}, "StartTime (0018,1072) is missing or 0; give injection_datetime"),
        ({"RadiopharmaceuticalStartTime": "140000"}, "is 23.2 h before the scan, which cannot be"),
        ({"RadiopharmaceuticalStartTime": "030000"}, "is 10.2 h before the scan, which cannot be with a half-life"),
        ({"RadionuclideHalfLife": 282276}, "half-life of 78 h the time of day of the injection does not say when"),
        ({"RadionuclideHalfLife": None}, "RadionuclideHalfLife (0018,1075) is missing or 0; give half_life_s with"),
        ({"RadionuclideHalfLife": 4057.7, "Radiopharmaceutical": "FDG"}, "is 4057.7 s, but F-18 has 6586.2 s"),
        ({"RadionuclideHalfLife": 1.83}, "RadionuclideHalfLife (0018,1075) is 1.83 s, which cannot be"),
        ({"DecayCorrection": None}, "DecayCorrection (0054,1102) is missing"),
        ({"DecayCorrection": "NONE", "AcquisitionTime": None}, "AcquisitionTime (0008,0032) is missing"),
        ({"AcquisitionTime": None, "SeriesTime": None}, "AcquisitionTime (0008,0032) is missing"),
        ({"Units": None}, "Units (0054,1001) is missing"),
        ({"Units": "PROPCPS"}, "Units (0054,1001) is PROPCPS"),
        ({"Units": "CNTS"}, "is CNTS without Philips' activity concentration scale factor (7053,1009)"),
        ({"Units": "GML", "SUVType": "LBM"}, "is SUV by LBM, not by body weight (SUVType (0054,1006))"),
        ({"CorrectedImage": ["DECY", "RAN"]}, "is not attenuation-corrected (CorrectedImage (0028,0051) has no ATTN)"),
    ],
)
def test_refused(tags, message):
    assert message in refused(**tags)


def test_refused_override():
    assert "SUV already" in refused(SuvOverride(weight_kg=70), Units="GML")
    late = SuvOverride(injection=datetime(2021, 3, 4, 14, 15))
    assert "injection_datetime of --suv-override is 1.0 h after the scan" in refused(late)
    assert "is 400 kg" not in refused(SuvOverride(weight_kg=401))


OTHERS = {
    "Units": "CNTS", "DecayCorrection": "ADMIN", "PatientWeight": 71, "RadionuclideTotalDose": 351e6,
    "RadionuclideHalfLife": 6588, "RadiopharmaceuticalStartTime": "121501",
    "RadiopharmaceuticalStartDateTime": DATE + "121501",
}  # fmt: skip


@pytest.mark.parametrize("keyword", OTHERS)
def test_slices_that_contradict_each_other(keyword):
    with pytest.raises(UserError, match=f"{keyword}.* differs between the slices"):
        suv_factors([header(), header(), header(**{keyword: OTHERS[keyword]})])


def test_slices_that_say_the_same_in_other_words():
    again = header(RadionuclideTotalDose="3.5e8", RadiopharmaceuticalStartTime="121500.000")
    np.testing.assert_allclose(suv_factors([header(), again])[0], factor(3600))
    both = SuvOverride(dose_bq=350e6)
    np.testing.assert_allclose(suv_factors([header(), header(RadionuclideTotalDose=1e8)], both)[0], factor(3600))


def test_several_injections():
    two = header()
    again = pydicom.Dataset()
    again.RadionuclideTotalDose = 100e6
    two.RadiopharmaceuticalInformationSequence.append(again)
    with pytest.raises(UserError, match="several injections"):
        suv_factors([two])


def test_overrides_file(tmp_path):
    path = tmp_path / "suv.csv"
    path.write_text("\ufeffCase_ID;weight_kg;dose_MBq;injection_datetime;half_life_s\n"
                    "A;70,5;350;2021-03-04 12:15:00;\nB;;;20210304T1215;6586.2\n;;;;\n", encoding="utf-8")  # fmt: skip
    injection = datetime(2021, 3, 4, 12, 15)
    assert read_overrides(path) == {"A": SuvOverride(70.5, 350e6, injection, None),
                                    "B": SuvOverride(None, None, injection, 6586.2)}  # fmt: skip
    path.write_text("case_id,dose_bq\nA,3.5e8\n", encoding="utf-8")
    assert read_overrides(path) == {"A": SuvOverride(dose_bq=350e6)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case_id,weight\nA,70\n", "column 'weight' is unknown or twice; the columns are case_id, weight_kg"),
        ("case_id,weight_kg,weight_kg\nA,70,70\n", "column 'weight_kg' is unknown or twice"),
        ("weight_kg\n70\n", "there is no column case_id"),
        ("", "there is no column case_id"),
        ("case_id,weight_kg\nA,70\nA,71\n", "line 3: case_id is there twice"),
        ("case_id,weight_kg\nA,heavy\n", "line 2: weight_kg is not a number above 0"),
        ("case_id,weight_kg\nA,0\n", "line 2: weight_kg is not a number above 0"),
        ("case_id,weight_kg\nA,70,5\n", "line 2: more cells than columns"),
        ("case_id,weight_kg\n,70\n", "line 2: case_id is empty"),
        ("case_id,dose_bq,dose_mbq\nA,1e8,100\n", "line 2: has dose_bq and dose_mbq"),
        ("case_id,injection_datetime\nA,noon\n", "line 2: injection_datetime is not like"),
    ],
)
def test_bad_overrides_file(tmp_path, text, message):
    path = tmp_path / "suv.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_overrides(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_no_overrides_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_overrides(tmp_path / "nothing.csv")


def test_overrides_in_a_spreadsheet(tmp_path):
    sheet = openpyxl.Workbook()
    for row in (["case_id", "weight_kg", "dose_mbq", "injection_datetime"],
                ["A", 70.5, 350, datetime(2021, 3, 4, 12, 15)], ["B", "70,5", None, None]):  # fmt: skip
        sheet.active.append(row)
    sheet.save(tmp_path / "suv.xlsx")
    assert read_overrides(tmp_path / "suv.xlsx") == {
        "A": SuvOverride(70.5, 350e6, datetime(2021, 3, 4, 12, 15)), "B": SuvOverride(70.5)}  # fmt: skip


def test_a_weight_with_a_comma_is_no_number(tmp_path):
    """Its value is against its type (DS), which pydicom says only when it is asked for."""
    file = write_pet(tmp_path, shape=(3, 6, 7), PatientWeight="70.25")[0]
    file.write_bytes(file.read_bytes().replace(b"70.25", b"70,25"))
    with pytest.raises(UserError, match="PatientWeight .* is no number"):
        suv_factors([pydicom.dcmread(file)])
