"""Body-weight SUV from PET DICOM: one factor a slice, by the rules of the standard and of the vendors.

SUVbw (g/ml) = activity concentration (Bq/ml) x body weight (g) / injected dose (Bq), both at one time. The rules follow
DICOM PS3.3 C.8.9.1 (PET Series: Units, Decay Correction) and the vendor-neutral pseudo-code of QIBA ("SUV calculation",
qibawiki.rsna.org, Standardized Uptake Value), with what data of Philips have taught, see `_scan_start`.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np
import pydicom
import SimpleITK as sitk

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.fields import (
    date_and_time,
    field_name,
    moment_of,
    number_of,
    parse_datetime,
    parse_time,
    plain_text,
    text_of,
)
from nnUNet_raw_conversion.dicom.index import Series
from nnUNet_raw_conversion.dicom.overrides import SuvOverride
from nnUNet_raw_conversion.dicom.radionuclide import RADIONUCLIDES, radionuclide
from nnUNet_raw_conversion.dicom.volume import read_slices

PHILIPS, GE = "Philips PET Private Group", "GEMS_PETD_01"
HALF_LIFE_TOLERANCE = 0.02  # headers have 6580 to 6588 s for F-18; 1% is a SUV error of 0.4% after an hour
MOST_HALF_LIVES = 5  # 9 h for F-18: 3% of the dose is left, nobody scans later
WEIGHTS_KG = (1, 400)
DOSES_BQ = (1e6, 1e10)
# Doses are some ten to some thousand MBq, so 20 to 1e4 can only be MBq; below it may be mCi (0.1 to 20).
MBQ = (20, 1e4)
# A series time this long before the first slice is no start of a scan, unless the frames' own times confirm it.
LONGEST_WAIT = timedelta(hours=1)
START_TIME = "RadiopharmaceuticalStartTime"
CLOCK_ERROR = timedelta(seconds=1)


def read_suv(series: Series, override: SuvOverride | None = None) -> tuple[sitk.Image, list[str]]:
    """The PET series as float32 image of SUVbw (g/ml), and what the user should know, one sentence each.

    Raises:
        UserError: see `read_volume` and `suv_factors`.
    """
    volume = read_slices(series)
    factors, notes = suv_factors(volume.headers, override)
    volume.values *= factors[:, None, None].astype(np.float32)
    return volume.image(), volume.notes + notes


def suv_factors(headers: list[pydicom.Dataset], override: SuvOverride | None = None) -> tuple[np.ndarray, list[str]]:
    """What makes SUVbw of the rescaled values of each slice of one PET series.

    Units (0054,1001):
        GML: is SUVbw, factor 1 (SUVType (0054,1006) absent or BW; other types are refused).
        CNTS: Philips' SUV scale factor (7053,1000); where it is absent or 0, or there is an override, counts become
            Bq/ml by Philips' activity concentration factor (7053,1009) and are treated as such.
        BQML: weight / (dose x 2^-(t / half-life)), with t by DecayCorrection (0054,1102):
            START: from injection to the start of the scan, see `_scan_start`. ADMIN: t = 0.
            NONE: from injection to the slice's own acquisition time, which is the start of its frame. (Decay within
            the frame is left out: 0.6% too little for F-18 and a frame of 2 min.)

    Args:
        headers: of all slices; the earliest acquisition is looked for in them.

    Returns:
        float64 (N,), and sentences on the rule that was used and what was odd about the headers.

    Raises:
        UserError: not attenuation-corrected; a field is missing, implausible or contradicts another.
    """
    override = override or SuvOverride()
    notes: list[str] = []
    header = headers[0]
    for keyword in ("Units", "DecayCorrection", "PatientWeight"):
        if any(text_of(other, keyword) != text_of(header, keyword) for other in headers):
            raise UserError(f"PET: {field_name(keyword)} differs between the slices; export the series again")
    _check_attenuation(header, notes)
    units = text_of(header, "Units").upper()
    if units == "GML":
        return np.ones(len(headers)), [*notes, _suv_already(header, override)]
    if units == "CNTS":
        scale = _private(headers, 0x00)
        if scale.all() and override == SuvOverride():
            return scale, [*notes, "counts to SUV by Philips' SUV scale factor (7053,1000)"]
        scale = _private(headers, 0x09)
        if not scale.all():
            raise UserError("PET: Units (0054,1001) is CNTS without Philips' activity concentration scale factor "
                            "(7053,1009), so counts cannot become SUV; export the PET in Bq/ml or SUV")  # fmt: skip
        notes.append("counts to Bq/ml by Philips' activity concentration scale factor (7053,1009)")
    elif units == "BQML":
        scale = np.ones(len(headers))
    else:
        raise UserError(f"PET: {field_name('Units')} is {units or 'missing'}; export the PET in Bq/ml or as SUVbw")
    weight = _weight_g(header, override)
    drug = _radiopharmaceutical(headers, override)
    dose = _dose_bq(drug, override, notes)
    factors = scale * weight / (dose * np.exp2(-_half_lives(headers, drug, override, notes)))
    _compare_with_philips(headers, factors / scale, override, notes)
    return factors, notes


def _suv_already(header: pydicom.Dataset, override: SuvOverride) -> str:
    kind = text_of(header, "SUVType").upper() or "BW"
    if kind != "BW":
        raise UserError(f"PET: is SUV by {kind}, not by body weight ({field_name('SUVType')}); export it in Bq/ml or "
                        "as SUVbw")  # fmt: skip
    if override != SuvOverride():
        raise UserError(f"PET: is SUV already ({field_name('Units')} GML), so --suv-override does not apply; remove "
                        "its row or export the PET in Bq/ml")  # fmt: skip
    return "Units GML: SUVbw as stored"


def _check_attenuation(header: pydicom.Dataset, notes: list[str]) -> None:
    corrected = header.get("CorrectedImage") or []
    corrected = [corrected] if isinstance(corrected, str) else list(corrected)
    if (corrected and "ATTN" not in corrected) or text_of(header, "AttenuationCorrected") == "NO":
        raise UserError(f"PET: is not attenuation-corrected ({field_name('CorrectedImage')} has no ATTN), its SUV mean "
                        "nothing; take the corrected series")  # fmt: skip
    if not corrected and not text_of(header, "AttenuationCorrected"):
        notes.append(f"{field_name('CorrectedImage')} is missing; attenuation correction assumed")


def _weight_g(header: pydicom.Dataset, override: SuvOverride) -> float:
    weight = override.weight_kg if override.weight_kg is not None else number_of(header, "PatientWeight")
    if not weight:
        raise UserError(_missing("PatientWeight", "weight_kg"))
    low, high = WEIGHTS_KG
    if not low <= weight <= high:  # grams, pounds, a typing error: not for us to guess
        raise UserError(f"PET: {field_name('PatientWeight')} is {weight:g} kg, which cannot be; give weight_kg with "
                        "--suv-override")  # fmt: skip
    return 1000 * weight


def _radiopharmaceutical(headers: list[pydicom.Dataset], override: SuvOverride) -> pydicom.Dataset:
    """The one item of the radiopharmaceutical's sequence, the same in all slices, or an empty one."""
    drugs = []
    for header in headers:
        items = header.get("RadiopharmaceuticalInformationSequence") or [pydicom.Dataset()]
        if len({str(item.get("RadionuclideTotalDose")) for item in items}) > 1 and override.dose_bq is None:
            raise UserError("PET: RadiopharmaceuticalInformationSequence (0054,0016) has several injections; give "
                            "dose_bq and injection_datetime with --suv-override")  # fmt: skip
        drugs.append(items[0])
    for keyword, column, given, read in (
        ("RadionuclideTotalDose", "dose_bq", override.dose_bq, number_of),
        ("RadionuclideHalfLife", "half_life_s", override.half_life_s, number_of),
        (START_TIME, "injection_datetime", override.injection, lambda drug, name: parse_time(text_of(drug, name))),
        ("RadiopharmaceuticalStartDateTime", "injection_datetime", override.injection, text_of),
    ):
        if given is None and len({read(drug, keyword) for drug in drugs}) > 1:
            raise UserError(f"PET: {field_name(keyword)} differs between the slices; export the series again, or give "
                            f"{column} with --suv-override")  # fmt: skip
    return drugs[0]


