"""Of the many series of a PET/CT study, the ones to convert: the whole-body PET, its CT, and the lesions' contours.

Everything is judged by what the headers say about the images; the series' descriptions, which every hospital words in
its own way, only exclude what is no such image (NAC, MIP, scout) or break ties.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pydicom

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.beds import axial_range, kind_of, normal_of, with_beds
from nnUNet_raw_conversion.dicom.index import Series, read_header

_NAC = re.compile(
    r"(?<![a-z])(?:nac|no[nt]? ?(?:ac|att\w*|corr\w*)|(?:without|ohne) ?(?:ac|att\w*|schw\w*))(?![a-z])|uncorr", re.I
)
_NO_VOLUME = re.compile(
    r"mip(?![a-z])|scout|topogram|surview|localizer|screen(?!ing)|report|patient ?protocol|fusion|fused", re.I
)
_NO_BODY_CT = re.compile(r"bolus|monitoring|smart ?prep|perfusion|dose[ _]?report", re.I)
_SHARP_TEXT = re.compile(r"lung|lunge|bone|knochen|hrct|edge|sharp", re.I)
# Siemens: B60f, Br64d, Bl57, I70f; Philips: L, YA..YE; Toshiba: FC30-FC59, FC80-FC86; GE by name
_SHARP_KERNEL = re.compile(r"[BIH][a-z]?[5-9]\d|L$|Y[A-E]$|FC[3-58]\d|LUNG|BONE|EDGE|DETAIL|SHARP", re.I)
_LOW_DOSE = re.compile(r"low ?dose|(?<![a-z])ld(?:ct)?(?![a-z])|ac ?ct|ct ?ac|attenuation|niedrigdosis", re.I)
_LEAST_SLICES = 5
ENOUGH = 0.95
"""Of the PET's length is what a CT must cover to need no other; tables and beds end at different slices."""


def choose_pet(series: Sequence[Series]) -> tuple[Series, str]:
    """The attenuation-corrected static PET with the longest axial extent, and why it was taken (for the report).

    Where the body is in several series that continue each other, the others are its `beds`; `remarks` of it say so, and
    which could not be joined.

    Raises:
        UserError: there is none; why each PET series is unusable.
    """
    pets = [one for one in series if one.modality == "PT"]
    faults = {id(one): _pet_fault(one) for one in pets}
    usable = [one for one in pets if not faults[id(one)]]
    left = sorted({f"'{label(one)}' ({fault})" for one in pets if (fault := faults[id(one)])})
    if not usable:
        raise UserError(f"no usable PET series: {'; '.join(left)}" if left else "no PET series (Modality PT)")
    longest = max(_length(one) for one in usable) if len(usable) > 1 else 0

    def rank(one: Series) -> tuple:
        body_weight = (_values(one.header, "SUVType") or ["BW"])[0] == "BW"
        unit = (_values(one.header, "Units") or [""])[0] in ("BQML", "CNTS", "GML") and body_weight
        stated = "ATTN" in _values(one.header, "CorrectedImage")
        original = "ORIGINAL" in _values(one.header, "ImageType")
        long = len(usable) == 1 or _length(one) > 0.95 * longest
        return long, unit, stated, original, -_number(one.header, "SeriesNumber"), one.series_uid

    best, *others = sorted(usable, key=rank, reverse=True)
    ranks = {id(one): rank(one) for one in usable}  # `rank` of what is joined would be another one
    alike = sorted((one for one in others if ranks[id(one)][1]), reverse=True, key=lambda one: (
        ranks[id(one)][1:4] == ranks[id(best)][1:4], _text(one) == _text(best), ranks[id(one)]))  # fmt: skip
    whole, joined, apart = with_beds(best, alike)
    reasons = (
        "shorter",
        "its unit is not Bq/ml, counts or SUVbw",
        "attenuation correction not stated",
        "derived image",
    )
    left += [f"'{label(one)}' ({_difference(ranks[id(best)], ranks[id(one)], reasons)})"
             for one in others if one not in joined]  # fmt: skip
    corrected = "ATTN" in _values(best.header, "CorrectedImage") or best.header.get("AttenuationCorrectionMethod")
    said = "" if corrected else "; the header does not say whether it is attenuation-corrected"
    return replace(whole, remarks=(*best.remarks, *_joined(best, joined), *apart)), _said(best, said, left)


