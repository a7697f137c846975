"""How free text of headers and tables may be shown: known words, small numbers and numbers with units; the rest is "…".

Everything that people type in a hospital (names of ROIs and series, comments, codes' meanings) may hold who a patient
is, in any spelling. So nothing is looked for: what is not known is not shown, and of what is known not the words that
the patient of a header is called by.
"""

from __future__ import annotations

import ast
import functools
import re
import unicodedata
import warnings
from collections.abc import Iterable
from pathlib import Path

from pydicom import Dataset

from nnunet_fratmae.base import command
from nnUNet_raw_conversion.vocabulary import ALSO_NAMES, IMAGING, folded, known_parts, repaired

HIDDEN = "…"
LONGEST = 40  # characters of a text that are shown

_MONTH = (
    "(?:jan|f[eé]v|feb|m[aä]r|mrz|maer|apr|avr|abr|ma[iy]|mag|jui?n|giu|jui?l|lug|aug|ao[uû]|ago|sept?|set|okt|oct|ott"
    "|out|nov|de[czs]|dic)[a-zéû]*"
)
# Whole dates first: what is left of them could be small numbers
_DATE = re.compile(rf"(?<!\d)\d{{1,4}}[\W_]*{_MONTH}(?![^\W\d_])[\W_]*\d*|(?<![^\W\d_]){_MONTH}[\W_]*\d+", re.I)
_UNIT = r"(?:gy|cgy|mm|cm|ml|cc|min|sec|s|h|kg|g|%|kv|kvp|mas|mbq|kbq|bq|hu|mm/s|ml/min|iter|it|sub)"
_MEASURE = rf"\d{{1,3}}(?:[.,]\d{{1,3}})?[ ]?{_UNIT}(?![^\W_])"
_MASS, _ELEMENT = "(?:18|68|11|64|89|124|82|13|15)", "(?:F|Ga|C|Cu|Zr|I|Rb|N|O)"
_NUCLIDE = f"(?:{_MASS}[ ]?-?{_ELEMENT}|{_ELEMENT}[ ]?-?{_MASS})"
_TOKEN = re.compile(
    rf"""
    (?P<measure>(?<![\d.,-]){_MEASURE})       # 3.75 mm, 41%
    |(?P<size>(?<![^\W_])\d{{1,3}}(?:\.\d{{1,2}})?x\d{{1,3}}(?:\.\d{{1,2}})?(?![^\W_]))       # 400x400
    |(?P<nuclide>(?<![^\W_]){_NUCLIDE}(?=[^\W\d]|[^\w]|_|$))
    |(?P<kernel>(?<![^\W_])(?:[BHIJT]|B[rflv]|H[rcfv]|Q[r]|FC|Y)\d{{2}}[fsmhd]?(?![^\W_])  # of Siemens and Canon
        |(?<![^\W_])\d{{1,2}}[is]\d{{1,2}}[is](?![^\W_])|(?<![^\W_])\d{{1,2}}[isD](?![^\W_]))       # 3i21s, 2D
    |(?P<numbers>\d+(?:[\W_]+(?!{_MEASURE})\d+)*)
    |(?P<word>[^\W\d_]+)
    """,
    re.VERBOSE,
)
_CASES = re.compile(r"[^\W\d_](?:(?![A-ZÄÖÜ])[^\W\d_])+|[A-ZÄÖÜ]+(?![a-zäöüß])|[^\W\d_]")  # GTVLee: GTV, Lee
# Elements that name a person or number one, wherever in a header they are
_IDENTIFIERS = re.compile(
    "PatientID|OtherPatientI|PatientBirth|Accession|AdmissionID|StudyID$|Telephone|Address|MedicalRecord|SubjectID"
    "|SubjectReadingID|RequestedProcedureID|ScheduledProcedureStepID|PerformedProcedureStepID|SerialNumber|Institution"
    "|StationName|IssuerOf|Occupation|EthnicGroup|Insurance|MilitaryRank|Religious|PatientComments|CurrentPatientLocation"
)
# In place of a name, where there is none
_NOBODY = frozenset(("pet", "ct", "petct", "wb", "fdg", "anonymous", "anonymized", "anonym", "patient", "phantom",
                     "scan", "test", "unknown", "study", "case", "roi", "gtv"))  # fmt: skip
_LEAST_SECRET = 2  # letters or digits; a single one is nobody


def shown_text(text: str, secrets: frozenset[str] = frozenset()) -> str:
    """What may be shown of a text, `LONGEST` characters at most; "" if it is empty.

    Args:
        secrets: words that are not shown though they are known ones, see `secrets_of`.
    """
    return _all_shown(text, secrets)[:LONGEST].strip()


def _all_shown(text: str, secrets: frozenset[str]) -> str:
    text = "".join(c if c.isprintable() else " " for c in unicodedata.normalize("NFKC", repaired(text)))
    shown = None
    while shown != text:  # numbers that are told apart by what is hidden alone may be of one date
        shown, text = text, _once(text, secrets)
    return text


