"""Names of ROIs and segments: which are lesions, and how they may be shown."""

from __future__ import annotations

import re
from collections.abc import Sequence

import regex

from nnunet_fratmae.base.command import UserError

LONGEST_SEARCH_S = 1.0
"""For one name of an ROI: a usual expression takes some microseconds. Python's own `re` cannot be stopped."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What is no lesion if nothing else is said about it: "Lung_L" and "Body outline" are none, "Lung lesion" and
# "external iliac LN" may be. English and German, as hospitals write them. In lymphoma an ROI that is called "spleen"
# can be an involved one; then --lesion-roi is needed, and the per-ROI table shows that it was left out.
ORGANS_AND_OUTLINES = _words(
    """
    external body skin patient outline contour surface couch table support air fat muscle
    haut körper koerper aussenkontur außenkontur kontur patientenkontur tisch
    brain brainstem cerebellum spinal spinalcord cord canal cauda chiasm optic nerve eye eyes lens cochlea pituitary
    hirn gehirn hirnstamm kleinhirn rückenmark rueckenmark myelon auge augen linse
    parotid submandibular salivary gland glands thyroid larynx pharynx mandible oral cavity lips trachea
    oesophagus esophagus
    parotis schilddrüse schilddruese luftröhre speiseröhre
    heart atrium ventricle aorta lung lungs bronchus breast breasts
    herz lunge lungen
    liver spleen kidney kidneys stomach pancreas gallbladder bowel bowels intestine duodenum colon sigmoid rectum
    leber milz niere nieren magen darm dünndarm dickdarm gallenblase
    bladder urethra prostate uterus vagina ovary testis penis bulb
    blase harnblase prostata
    femur femora femoral head heads hip hips
    reference ref background bloodpool blood pool bp referenz
    """
)
SIDES_AND_PARTS = _words(
    """
    left right l r lt rt li re links rechts both bilateral total whole all upper lower small large the of and minus
    organ organs oar seg mask roi voi vol volume
    """
)
# Wherever they stand in the name: planning volumes with margins, helpers of dose planning, and oedema around a tumour.
# Of percentages those of isodoses; "Lesion 41%" is a lesion in PET, cut at that part of its maximum.
NO_LESION = re.compile(
    r"(?<![a-z])(z?[pci]tv|irv|prv|isodos\w*|bolus|couch|avoid\w*|opti|ring|dose|oe?dem\w*|edem\w*|ödem)(?![a-z])"
    r"|(?<![a-z])[pci]tv[a-z]?(?![a-z])|(?:[89]|1\d)\d ?%|\d ?c?gy(?![a-z])",
    re.IGNORECASE,
)
# RT ROI Interpreted Type (3006,00A4), PS3.3 C.8.8.8.1. Not ORGAN: many systems write it for whatever was drawn.
NO_LESION_KINDS = _words(
    "EXTERNAL PTV CTV TREATED_VOLUME IRRAD_VOLUME BOLUS AVOIDANCE MARKER REGISTRATION ISOCENTER CONTRAST_AGENT "
    "SUPPORT FIXATION DOSE_REGION CONTROL DOSE_MEASUREMENT DEVICE"
)


def shown_name(name: str) -> str:
    """A name as it may be shown: letters, digits, - _ . and spaces, 40 at most; a name can hold a patient's."""
    return re.sub(r"[^\w. -]+", "_", name).strip()[:40].strip() or "unnamed"


def is_lesion_name(name: str) -> bool:
    """Whether a name is not plainly one of an organ, an outline, a planning volume or a helper."""
    if NO_LESION.search(re.sub(r"[_.-]", " ", name)):
        return False
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-zäöüß])(?=[A-ZÄÖÜ])", " ", name).lower())
    words = [word for word in words if word not in SIDES_AND_PARTS]
    return not words or not all(word in ORGANS_AND_OUTLINES for word in words)


def select_rois(names: Sequence[str], pattern: str | None = None, kinds: Sequence[str] = ()) -> list[bool]:
    """Which of the `names` are lesions: those in which the regular expression is found (upper or lower case alike);
    without one, all but those that are plainly none by their name or by their `kinds`, the interpreted types.

    Raises:
        UserError: the pattern is no regular expression, or none of the names is chosen.
    """
    if pattern is None:
        types = kinds or [""] * len(names)
        chosen = [is_lesion_name(n) and kind not in NO_LESION_KINDS for n, kind in zip(names, types, strict=True)]
    else:
        chosen = _fitting(pattern, names)
    if not any(chosen):
        shown = ", ".join(repr(shown_name(name)) for name in names[:20]) + (", ..." if len(names) > 20 else "")
        how = "looks like a lesion; name it by" if pattern is None else f"fits {pattern!r}; change"
        raise UserError(f"none of the ROIs ({shown or 'there are none'}) {how} --lesion-roi")
    return chosen


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
