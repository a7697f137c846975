"""Folders of a tree that hold NIfTI studies, and which are the patients', where nothing but their names can tell it.

A tree may be INPUT/<patient>, INPUT/<centre>/<patient>, INPUT/<patient>/<time point>, ... Taking a centre for a patient
would make time points of its patients, of which all but one are left out; so what is not plain is refused.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.pseudonyms import same_number

# Folders that hold patients or parts of one, and are no patient
_NO_PATIENT = re.compile(
    r"(?:(?:ghsg[ _-]?)?hd[ _-]?[12]\d|ghsg)?[ _-]?(?:dicom|dcm|data|images?|export|nifti|nii|patients?|cases|petct"
    r"|train(?:ing)?|test(?:ing)?|val(?:idation)?)?",
    re.I,
)
_PART = re.compile(
    r"ct|pet|pt|suv|seg|segmentations?|masks?|labels?|lesions?|annotations?|contours?|rois?|images?|nifti|nii|dicom|dcm",
    re.I,
)
_SEG_NAME = re.compile(r"seg|mask|lesion|label|gtv|annotation|contour|(?<![a-z])roi", re.I)
_PET_NAME = re.compile(r"suv|(?<![a-z])pe?t(?![a-z])", re.I)
_CT_NAME = re.compile(r"(?<![a-z])ct(?:res|ac)?(?![a-z])", re.I)
_ARCHIVE = re.compile(r"\.(?:zip|rar|7z|tar|tgz|tbz2?|txz|tar\.(?:gz|bz2|xz|zst)|iso)$", re.I)
_UID = re.compile(r"\d+(?:\.\d+){4,}")
_DATE = re.compile(
    r"(?<!\d)(?:(?:19|20)\d\d(?:[01]\d[0-3]\d|([-_. ])[01]?\d\1[0-3]?\d)|[0-3]?\d([-_. ])[0-3]?\d\2(?:19|20)\d\d)"
    r"(?!\d)"
)
# What the name of a time point is made of besides dates and numbers of one or two digits; English and German
_TIME_WORDS = frozenset(
    """
    baseline base bl initial primary primaer primär staging restaging interim pre post prior follow up followup fu
    eot end of treatment therapy tp t v timepoint time point visit week month day cycle zyklus verlauf kontrolle
    nachsorge study studie scan exam session ses pet petct ct pt na wb fdg ganzkoerper ganzkörper mit ohne km
    """.split()  # noqa: SIM905
)


class PatientFolders:
    """Tells for each folder below `root` which one is the patient's, by `split`."""

    def __init__(
        self, root: Path, deciding: Iterable[Path], others: Iterable[Path], known: Collection[str], level: int | None
    ) -> None:
        """Find the level of the patients' folders.

        That is where most names are numbers that are known. Else folders that lie side by side in one and are not
        named as time points are patients.

        Args:
            deciding: folders of studies whose patients only their folders can tell; others: folders of other studies.
            known: numbers of patients in tables and lists, as `same_number` gives them.
            level: depth of the patients' folders, 1 is those in `root`; None to find it.

        Raises:
            UserError: there are `deciding` folders, and the level cannot be told.
        """
        self.root, self.chosen = root, level
        deciding, others = list(deciding), list(others)
        chains = {chain for folder in deciding if (chain := self._names(folder))}
        every = chains | {chain for folder in others if (chain := self._names(folder))}
        self.level = 0
        if level is None:
            by_number = _level_of_numbers(every, known)
            votes = {by_number} if by_number is not None else _votes(chains)
            if None in votes or len(votes) > 1 or (by_number is None and _recurring(chains, max(votes, default=0))):
                raise UserError(f"-i {root}: which of the folders in it are patients, and which are centres or time "
                                "points, cannot be told by their names; say --patient-level N, the depth of the "
                                "patients' folders (1: those in it, 2: those in these, ...)")  # fmt: skip
            self.level = max(votes, default=0)
        above: defaultdict[str, set[tuple]] = defaultdict(set)
        for over, name, _ in map(self._cut, deciding):
            above[name.casefold()].add(over)
        self._ambiguous = {name for name, places in above.items() if len(places) > 1}

    def split(self, folder: Path) -> tuple[str, str, str]:
        """The patient, the name of its folder and the time point ("" where there is none) of a study's folder.

        The patient is the name, with the folders above it only where several have a folder of this name; all is ""
        where no folder can be a patient's.
        """
        above, name, below = self._cut(folder)
        patient = "/".join((*above, name)) if name.casefold() in self._ambiguous else name
        return patient, name, "/".join(below)

    def _cut(self, folder: Path) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
        parts = folder.relative_to(self.root).parts
        if self.chosen is not None and len(parts) >= self.chosen:
            n = self.chosen
            return _inner(parts[: n - 1]), parts[n - 1], _inner(parts[n:])
        names = _inner(parts)
        n = min(self.level, len(names) - 1) if self.chosen is None else len(names) - 1
        return (names[:n], names[n], names[n + 1 :]) if names else ((), "", ())

    def _names(self, folder: Path) -> tuple[str, ...]:
        return _inner(folder.relative_to(self.root).parts)


