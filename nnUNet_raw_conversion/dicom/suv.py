"""Body-weight SUV from PET DICOM: one factor a slice, by the rules of the standard and of the vendors.

SUVbw (g/ml) = activity concentration (Bq/ml) x body weight (g) / injected dose (Bq), both at one time. The rules follow
DICOM PS3.3 C.8.9.1 (PET Series: Units, Decay Correction) and the vendor-neutral pseudo-code of QIBA ("SUV calculation",
qibawiki.rsna.org, Standardized Uptake Value), with what data of the vendors have taught, see `decay.reference_time`.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np
import pydicom
import SimpleITK as sitk

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.body_size import factor_to_body_weight
from nnUNet_raw_conversion.dicom.decay import (
    AGREE,
    CONTRADICT,
    PHILIPS,
    Evidence,
    acquisition_times,
    durations,
    is_blanked,
    reference_time,
    series_time,
    span,
)
from nnUNet_raw_conversion.dicom.fields import (
    field_name,
    no_number,
    number_of,
    parse_time,
    plain_text,
    private_value,
    shown_code,
    text_of,
)
from nnUNet_raw_conversion.dicom.index import Series
from nnUNet_raw_conversion.dicom.injection import (
    START_DATETIME,
    START_TIME,
    check_elapsed,
    check_not_at_once,
    check_override,
    injection_time,
)
from nnUNet_raw_conversion.dicom.overrides import SuvOverride
from nnUNet_raw_conversion.dicom.radionuclide import (
    HALF_LIFE_TOLERANCE,
    RADIONUCLIDES,
    longest_uptake_s,
    radionuclide,
)
from nnUNet_raw_conversion.dicom.volume import read_slices

WEIGHTS_KG = (1, 400)
DOSES_BQ = (1e6, 1e10)
# Doses are some ten to some thousand MBq, so 20 to 1e4 can only be MBq; below it may be mCi (0.1 to 20).
MBQ = (20, 1e4)
LONGEST_FRAME_S = 1200.0  # of a static scan of one bed


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
        GML, CM2ML: is SUV by SUVType (0054,1006): factor 1 for BW or none, else by weight, height and sex, see
            `factor_to_body_weight`.
        CNTS: Philips' SUV scale factor (7053,1000); where it is absent or 0, or there is an override, counts become
            Bq/ml by Philips' activity concentration factor (7053,1009) and are treated as such.
        BQML: weight / (dose x 2^-(t / half-life)), with t by DecayCorrection (0054,1102):
            START: from injection to the start of the scan, see `decay.reference_time`. ADMIN: t = 0.
            NONE: from injection to the mean time of the slice's own frame, see `_in_frame`.

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
            raise UserError(f"PET: {field_name(keyword)} differs between the slices; export the series again",
                            "SUV_SLICES_DIFFER")  # fmt: skip
    _check_attenuation(header, notes)
    units = text_of(header, "Units").upper()
    if units in ("GML", "CM2ML"):
        return np.full(len(headers), _suv_already(header, override, notes)), notes
    if units == "CNTS":
        scale = _private(headers, 0x00)
        if scale.all() and override == SuvOverride():
            return scale, [*notes, "counts to SUV by Philips' SUV scale factor (7053,1000)"]
        scale = _private(headers, 0x09)
        if not scale.all():
            raise UserError("PET: Units (0054,1001) is CNTS without Philips' activity concentration scale factor "
                            "(7053,1009), so counts cannot become SUV; export the PET in Bq/ml or SUV",
                            "SUV_UNITS")  # fmt: skip
        notes.append("counts to Bq/ml by Philips' activity concentration scale factor (7053,1009)")
    elif units == "BQML":
        scale = np.ones(len(headers))
    else:
        raise UserError(f"PET: {field_name('Units')} is {shown_code(units)}; export the PET in Bq/ml or as SUVbw",
                        "SUV_UNITS")  # fmt: skip
    weight = _weight_g(header, override)
    drug = _radiopharmaceutical(headers, override)
    dose = _dose_bq(drug, override, notes)
    sure = weight / dose if override == SuvOverride() else None
    factors = scale * weight / (dose * _dose_left(headers, drug, sure, override, notes))
    _compare_with_philips(headers, factors / scale, override, notes)
    return factors, notes


def _suv_already(header: pydicom.Dataset, override: SuvOverride, notes: list[str]) -> float:
    """What makes SUVbw of SUV."""
    if override != SuvOverride():
        raise UserError(f"PET: is SUV already ({field_name('Units')} GML or CM2ML), so --suv-override does not apply; "
                        "remove its row or export the PET in Bq/ml", "SUV_UNITS")  # fmt: skip
    kind = text_of(header, "SUVType").upper()
    if kind in ("", "BW") and text_of(header, "Units").upper() == "GML":
        notes.append("Units GML: SUVbw as stored")
        return 1.0
    return factor_to_body_weight(header, _weight_g(header, override) / 1000, notes)


def _check_attenuation(header: pydicom.Dataset, notes: list[str]) -> None:
    corrected = header.get("CorrectedImage") or []
    corrected = [corrected] if isinstance(corrected, str) else list(corrected)
    if (corrected and "ATTN" not in corrected) or text_of(header, "AttenuationCorrected") == "NO":
        raise UserError(f"PET: is not attenuation-corrected ({field_name('CorrectedImage')} has no ATTN), its SUV mean "
                        "nothing; take the corrected series", "SUV_NOT_CORRECTED")  # fmt: skip
    if not corrected and not text_of(header, "AttenuationCorrected"):
        notes.append(f"{field_name('CorrectedImage')} is missing; attenuation correction assumed")


def _weight_g(header: pydicom.Dataset, override: SuvOverride) -> float:
    weight = override.weight_kg if override.weight_kg is not None else number_of(header, "PatientWeight")
    if not weight:
        raise UserError(_missing(header, "PatientWeight", "weight_kg"), "SUV_WEIGHT_MISSING")
    low, high = WEIGHTS_KG
    if not low <= weight <= high:  # grams, pounds, a typing error: not for us to guess
        raise UserError(f"PET: {field_name('PatientWeight')} is {weight:g} kg, which cannot be; give weight_kg with "
                        "--suv-override", "SUV_WEIGHT_IMPLAUSIBLE")  # fmt: skip
    return 1000 * weight


def _radiopharmaceutical(headers: list[pydicom.Dataset], override: SuvOverride) -> pydicom.Dataset:
    """The one item of the radiopharmaceutical's sequence, the same in all slices, or an empty one."""
    drugs = []
    for header in headers:
        items = header.get("RadiopharmaceuticalInformationSequence") or [pydicom.Dataset()]
        if len(items) > 1:
            _check_one_injection(items, override)
        drugs.append(items[0])
    for keyword, column, given, read in (
        ("RadionuclideTotalDose", "dose_bq", override.dose_bq, number_of),
        ("RadionuclideHalfLife", "half_life_s", override.half_life_s, number_of),
        (START_TIME, "injection_datetime", override.injection, lambda drug, name: parse_time(text_of(drug, name))),
        ("RadiopharmaceuticalStartDateTime", "injection_datetime", override.injection, text_of),
    ):
        if given is None and len({read(drug, keyword) for drug in drugs}) > 1:
            raise UserError(f"PET: {field_name(keyword)} differs between the slices; export the series again, or give "
                            f"{column} with --suv-override", "SUV_SLICES_DIFFER")  # fmt: skip
    return drugs[0]