def _dose_bq(drug: pydicom.Dataset, override: SuvOverride, notes: list[str]) -> float:
    dose = override.dose_bq if override.dose_bq is not None else number_of(drug, "RadionuclideTotalDose")
    if not dose:
        raise UserError(_missing("RadionuclideTotalDose", "dose_bq"))
    if override.dose_bq is None and MBQ[0] <= dose < MBQ[1]:
        notes.append(f"{field_name('RadionuclideTotalDose')} is {dose:g}, read as MBq")
        dose *= 1e6
    if not DOSES_BQ[0] <= dose <= DOSES_BQ[1]:
        raise UserError(f"PET: {field_name('RadionuclideTotalDose')} is {dose:g} Bq, which cannot be; give dose_bq "
                        "with --suv-override")  # fmt: skip
    return dose


def _half_lives(
    headers: list[pydicom.Dataset], drug: pydicom.Dataset, override: SuvOverride, notes: list[str]
) -> np.ndarray:
    """How many half-lives lie between the injection and the time to which each slice is decay-corrected, (N,)."""
    correction = text_of(headers[0], "DecayCorrection").upper()
    if not correction and text_of(headers[0], "DecayCorrected"):  # enhanced PET
        correction = "START" if text_of(headers[0], "DecayCorrected") == "YES" else "NONE"
    if correction == "ADMIN":
        notes.append("decay-corrected to the injection (ADMIN)")
        return np.zeros(len(headers))
    if correction not in ("START", "NONE"):
        raise UserError(f"PET: {field_name('DecayCorrection')} is {correction or 'missing'}, not START, ADMIN "
                        "or NONE, so the time to which it is decay-corrected is unknown; export it again")  # fmt: skip
    half_life = _half_life_s(drug, override, notes)
    acquired = [_acquired(header) for header in headers]
    known = [time for time in acquired if time] or [_series_time(headers[0])]
    if known[0] is None or (correction == "NONE" and None in acquired):
        raise UserError(f"PET: {field_name('AcquisitionTime')} is missing, and with it the time of the scan; "
                        "export the PET again with it, or as SUVbw")  # fmt: skip
    injection = override.injection or _injection(headers[0], drug, min(known), half_life, notes)
    if correction == "START":
        start, source = _scan_start(headers, min(known), injection)
        notes.append(f"decay-corrected to the start of the scan ({source})")
        times = [start] * len(headers)
    else:
        notes.append("not decay-corrected (NONE): done for each slice from its acquisition time")
        if "DECY" in text_of(headers[0], "CorrectedImage"):
            notes.append(f"{field_name('CorrectedImage')} says that it is decay-corrected; look at its SUV")
        times = acquired
    elapsed = np.array([(time - injection).total_seconds() for time in times])
    _check_elapsed(elapsed, half_life, override)
    notes.append(f"{elapsed.min() / 60:.0f} min from injection to scan")
    return elapsed / half_life