def _once(text: str, secrets: frozenset[str]) -> str:
    shown = _TOKEN.sub(lambda match: _shown(match, secrets), _DATE.sub(HIDDEN, text))
    shown = re.sub(r"[^\w. %…,/+-]+", "_", shown)  # nothing that a table, a page or a terminal could take for its own
    return re.sub(rf"{HIDDEN}(?:[\W_]*?{HIDDEN})+", HIDDEN, " ".join(shown.split()))


def shown_words(text: str, secrets: frozenset[str] = frozenset()) -> str:
    """The words of `shown_text` alone, without marks for what is left out; "…" if that is all."""
    words = re.sub(rf"[_/,+{HIDDEN}]+", " ", _all_shown(text, secrets)).split()
    return " ".join(words)[:LONGEST].strip() or (HIDDEN if text.strip() else "")


def secrets_of(headers: Iterable[Dataset]) -> frozenset[str]:
    """The words by which headers name or number a person, at any depth: names (VR PN) and `_IDENTIFIERS`."""
    named, numbered = set(), set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they may quote what is in the headers
        for header in headers:
            for element in _elements(header):
                if element.VR == "PN" or element.keyword == "PatientID":
                    named |= _words(str(element.value))
                elif element.keyword and _IDENTIFIERS.search(element.keyword):
                    numbered |= _words(str(element.value))
    # A patient may be called Bone; but no station or request called PET tells who it is
    secrets = (named - _NOBODY) | {word for word in numbered if not known_parts(word)}
    return frozenset(word for word in secrets if len(word) >= _LEAST_SECRET)


def without_secrets(message: str, secrets: frozenset[str]) -> str:
    """A message of ours with what must never be in one taken out: dates, UIDs, and words of `secrets` that are neither
    words of the vocabulary nor of our own messages. Header text is made safe where it enters a message, by
    `shown_text`; this is the net below.
    """

    def hide(match: re.Match) -> str:
        long = len(match[0]) > (5 if match[0].isdigit() else _LEAST_SECRET)  # shorter numbers are our figures
        is_secret = long and folded(match[0]) & secrets and not known_parts(match[0])
        return HIDDEN if is_secret and not folded(match[0]) & own_words() else match[0]

    return re.sub(r"[^\W_]+", hide, _UID_OR_DATE.sub(HIDDEN, message))


@functools.cache
def own_words() -> frozenset[str]:
    """The words of the texts in our own sources, of which messages are made; a patient may be called by one of them."""
    found: set[str] = set()
    for package in (Path(__file__).parent, Path(command.__file__).parent):
        for file in package.rglob("*.py"):
            nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
            comments = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            texts = (node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in comments)
            found.update(word for text in texts if isinstance(text, str) for word in _words(text))
    return frozenset(found)


_UID_OR_DATE = re.compile(
    r"\d+(?:\.\d+){4,}|(?<!\d)(?:19|20)\d{2}(?:[-./]\d{1,2}[-./]\d{1,2}|[01]\d[0-3]\d)(?!\d)"
    r"|(?<![\d.])\d{1,2}[-./]\d{1,2}[-./](?:19|20)\d{2}(?!\d)"
)


def _words(text: str) -> set[str]:
    return {form for word in re.findall(r"[^\W_]+", repaired(text)) for form in folded(word)}


def _shown(match: re.Match, secrets: frozenset[str]) -> str:
    text = match[0]
    if match["word"]:
        if known_parts(text):
            return text if _is_open(text, secrets) else HIDDEN
        pieces = _CASES.findall(text)  # of some letters, for two short words run together are as good as a name: LiAn
        return "".join(p if len(p) > 2 and _is_open(p, secrets) else HIDDEN for p in pieces)
    if folded(text) & secrets:
        return HIDDEN
    if match["numbers"]:
        return text if _is_small(text) else HIDDEN
    return text


def _is_open(word: str, secrets: frozenset[str]) -> bool:
    parts = known_parts(word)
    return bool(parts) and not (folded(word) | set(parts)) & (secrets | (ALSO_NAMES - IMAGING))


def _is_small(numbers: str) -> bool:
    """Whether a number is no part of a date and no number of a person: up to 99, or with one digit after the point."""
    return bool(re.fullmatch(r"\d{1,2}|[1-9]?\d\.\d|[0-9]\.(?:25|50|75|00)", numbers))


def _elements(header: Dataset):
    """All elements that can be read, also those in sequences."""
    for tag in sorted(header.keys()):
        try:
            element = header[tag]
        except Exception:  # a value against its type makes pydicom raise nearly anything; it is shown nowhere
            continue
        if element.VR == "SQ":
            for item in element.value or ():
                yield from _elements(item)
        else:
            yield element
