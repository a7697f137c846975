"""Names of ROIs and segments: which are lesions, which are not, and which only a person can tell.

A label that is wrong teaches a network what is wrong, and no figure shows it later. So lesions are those that are
called so, or coded as such; what is plainly an organ, a reference region, an outline or a helper of planning is none;
and where neither is known the case waits for `--lesion-roi`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum

import regex
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.shown import shown_text
from nnUNet_raw_conversion.vocabulary import (
    DENIAL,
    HELPERS,
    IMAGING,
    LESION,
    NUMBERED,
    ORGANS,
    REFERENCE,
    REGIONS,
    SIDES_AND_PARTS,
    known_parts,
    repaired,
)

LONGEST_SEARCH_S = 1.0
"""For one name of an ROI: a usual expression takes some microseconds. Python's own `re` cannot be stopped."""


class Kind(Enum):
    """What an ROI is."""

    LESION = "lesion"
    NONE = "organ, reference region, outline or helper"
    UNKNOWN = "unknown"


# Wherever they stand in the name: planning volumes with margins, helpers of dose planning, and oedema around a tumour.
# Of percentages those of isodoses; "Lesion 41%" is a lesion in PET, cut at that part of its maximum.
NO_LESION = re.compile(
    r"(?<![a-z])(z?[pci]tv|irv|prv|isodos\w*|bolus|couch|avoid\w*|opti|ring|dose|oe?dem\w*|edem\w*|ödem)(?![a-z])"
    r"|(?<![a-z])[pci]tv[a-z]?(?![a-z])|(?:[89]|1\d)\d ?%|^(?!.*gtv).*\d ?c?gy(?![a-z])"  # GTVp 70 Gy: a lesion's dose
    r"|gtv.*\+ ?\d+ ?[cm]m",
    re.IGNORECASE,
)
# Said of a lesion and of what every patient has: the nodal levels of TG-263, which programs draw by themselves, the
# nodes of the heart, ganglia (which take up PSMA; in French they are lymph nodes), and what has mass
_ALSO_NORMAL = re.compile(
    r"^ln (?:ax|neck) (?:l\d|[ivx]+[ab]?) [lr]$|^ln pelvics$|(?<![a-z])(?:av|sa|sinoatrial|atrioventricular) ?node"
    r"|sinusknoten|(?:coeli|celi|stellat)\w* gangli|gangli\w* (?:coeli|celi|stellat)"
    r"|(?<![a-z])(?:muscle|fat|lean|body|lv) mass(?![a-z])",
    re.IGNORECASE,
)
# "Lungs-GTV" is TG-263's name of the lungs without the tumour; "Lung minus lesion", "Leber ohne Herd"
_WITHOUT = re.compile(
    r"^(.*?[^\W_])(?:\s*[-–−]\s*(?=[pci]?gtv|[pci]tv)"
    r"|[\W_]*(?:minus|without|ohne|excl\w*|sans|sin|senza)[\W_]|[\W_]+w/o[\W_]|[\W_]+sub[\W_]*(?=[pci]?gtv))", re.I
)  # fmt: skip
# "Liver with lesions", "Leber mit Metastasen", "Lung+GTV": the organ and what is in it
_WITH = re.compile(r"^(.*?[^\W_])(?:[\W_]+(?:with|mit|samt|avec|con|com|w)[\W_]+|[ _]*[+][ _]*)(.+)$", re.I)
_SINISTER = re.compile(r"(?<![^\W\d_])sin(?=[\W\d_]*$)", re.I)  # at the end it is no Spanish "without": LK axilla sin
_SAID_ORGANS = frozenset(("organ", "organs", "oar", "oars"))  # "OAR x": whatever the organ is
_GTV = re.compile(r"(?<![a-z])i?gtv", re.IGNORECASE)  # also run together with what follows: GTVnode, GTVLungL
# RT ROI Interpreted Type (3006,00A4), PS3.3 C.8.8.8.1. Not ORGAN: many systems write it for whatever was drawn.
NO_LESION_TYPES = frozenset(
    "EXTERNAL PTV CTV TREATED_VOLUME IRRAD_VOLUME BOLUS AVOIDANCE MARKER REGISTRATION ISOCENTER CONTRAST_AGENT "  # noqa: SIM905
    "SUPPORT FIXATION DOSE_REGION CONTROL DOSE_MEASUREMENT DEVICE".split()
)
# Segmented Property Category and Type (0062,0003), (0062,000F): PS3.16 CID 7150 and of CID 7159 what is a lesion
_ABNORMAL = codes.SCT.MorphologicallyAbnormalStructure
_LESION_TYPES = (
    codes.SCT.Lesion, codes.SCT.Mass, codes.SCT.Neoplasm, codes.SCT.NeoplasmPrimary, codes.SCT.NeoplasmSecondary,
    codes.SCT.Nodule, codes.NCIt.EnhancingLesion, codes.NCIt.NonEnhancingLesion,
)  # fmt: skip
# Of something abnormal that is no lesion of the disease, or nothing abnormal
_OTHER_TYPES = (
    codes.SCT.Edema, codes.SCT.Necrosis, codes.SCT.Hemorrhage, codes.SCT.BloodClot, codes.SCT.Embolus, codes.SCT.Cyst,
    codes.SCT.Abscess, codes.SCT.Inflammation, codes.SCT.Normal, codes.DCM.Background,
)  # fmt: skip
_ANATOMY = (codes.SCT.AnatomicalStructure, Code("123037004", "SCT", "Body structure"), Code("T-D000A", "SRT", ""))
_NO_TISSUE = (
    codes.SCT.PhysicalObject, codes.SCT.Function, codes.SCT.SpatialAndRelationalConcept, codes.SCT.BodySubstance,
    codes.SCT.Substance,
)  # fmt: skip