def _half_life_s(drug: pydicom.Dataset, override: SuvOverride, notes: list[str]) -> float:
    """The half-life of the header, compared with that of the radionuclide it names, which replaces it if absent."""
    if override.half_life_s is not None:
        return override.half_life_s
    nuclide = radionuclide(drug)
    stated, known = number_of(drug, "RadionuclideHalfLife"), RADIONUCLIDES[nuclide][0] if nuclide else None
    name = field_name("RadionuclideHalfLife")
    if not stated:
        if known is None:
            raise UserError(_missing("RadionuclideHalfLife", "half_life_s"))
        notes.append(f"{name} is missing, {known:g} s of {nuclide} taken")
        return known
    if known is not None and abs(60 * stated / known - 1) < HALF_LIFE_TOLERANCE:
        notes.append(f"{name} is {stated:g}, read as minutes")
        return 60 * stated
    if known is not None and abs(stated / known - 1) > HALF_LIFE_TOLERANCE:
        raise UserError(f"PET: {name} is {stated:g} s, but {nuclide} has {known:g} s; give half_life_s with "
                        "--suv-override")  # fmt: skip
    if all(abs(stated / value - 1) > HALF_LIFE_TOLERANCE for value, *_ in RADIONUCLIDES.values()):
        if stated < 60:
            raise UserError(f"PET: {name} is {stated:g} s, which cannot be; give half_life_s with --suv-override")
        notes.append(f"{name} is {stated:g} s, that of no radionuclide known here")
    return stated