def usable_cts(
    series: Iterable[Series], pet: Series, trust_study: bool = False
) -> tuple[list[Series], list[str]]:
    """The CT series that show the body in the PET's frame of reference (with `trust_study` also those of the PET's
    study in another one), and the others, each with what is wrong."""
    cts = [(one, _ct_fault(one, pet, trust_study)) for one in series if one.modality == "CT"]
    left = sorted({f"'{label(one)}' ({fault})" for one, fault in cts if fault})
    return [one for one, fault in cts if not fault], left


def choose_ct(series: Iterable[Series], pet: Series, trust_study: bool = False) -> tuple[Series | None, str]:
    """The CT of the PET's frame of reference that covers the PET best, and why; None, and why there is none.

    Where it ends before the PET, those that continue it are its `beds`, as of `choose_pet`.

    Of those that cover it alike (within 5%), a soft-tissue kernel before a lung or bone kernel, and the low-dose CT
    of the attenuation correction before a diagnostic one: it was taken in the breathing of the PET.
    """
    usable, left = usable_cts(series, pet, trust_study)
    if not usable:
        return None, f"no usable CT series: {'; '.join(left)}" if left else "no CT series (Modality CT)"
    cover = {one.series_uid: coverage(one, pet) for one in usable}

    def rank(one: Series) -> tuple:
        kernel = (_values(one.header, "ConvolutionKernel") or [""])[0]
        soft = not (_SHARP_TEXT.search(_text(one)) or _SHARP_KERNEL.match(kernel))
        contrast = bool(_values(one.header, "ContrastBolusAgent"))
        low_dose = bool(_LOW_DOSE.search(_text(one))) and not contrast
        original = "ORIGINAL" in _values(one.header, "ImageType")
        covers = cover[one.series_uid] > max(cover.values()) - 0.05
        number = -_number(one.header, "SeriesNumber")
        return same_frame(one, pet), covers, soft, low_dose, not contrast, original, number, one.series_uid

    best, *others = sorted(usable, key=rank, reverse=True)
    whole, joined, apart = with_beds(best, others) if cover[best.series_uid] < ENOUGH else (best, [], [])
    reasons = ("another frame of reference than the PET", "covers less of the PET", "lung or bone kernel",
               "not low-dose", "with contrast medium", "derived image")  # fmt: skip
    left += [f"'{label(one)}' ({_difference(rank(best), rank(one), reasons)})" for one in others if one not in joined]
    dose = ", low-dose" if rank(best)[3] else "" if rank(best)[4] else ", with contrast medium"
    said = _said(best, f"{dose}, covers {coverage(whole, pet):.0%} of the PET's length", left)
    return replace(whole, remarks=(*_joined(best, joined), *apart)), said


def choose_lesions(
    series: Iterable[Series], pet: Series, cts: Sequence[Series] = ()
) -> tuple[list[tuple[str, Path]], str]:
    """The RTSTRUCT and SEG files that were drawn on the PET, else on one of its CTs, else in its frame of reference.

    One all of whose ROI names are in newer ones is an older version of them and left out; SEG of other series
    descriptions are no versions of each other, for their segments often have the same names ("Lesion").

    Returns:
        [("RTSTRUCT" or "SEG", file), ...], the newest first, and why these, with the descriptions of several.
    """
    files = [
        (one, file, references(file)) for one in series if one.modality in ("RTSTRUCT", "SEG") for file in one.files
    ]
    ways = {
        "drawn on the PET": lambda one, refers: pet.uids & refers.series,
        "drawn on the CT": lambda one, refers: any(ct.uids & refers.series for ct in cts),
        "in the PET's frame of reference": lambda one, refers: (
            pet.frame_uid and pet.frame_uid in refers.frames and _same_patient(one, pet)
        ),
    }
    fitting = [item for item in files if any(fits(item[0], item[2]) for fits in ways.values())]
    for why, fits in ways.items():
        found = [item for item in fitting if fits(item[0], item[2])]
        if found:
            found.sort(key=lambda item: (item[2].when, str(item[1])), reverse=True)
            chosen = [(one, file) for one, file, refers in found if not _superseded(refers, [r for *_, r in found])]
            older, elsewhere = len(found) - len(chosen), len(fitting) - len(found)
            left = [f"{older} older with the same ROI names"] if older else []
            left += [f"{elsewhere} not {why}"] if elsewhere else []
            kinds = " and ".join(sorted({one.modality for one, _ in chosen}))
            labels = ", ".join(f"'{label(one)}'" for one, _ in chosen)
            united = f", united, the newest first: {labels}" if len(chosen) > 1 else ""
            text = f"{len(chosen)} {kinds} {why}{united}" + (f"; left: {', '.join(left)}" if left else "")
            return [(one.modality, file) for one, file in chosen], text
    return [], "no RTSTRUCT or SEG refers to this PET or its CT"