def nifti_cases(root: Path) -> dict[Path, dict[str, list[Path]]]:
    """The NIfTI files of each folder that has some, by kind; those in folders such as CT belong to the folder above."""
    cases: dict[Path, dict[str, list[Path]]] = {}
    for file in _nifti_files(root):
        folder = file.parent
        while folder != root and _PART.fullmatch(folder.name):
            folder = folder.parent
        kinds = cases.setdefault(folder, {"CT": [], "PET": [], "lesions": []})
        kind = _kind(file.name)
        if kind:
            kinds[kind].append(file)
    return cases


def without_trial(folder: str) -> str:
    """The patient's number in a folder such as HD18_0012."""
    return re.sub(r"(?:GHSG[ _-]?)?HD[ _-]?[12]\d(?![0-9])", "", folder, flags=re.I).strip(" _-")


def _inner(parts: Iterable[str]) -> tuple[str, ...]:
    """The folders that may be those of centres, patients and time points."""
    return tuple(part for part in parts if not _NO_PATIENT.fullmatch(part) and not _PART.fullmatch(part))


def _level_of_numbers(chains: set[tuple[str, ...]], known: Collection[str]) -> int | None:
    """The level with the most names that are known numbers; None if there is none, or two are alike."""
    found: defaultdict[int, set[str]] = defaultdict(set)
    for chain in chains:
        for level, name in enumerate(chain):
            found[level] |= {same_number(name), same_number(without_trial(name))} & set(known)
    counts = sorted(((len(names), level) for level, names in found.items() if names), reverse=True)
    return counts[0][1] if counts and (len(counts) == 1 or counts[0][0] > counts[1][0]) else None


def _votes(chains: set[tuple[str, ...]], level: int = 0) -> set[int | None]:
    """What each folder says about the level of the patients by what is in it; None: that it cannot be told."""
    below: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for name, *rest in chains:
        below[name].add(tuple(rest))
    votes: set[int | None] = set()
    for rests in below.values():
        names = {rest[0] for rest in rests if rest}
        kinds = {_is_timepoint(name) for name in names}
        if kinds == {True}:
            votes.add(level)
        elif len(rests) > 1:
            if kinds != {False} or () in rests:  # time points and others, or a study beside folders with studies
                votes.add(None)
            else:
                votes |= {level + 1} if len(names) > 1 else set()
                votes |= _votes(rests, level + 1)
    return votes


def _recurring(chains: set[tuple[str, ...]], level: int) -> bool:
    """Whether folders of several centres have the same name: the same patient, or numbers that begin anew?"""
    above: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for chain in chains:
        if len(chain) > level:
            above[chain[level].casefold()].add(chain[:level])
    return any(len(places) > 1 for places in above.values())


def _is_timepoint(name: str) -> bool | None:
    """Whether a folder is called as time points are ("2021-03-04 PET CT", "followup_2", "PET0"); None if half so."""
    if _UID.fullmatch(name):  # of a study
        return True
    rest, dates = _DATE.subn(" ", name)
    words = re.findall(r"[^\W\d_]+", rest.casefold())
    of_time = set(words) <= _TIME_WORDS
    if dates:
        return of_time or None
    return bool(words) and of_time and all(len(number) < 3 for number in re.findall(r"\d+", rest))


def _nifti_files(root: Path) -> list[Path]:
    """All NIfTI files below `root`."""
    files = (Path(path, name) for path, names in _walk(root) for name in names)
    return sorted(file for file in files if file.name.lower().endswith((".nii", ".nii.gz")) and file.name[0] != ".")


def count_archives(root: Path) -> Counter[str]:
    """How many files below `root` are archives, by ending; macOS's resource forks (._x.zip) are none."""
    found = (_ARCHIVE.search(name) for _, names in _walk(root) for name in names if not name.startswith("._"))
    return Counter(match[0].lower() for match in found if match)


def archives_message(archives: Mapping[str, int]) -> str:
    """What to say about archives, or ""."""
    number = sum(archives.values())
    if not number:
        return ""
    what = "archive" if number == 1 else "archives"
    return f"{number} {what} ({', '.join(sorted(archives))}) beside the studies are not looked into; unpack them"


def unreadable_folders(root: Path) -> list[Path]:
    """The folders below `root` that cannot be listed, or in which nothing can be opened.

    Raises:
        UserError: `root` is one of them.
    """
    closed: list[OSError] = []
    for path, names in _walk(root, closed.append):
        if names and not os.access(path, os.X_OK):
            closed.append(PermissionError(13, "Permission denied", path))
    folders = sorted({Path(os.fsdecode(error.filename)) for error in closed if error.filename is not None})
    if root in folders:
        raise UserError(f"-i {root}: cannot be read ({closed[0].strerror}); permit it, or give another folder")
    return folders


def _walk(root: Path, failed: Callable[[OSError], object] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Every folder below `root`, through links as well, each once, and the names of its files."""
    seen = set()
    for path, folders, names in os.walk(root, onerror=failed, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
        else:
            seen.add(real)
            yield path, names


def _kind(name: str) -> str | None:
    """ "CT", "PET" or "lesions" by a file's name; pet_seg.nii.gz is lesions; what names CT and PET alike is neither."""
    if _SEG_NAME.search(name):
        return "lesions"
    ct, pet = bool(_CT_NAME.search(name)), bool(_PET_NAME.search(name))
    return None if ct == pet else "CT" if ct else "PET"