def _check_one_injection(items: list[pydicom.Dataset], override: SuvOverride) -> None:
    """Raises UserError where items differ in what the user has not given instead; copies of one item are one."""
    differing = []
    for what, column, given, read in (
        ("doses", "dose_bq", override.dose_bq, lambda one: number_of(one, "RadionuclideTotalDose")),
        ("times", "injection_datetime", override.injection,
         lambda one: (parse_time(text_of(one, START_TIME)), text_of(one, START_DATETIME))),
        ("half-lives", "half_life_s", override.half_life_s, lambda one: number_of(one, "RadionuclideHalfLife")),
        ("radionuclides", "half_life_s", override.half_life_s, radionuclide),
    ):  # fmt: skip
        if given is None and len({read(one) for one in items}) > 1:
            differing.append((what, column))
    if differing:
        columns = " and ".join(dict.fromkeys(column for _, column in differing))
        raise UserError("PET: RadiopharmaceuticalInformationSequence (0054,0016) has several injections, which differ "
                        f"in their {' and '.join(what for what, _ in differing)}; give {columns} with --suv-override",
                        "SUV_SEVERAL_INJECTIONS")  # fmt: skip


def _dose_bq(drug: pydicom.Dataset, override: SuvOverride, notes: list[str]) -> float:
    dose = override.dose_bq if override.dose_bq is not None else number_of(drug, "RadionuclideTotalDose")
    if not dose:
        raise UserError(_missing(drug, "RadionuclideTotalDose", "dose_bq"), "SUV_DOSE_MISSING")
    if override.dose_bq is None and MBQ[0] <= dose < MBQ[1]:
        notes.append(f"{field_name('RadionuclideTotalDose')} is {dose:g}, read as MBq")
        dose *= 1e6
    if not DOSES_BQ[0] <= dose <= DOSES_BQ[1]:
        raise UserError(f"PET: {field_name('RadionuclideTotalDose')} is {dose:g} Bq, which cannot be; give dose_bq "
                        "with --suv-override", "SUV_DOSE_IMPLAUSIBLE")  # fmt: skip
    return dose