def same_frame(ct: Series, pet: Series) -> bool:
    """Whether a CT is not known to be in another frame of reference than the PET, or one of its beds."""
    frames = {part.frame_uid for part in pet.parts}
    return not ct.frame_uid or not all(frames) or ct.frame_uid in frames


def coverage(ct: Series, pet: Series) -> float:
    """The share of the PET's length that the CT covers."""
    normal = normal_of(pet)
    (low, high), (pet_low, pet_high) = axial_range(ct, normal), axial_range(pet, normal)
    return max(0.0, min(high, pet_high) - max(low, pet_low)) / max(pet_high - pet_low, 1e-6)


def voxels_of(series: Series) -> int:
    """How many voxels a series has, by the header of one of its files."""
    frames = _number(series.header, "NumberOfFrames", 1)
    return int(len(series.files) * frames * _number(series.header, "Rows") * _number(series.header, "Columns"))


def label(series: Series) -> str:
    """What a series is called in reports."""
    return series.description or "no description"


def _pet_fault(series: Series) -> str | None:
    header, text = series.header, _text(series)
    image_type, corrected = _values(header, "ImageType"), _values(header, "CorrectedImage")
    kind = _values(header, "SeriesType")
    if _NO_VOLUME.search(text) or {"MIP", "LOCALIZER", "PROJECTION IMAGE", "SCREEN SAVE"} & set(image_type):
        return "MIP, scout or screen shot"
    if (corrected and "ATTN" not in corrected) or _NAC.search(text):
        return "not attenuation-corrected"
    if str(header.get("AttenuationCorrectionMethod", "")).strip().upper() in ("NONE", "NO"):
        return "not attenuation-corrected"
    if kind and kind[0] in ("GATED", "DYNAMIC"):
        return kind[0].lower()
    # Only where the type is not stated: GE counts the bed positions of static whole bodies as time slices.
    if not kind and max(_number(header, "NumberOfTimeSlices", 1), _number(header, "NumberOfTimeSlots", 1)) > 1:
        return "dynamic or gated"
    return _too_few(series)


def _ct_fault(series: Series, pet: Series, trust_study: bool) -> str | None:
    image_type = set(_values(series.header, "ImageType"))
    if image_type & {"LOCALIZER", "MIP", "PROJECTION IMAGE", "SCREEN SAVE"} or _NO_VOLUME.search(_text(series)):
        return "MIP, scout or screen shot"
    if _NO_BODY_CT.search(_text(series)):
        return "bolus timing or perfusion"
    if not (pet.frame_uid and series.frame_uid):
        if series.study_uid != pet.study_uid:
            return "other study"
    elif not same_frame(series, pet) and not (trust_study and series.study_uid == pet.study_uid):
        return "another frame of reference than the PET"
    return _too_few(series)


def _joined(best: Series, joined: Sequence[Series]) -> list[str]:
    if not joined:
        return []
    labels = ", ".join(f"'{label(one)}'" for one in (best, *joined))
    frames = " of several frames of reference" if len({one.frame_uid for one in (best, *joined)}) > 1 else ""
    return [f"{kind_of(best)} joined from {1 + len(joined)} series{frames} that continue each other: {labels}"]