def shown_name(name: str, secrets: frozenset[str] = frozenset()) -> str:
    """A name as it may be shown, see `shown_text`; a name can hold a patient's."""
    return shown_text(name, secrets) or "unnamed"


def kind_of(name: str, stated: str | Kind = "") -> Kind:
    """What the ROI of this name is.

    Args:
        stated: its RT ROI Interpreted Type, or what its codes say (`kind_of_codes`), which go before a name that says
            nothing; where they contradict it, the case waits rather than being labelled.
    """
    by_name = _kind_of_name(name)
    if stated is Kind.LESION:  # not of a "Liver": there are programs that give every segment the same code
        return Kind.NONE if by_name is Kind.NONE else Kind.LESION
    if stated is Kind.NONE:
        return Kind.UNKNOWN if by_name is Kind.LESION else Kind.NONE
    if stated in NO_LESION_TYPES:
        return Kind.NONE
    if stated == "GTV" and by_name is Kind.NONE and not NO_LESION.search(_spaced(name)):
        return Kind.UNKNOWN  # an organ that is called the tumour, or a type that was never set: the two contradict
    return Kind.LESION if stated == "GTV" and by_name is Kind.UNKNOWN else by_name


def kind_of_codes(segment: Dataset) -> Kind | None:
    """What the codes of a segment (PS3.3 C.8.20.4) say it is; None where they say nothing ("Tissue", "Organ")."""
    category = _code(segment, "SegmentedPropertyCategoryCodeSequence")
    kind = _code(segment, "SegmentedPropertyTypeCodeSequence")
    if category is None or kind is None:
        return None
    if kind in _OTHER_TYPES or category in _NO_TISSUE:
        return Kind.NONE
    if kind in _LESION_TYPES or category == _ABNORMAL:
        return Kind.LESION
    if category in _ANATOMY and kind not in (codes.SCT.LymphNode, *_ANATOMY):
        return Kind.NONE
    return None