def _scan_start(headers: list[pydicom.Dataset], earliest: datetime, injection: datetime) -> tuple[datetime, str]:
    """The time to which DecayCorrection START refers, and where it is from.

    In the order of preference:
    - DecayCorrectionDateTime (0018,9701), by which an enhanced PET says it.
    - Philips: the earliest acquisition. Its own factors (7053,1000) / (7053,1009) follow from it, to 1e-4, also where
      SeriesTime is a dummy of the de-identification.
    - SeriesDate and SeriesTime, which other scanners set to the start of the first frame. Not if they are dummies or
      those of a later processing: after the earliest acquisition, before the injection, or more than an hour before
      the earliest acquisition. Where the frames say which of the two they count from (`_counts_from`), that is it.
    - GE: the private scan date-time (0009,100d).
    - The earliest acquisition.
    """
    header = min(headers, key=lambda one: _acquired(one) or datetime.max)
    stated = moment_of(header, "DecayCorrectionDateTime", header)
    if stated:
        return stated, "DecayCorrectionDateTime"
    if "philips" in text_of(header, "Manufacturer").lower() or _private([header], 0x09).any():
        return earliest, "earliest acquisition, as of Philips"
    series = _series_time(header)
    if series and injection <= series <= earliest + CLOCK_ERROR:
        soon = earliest - series <= LONGEST_WAIT and not _counts_from(earliest, header)
        if soon or _counts_from(series, header):
            return series, "SeriesTime"
    scan = _ge_scan_start(header)
    if scan and abs(scan - earliest) <= LONGEST_WAIT:
        return scan, "GE's scan date-time (0009,100d)"
    return earliest, "earliest acquisition; SeriesTime is missing, later or a dummy"


def _counts_from(start: datetime, header: pydicom.Dataset) -> bool:
    """Whether FrameReferenceTime (0054,1300), in ms, of the frame counts from `start`, as far as can be told.

    It lasts from the reference of the decay correction to about the middle of the frame (PS3.3 C.8.9.4). Some scanners
    leave it 0, and then it says nothing.
    """
    acquired, reference = _acquired(header), number_of(header, "FrameReferenceTime")
    frame = timedelta(milliseconds=number_of(header, "ActualFrameDuration") or 0)
    if acquired is None or not reference:
        return False
    away = acquired + frame / 2 - timedelta(milliseconds=reference) - start
    return abs(away) <= frame / 2 + timedelta(seconds=10)


def _ge_scan_start(header: pydicom.Dataset) -> datetime | None:
    try:
        return parse_datetime(plain_text(header.private_block(0x0009, GE)[0x0D].value), header)
    except KeyError:
        return None