def _too_few(series: Series) -> str | None:
    count = _number(series.header, "NumberOfFrames", 1) if len(series.files) == 1 else len(series.files)
    return f"{count:g} slices only" if count < _LEAST_SLICES else None


def _length(series: Series) -> float:
    low, high = axial_range(series, normal_of(series))
    return high - low


@dataclass(frozen=True)
class References:
    """What an RTSTRUCT or SEG refers to, and when it was made."""

    series: frozenset[str]
    frames: frozenset[str]
    when: str
    roi_names: frozenset[str]
    """Of an RTSTRUCT; of a SEG the segments' labels, with its SeriesDescription."""


@lru_cache(maxsize=4096)
def references(file: Path) -> References:
    """RTSTRUCT: PS3.3 C.8.8.5 (Structure Set); SEG: C.12.2 (Common Instance Reference)."""
    try:
        header = read_header(file)
    except Exception:  # a damaged file makes pydicom raise nearly anything; without a reference it is used nowhere
        return References(frozenset(), frozenset(), "", frozenset())
    drawn_on, frames = [], [header.get("FrameOfReferenceUID")]
    for frame in header.get("ReferencedFrameOfReferenceSequence") or ():
        frames.append(frame.get("FrameOfReferenceUID"))
        for study in frame.get("RTReferencedStudySequence") or ():
            drawn_on += [one.get("SeriesInstanceUID") for one in study.get("RTReferencedSeriesSequence") or ()]
    rois = header.get("StructureSetROISequence") or ()
    frames += [roi.get("ReferencedFrameOfReferenceUID") for roi in rois]
    drawn_on += [one.get("SeriesInstanceUID") for one in header.get("ReferencedSeriesSequence") or ()]
    kinds = ("StructureSet", "Content", "InstanceCreation", "Series")
    times = (
        f"{header[f'{kind}Date'].value}{header.get(f'{kind}Time', '')}" for kind in kinds if header.get(f"{kind}Date")
    )
    names, segments = [str(roi.get("ROIName", "")) for roi in rois], header.get("SegmentSequence") or ()
    names += [f"{header.get('SeriesDescription')}/{segment.get('SegmentLabel')}" for segment in segments]
    return References(
        frozenset(map(str, filter(None, drawn_on))), frozenset(map(str, filter(None, frames))), next(times, ""),
        frozenset(names),
    )  # fmt: skip


def _superseded(refers: References, all_of_them: Iterable[References]) -> bool:
    """Whether newer files have all its ROIs; of two of the same time, or of unknown, none is the newer one."""
    newer = {name for other in all_of_them if other.when > refers.when > "" for name in other.roi_names}
    return bool(refers.roi_names) and refers.roi_names <= newer


def _same_patient(one: Series, other: Series) -> bool:
    return one.study_uid == other.study_uid or one.patient == other.patient


def _difference(best: tuple, other: tuple, reasons: Sequence[str]) -> str:
    """The first criterion by which two ranks differ."""
    found = (why for why, a, b in zip(reasons, best, other, strict=False) if a != b)
    return next(found, "later series number, else alike")


def _said(series: Series, more: str, left: list[str]) -> str:
    count = int(_number(series.header, "NumberOfFrames", 1)) if len(series.files) == 1 else len(series.files)
    return f"'{label(series)}', {count} slices{more}" + (f"; left: {'; '.join(left)}" if left else "")


def _text(series: Series) -> str:
    """The words of the description, which is not shown: those of `Series.description` are without the patient's."""
    return re.sub(r"[\W_]+", " ", str(series.header.get("SeriesDescription") or ""))


def _values(header: pydicom.Dataset, keyword: str) -> list[str]:
    """The values of a text element in capitals, none if it is absent or empty."""
    value = header.get(keyword)
    if value is None or value == "":
        return []
    return [str(v).strip().upper() for v in ([value] if isinstance(value, str) else value)]


def _number(header: pydicom.Dataset, keyword: str, default: float = 0) -> float:
    try:
        return float(header.get(keyword))
    except (TypeError, ValueError):
        return default