def _dose_left(
    headers: list[pydicom.Dataset], drug: pydicom.Dataset, sure: float | None, override: SuvOverride, notes: list[str]
) -> np.ndarray:
    """The part of the injected dose that is left at the time to which each slice is decay-corrected, (N,).

    `sure` is weight (g) / dose (Bq), None where they are not the header's.
    """
    correction = text_of(headers[0], "DecayCorrection").upper()
    if not correction and text_of(headers[0], "DecayCorrected"):  # enhanced PET
        correction = "START" if text_of(headers[0], "DecayCorrected") == "YES" else "NONE"
    if correction == "ADMIN":
        notes.append("decay-corrected to the injection (ADMIN)")
        return np.ones(len(headers))
    if correction not in ("START", "NONE"):
        raise UserError(f"PET: {field_name('DecayCorrection')} is {shown_code(correction)}, not START, "
                        "ADMIN or NONE, so the time to which it is decay-corrected is unknown; export it again",
                        "SUV_DECAY_CORRECTION")  # fmt: skip
    half_life = _half_life_s(drug, override, notes)
    acquired = acquisition_times(headers)
    known = [time for time in acquired if time] or [series_time(headers[0]) or override.decay_reference]
    if known[0] is None or (correction == "NONE" and None in acquired):
        give = ", or give decay_reference_datetime with --suv-override" if correction == "START" else ""
        raise UserError(f"PET: {field_name('AcquisitionTime')} is missing or 00:00:00, and with it the time of the "
                        f"scan; export the PET again with it, or as SUVbw{give}", "SUV_TIME_MISSING")  # fmt: skip
    scan = min(known)
    if any(acquired) and not override.decay_reference:
        _check_blanked(headers, acquired, scan, half_life)
    injection = override.injection or injection_time(headers, drug, scan, half_life, notes)
    uptake, left = (scan - injection).total_seconds(), 1.0
    if override.injection:
        check_override(uptake, half_life, "injection_datetime")
    else:
        check_elapsed(uptake, half_life)
        check_not_at_once(headers, uptake, half_life)
    if correction == "START":
        start, source = _reference(headers, acquired, injection, half_life, sure, override, notes)
        notes.append(f"decay-corrected to the start of the scan ({source})")
        times = [start] * len(headers)
    else:
        notes.append("not decay-corrected (NONE): done for each slice from the time of its frame")
        if "DECY" in text_of(headers[0], "CorrectedImage"):
            notes.append(f"{field_name('CorrectedImage')} says that it is decay-corrected; look at its SUV")
        times, left = acquired, _in_frame(headers, acquired, half_life, notes)
    elapsed = np.array([(time - injection).total_seconds() for time in times])
    if override.decay_reference and correction == "START":
        check_override(elapsed.min(), half_life, "decay_reference_datetime")
    elif elapsed.min() < -span(AGREE, half_life).total_seconds():
        check_elapsed(elapsed.min(), half_life)
    notes.append(f"{elapsed.min() / 60:.0f} min from injection to scan")
    return np.exp2(-elapsed / half_life) * left


def _check_blanked(
    headers: list[pydicom.Dataset], acquired: list[datetime | None], scan: datetime, half_life: float
) -> None:
    """Raises UserError where some times of beds are blanked ones, and no SeriesTime says that the first bed's is not.
    """
    blanked = sum(time is None and is_blanked(header) for header, time in zip(headers, acquired, strict=True))
    series = series_time(headers[0])
    if blanked and not (series and abs(series - scan) <= span(CONTRADICT, half_life)):
        raise UserError(f"PET: {field_name('AcquisitionTime')} of {blanked} of {len(headers)} slices is 00:00:00, as "
                        "anonymisers write, so the start of the scan is not certain; give decay_reference_datetime "
                        "with --suv-override", "SUV_TIME_MISSING")  # fmt: skip