def _injection(
    header: pydicom.Dataset, drug: pydicom.Dataset, scan: datetime, half_life: float, notes: list[str]
) -> datetime:
    """The start of the injection, in the time of the header.

    RadiopharmaceuticalStartDateTime (0018,1078) where it lies before the scan by less than 5 half-lives. Else its date
    is not that of the images, as where de-identification moved the two by different numbers of days, and only a time
    of day counts: RadiopharmaceuticalStartTime (0018,1072), or that of the date-time, on the day of the scan, or the
    day before if that is after the scan.
    """
    stated = moment_of(drug, "RadiopharmaceuticalStartDateTime", header)
    time = parse_time(text_of(drug, "RadiopharmaceuticalStartTime"))
    if stated and 0 <= (scan - stated).total_seconds() <= MOST_HALF_LIVES * half_life:
        if time is not None and abs((_midnight(stated) + time - stated).total_seconds()) > 60:
            notes.append(f"{field_name('RadiopharmaceuticalStartDateTime')} and {field_name(START_TIME)} contradict "
                         "each other, the first is used")  # fmt: skip
        return stated
    if time is None and stated:
        time = stated - _midnight(stated)
    if time is None:
        raise UserError(_missing(START_TIME, "injection_datetime"))
    if MOST_HALF_LIVES * half_life > 86400:  # Zr-89 is imaged days later
        raise UserError(f"PET: with a half-life of {half_life / 3600:.0f} h the time of day of the injection does not "
                        "say when it was, and its day is missing or not shortly before the scan; give "
                        "injection_datetime with --suv-override")  # fmt: skip
    if stated:
        notes.append(f"{field_name('RadiopharmaceuticalStartDateTime')} is not shortly before the scan, only the time "
                     "of day of the injection is used")  # fmt: skip
    injection = _midnight(scan) + time
    return injection if injection <= scan else injection - timedelta(days=1)


def _midnight(moment: datetime) -> datetime:
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


def _check_elapsed(elapsed: np.ndarray, half_life: float, override: SuvOverride) -> None:
    """Raises UserError if the injection (`elapsed` s before the slices' reference times) cannot be true."""
    worst = elapsed.min() if elapsed.min() < 0 else elapsed.max()
    if -CLOCK_ERROR.total_seconds() <= worst <= MOST_HALF_LIVES * half_life:
        return
    when = f"{abs(worst) / 3600:.1f} h {'before' if worst > 0 else 'after'} the scan"
    if override.injection:
        raise UserError(f"PET: injection_datetime of --suv-override is {when}; give it in the scanner's local time, on "
                        "the date that the images have")  # fmt: skip
    raise UserError(f"PET: the injection by {field_name(START_TIME)} is {when}, which cannot be with a half-life of "
                    f"{half_life:g} s; give injection_datetime with --suv-override")  # fmt: skip


def _compare_with_philips(
    headers: list[pydicom.Dataset], factors: np.ndarray, override: SuvOverride, notes: list[str]
) -> None:
    """Note a difference of more than 1% between SUV per Bq/ml here and by Philips, where it says both its factors."""
    to_suv, to_bqml = _private(headers[:1], 0x00), _private(headers[:1], 0x09)
    if override == SuvOverride() and to_suv.all() and to_bqml.all():
        ratio = float(factors[0] * to_bqml[0] / to_suv[0])
        if abs(ratio - 1) > 0.01:
            notes.append(f"SUV is {ratio:.3f} times what Philips' own factor (7053,1000) gives; check weight, dose and "
                         "times")  # fmt: skip


def _series_time(header: pydicom.Dataset) -> datetime | None:
    return date_and_time(header, ("SeriesDate", "AcquisitionDate", "StudyDate"), "SeriesTime")


def _acquired(header: pydicom.Dataset) -> datetime | None:
    """When the frame of the slice began."""
    own = moment_of(header, "FrameAcquisitionDateTime", header)
    if own:
        return own
    time = date_and_time(header, ("AcquisitionDate", "SeriesDate", "StudyDate"), "AcquisitionTime")
    if time is None:
        return moment_of(header, "AcquisitionDateTime", header)
    series = _series_time(header)
    if text_of(header, "AcquisitionDate") or series is None:
        return time
    return time + timedelta(days=round((series - time) / timedelta(days=1)))  # over midnight


def _private(headers: list[pydicom.Dataset], element: int) -> np.ndarray:
    """A number of Philips' private group in each header, 0 where it is absent."""
    values = []
    for header in headers:
        try:
            found = header.private_block(0x7053, PHILIPS)[element]
        except KeyError:  # de-identification may remove the block's creator and keep the block
            found = header.get((0x7053, 0x1000 + element))
        try:
            values.append(float(plain_text(found.value)) if found else 0.0)
        except ValueError:
            values.append(0.0)
    return np.array(values)


def _missing(keyword: str, column: str) -> str:
    return f"PET: {field_name(keyword)} is missing or 0; give {column} with --suv-override"