def select_rois(
    names: Sequence[str],
    pattern: str | None = None,
    kinds: Sequence[str | Kind] = (),
    numbers: Sequence[int] = (),
    secrets: frozenset[str] = frozenset(),
) -> list[bool]:
    """Which of the `names` are lesions: those in which the regular expression is found (upper or lower case alike);
    without one, those that are known to be.

    Args:
        kinds: what the file states of each, see `kind_of`. numbers: of the ROIs, for messages.
        secrets: see `shown_text`.

    Raises:
        UserError: the pattern is no regular expression, none of the names is chosen (ROI_NO_LESION), or without a
            pattern there are some of which nothing is known (ROI_UNKNOWN).
    """
    said = [
        f"{number} {shown_name(name, secrets)!r}"
        for number, name in zip(numbers or range(1, len(names) + 1), names, strict=True)
    ]
    if pattern is None:
        found = [kind_of(name, kind) for name, kind in zip(names, kinds or [""] * len(names), strict=True)]
        if unknown := [text for text, kind in zip(said, found, strict=True) if kind is Kind.UNKNOWN]:
            these = "this is a lesion" if len(unknown) == 1 else "these are lesions"
            raise UserError(f"{_listed(unknown)}: not known whether {these} (words that are not known are shown as …); "
                            "look up the number in the file, and say which ROIs are lesions by --lesion-roi, as in "
                            "--lesion-roi 'gtv|lesion'", "ROI_UNKNOWN")  # fmt: skip
        chosen = [kind is Kind.LESION for kind in found]
    else:
        chosen = _fitting(pattern, names)
    if not any(chosen):
        how = "is known as a lesion; name it by" if pattern is None else f"fits {pattern!r}; change"
        listed = ", ".join(said[:20]) + (", ..." if len(said) > 20 else "")
        raise UserError(f"none of the ROIs ({listed or 'there are none'}) {how} --lesion-roi",
                        "ROI_NO_LESION")  # fmt: skip
    return chosen


def _kind_of_name(name: str) -> Kind:
    name = _SINISTER.sub("left", repaired(name))
    spaced = _spaced(name)
    if NO_LESION.search(spaced):
        return Kind.NONE
    if match := _WITHOUT.match(name):
        return _kind_of_name(match[1])
    if (match := _WITH.match(name)) and _kind_of_name(match[1]) is Kind.NONE is not _kind_of_name(match[2]):
        return Kind.UNKNOWN
    words, unknown = [], False
    for word in re.findall(r"[^\W\d_]+", spaced):
        parts = known_parts(word)
        words += parts
        unknown |= not parts
    words = set(words)
    lesion = bool(words & LESION or _GTV.search(spaced))
    if lesion:
        sure = not words & (DENIAL | REFERENCE) and not _ALSO_NORMAL.search(spaced)
        return Kind.LESION if sure else Kind.UNKNOWN
    if words & _SAID_ORGANS:
        return Kind.NONE
    neutral = REGIONS | SIDES_AND_PARTS | IMAGING | HELPERS | ORGANS | REFERENCE
    if unknown or words - neutral:
        return Kind.UNKNOWN
    if words & REFERENCE:
        return Kind.NONE
    counted = re.search(r"(?<![\w.])\d{1,3}(?![\w.%]| ?[cm]m)", re.sub(r"[_-]", " ", name))
    if not words & ORGANS or (counted and not words & NUMBERED):
        return Kind.UNKNOWN  # a region without more, "Liver 2": may be where a lesion lies
    return Kind.NONE


def _spaced(name: str) -> str:
    """The words of a name apart: Lung_R, LungRight, SpinalCord."""
    return re.sub(r"(?<=[a-zäöüß])(?=[A-ZÄÖÜ])", " ", re.sub(r"[_.-]", " ", name))


def _code(segment: Dataset, keyword: str) -> Code | None:
    for item in segment.get(keyword) or ():
        value, scheme = item.get("CodeValue"), item.get("CodingSchemeDesignator")
        if value and scheme:
            return Code(str(value), str(scheme), "")
    return None


def _listed(said: list[str]) -> str:
    shown = ", ".join(said[:20]) + (", ..." if len(said) > 20 else "")
    return f"ROI {shown}" if len(said) == 1 else f"ROIs {shown}"


def _fitting(pattern: str, names: Sequence[str]) -> list[bool]:
    """In which names the regular expression is found, upper or lower case alike.

    Raises:
        UserError: it is none, or one that takes for ever, as (a|a)*b does in "aaaa...".
    """
    try:
        expression = regex.compile(pattern, regex.IGNORECASE)
        return [expression.search(name, timeout=LONGEST_SEARCH_S) is not None for name in names]
    except regex.error as error:
        raise UserError(f"--lesion-roi {pattern!r}: is no regular expression ({error})", "ROI_PATTERN") from None
    except TimeoutError:
        raise UserError(f"--lesion-roi {pattern!r}: takes more than {LONGEST_SEARCH_S:g} s for one name; say it "
                        "without repeats within repeats, as (a+)+", "ROI_PATTERN") from None  # fmt: skip