def _half_life_s(drug: pydicom.Dataset, override: SuvOverride, notes: list[str]) -> float:
    """The half-life of the header, compared with that of the radionuclide it names, which replaces it if absent."""
    if override.half_life_s is not None:
        return override.half_life_s
    nuclide = radionuclide(drug)
    stated, known = number_of(drug, "RadionuclideHalfLife"), RADIONUCLIDES[nuclide][0] if nuclide else None
    name = field_name("RadionuclideHalfLife")
    if not stated:
        if known is None:
            raise UserError(_missing(drug, "RadionuclideHalfLife", "half_life_s"), "SUV_HALF_LIFE")
        notes.append(f"{name} is missing, {known:g} s of {nuclide} taken")
        return known
    if known is not None and abs(60 * stated / known - 1) < HALF_LIFE_TOLERANCE:
        notes.append(f"{name} is {stated:g}, read as minutes")
        return 60 * stated
    if known is not None and abs(stated / known - 1) > HALF_LIFE_TOLERANCE:
        raise UserError(f"PET: {name} is {stated:g} s, but {nuclide} has {known:g} s; give half_life_s with "
                        "--suv-override", "SUV_HALF_LIFE")  # fmt: skip
    if all(abs(stated / value - 1) > HALF_LIFE_TOLERANCE for value, *_ in RADIONUCLIDES.values()):
        if stated < 60:
            raise UserError(f"PET: {name} is {stated:g} s, which cannot be; give half_life_s with --suv-override",
                            "SUV_HALF_LIFE")  # fmt: skip
        notes.append(f"{name} is {stated:g} s, that of no radionuclide known here")
    return stated


def _reference(
    headers: list[pydicom.Dataset], acquired: list[datetime | None], injection: datetime, half_life: float,
    sure: float | None, override: SuvOverride, notes: list[str],
) -> tuple[datetime, str]:  # fmt: skip
    """The time to which DecayCorrection START refers and its source; `sure` is weight (g) / dose (Bq) of the header."""
    if override.decay_reference:
        return override.decay_reference, "decay_reference_datetime of --suv-override"
    more = []
    to_suv, to_bqml = (_private(headers[:1], element)[0] for element in (0x00, 0x09))
    if sure and to_suv > 0 and to_bqml > 0:
        uptake = half_life * float(np.log2(to_suv / to_bqml / sure))
        if 0 <= uptake <= longest_uptake_s(half_life):  # else its weight or dose is another, see _compare_with_philips
            more = [Evidence("Philips' own factors (7053,1000) / (7053,1009)",
                             injection + timedelta(seconds=uptake), 2, stated=False)]  # fmt: skip
    return reference_time(headers, acquired, injection, half_life, more, notes)


def _in_frame(
    headers: list[pydicom.Dataset], acquired: list[datetime], half_life: float, notes: list[str]
) -> np.ndarray:
    """What the average activity of each frame is in parts of that at its start, (N,): (1 - exp(-x)) / x with x = ln 2 x
    duration / half-life.

    Where the duration is not said it is at most the time from bed to bed; 1 if that matters by less than 2%.
    """
    length = durations(headers)
    if np.isnan(length).any():
        steps = np.diff(np.unique([(time - acquired[0]).total_seconds() for time in acquired]))
        longest = steps.min() if steps.size else LONGEST_FRAME_S
        left_out = np.log(2) * longest / half_life / 2
        if left_out > CONTRADICT:
            raise UserError(f"PET: is not decay-corrected (NONE) and {field_name('ActualFrameDuration')} is missing, "
                            f"so the decay within the frame (up to {100 * left_out:.0f}%) is unknown; export it "
                            "decay-corrected", "SUV_FRAME_DURATION_MISSING")  # fmt: skip
        notes.append(f"{field_name('ActualFrameDuration')} is missing: decay within the frame, up to "
                     f"{100 * left_out:.1f}%, is left out")  # fmt: skip
    x = np.log(2) * np.nan_to_num(length) / half_life
    return np.where(x > 0, -np.expm1(-x) / np.where(x > 0, x, 1), 1.0)


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


def _private(headers: list[pydicom.Dataset], element: int) -> np.ndarray:
    """A number of Philips' private group in each header, 0 where it is absent."""
    values = []
    for header in headers:
        try:
            values.append(float(plain_text(private_value(header, 0x7053, PHILIPS, element) or 0)))
        except ValueError:
            values.append(0.0)
    return np.array(values)


def _missing(item: pydicom.Dataset, keyword: str, column: str) -> str:
    return f"PET: {field_name(keyword)} {no_number(item, keyword)}; give {column} with --suv-override"
