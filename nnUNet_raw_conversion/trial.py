"""Whose studies a folder of a trial holds: trials, patients and time points of DICOM trees and of NIfTI folders.

DICOM is put together by its headers, since every hospital names its folders in its own way; folder names count only
where the headers say nothing (PatientID empty or the same dummy for all), and for NIfTI, which has no such header.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.clinical import YEARS
from nnUNet_raw_conversion.dicom.choose import choose_pet
from nnUNet_raw_conversion.dicom.fields import parse_date
from nnUNet_raw_conversion.dicom.index import Series, scan
from nnUNet_raw_conversion.folders import (
    PatientFolders,
    archives_message,
    count_archives,
    nifti_cases,
    unreadable_folders,
    without_trial,
)
from nnUNet_raw_conversion.pseudonyms import same_name

ALL = 0
IMAGES = ("PT", "CT")
UNREADABLE = "could not be read and are left out"
AGE_TOLERANCE = 2  # years by which StudyDate minus PatientAge may differ in one patient
# HD16, HD-17, "GHSG HD 18"; but not the "HD" of a reconstruction in front of "18F"
_TRIAL = re.compile(r"(?<![A-Za-z0-9])HD[ _-]?([12]\d)(?![A-Za-z0-9])", re.I)
_TRIAL_TAGS = [f"ClinicalTrial{what}" for what in ("ProtocolID", "ProtocolName", "SponsorName", "SubjectID")]
_DUMMY = re.compile(r"[\W_0x]*|[\W_0x]*(?:anonym[a-z]*|anon|unknown|unbekannt|none|null|n/?a|de-?identified|removed"
                    r"|dummy|no ?name|no ?id|patient(?: ?id)?|test|id)[\W_0]*", re.I)  # fmt: skip


@dataclass(frozen=True)
class Visit:
    """One PET study of one patient: series of a DICOM tree, or `files` {"CT", "PET", "lesions": file}."""

    trial: str
    """ "HD18", or "" if nothing says it."""
    patient: str
    timepoint: str
    """Study date (a second study of a day has "b" behind it); the folder below the patient's for NIfTI."""
    source: str
    """The folder that holds it, for the key table."""
    numbers: tuple[str, ...] = ()
    """All that a table or a list may call the patient."""
    series: tuple[Series, ...] = ()
    """All series of the patient: the CT and the contours need not be in the study of the PET."""
    pet: Series | None = None
    why: str = ""
    """Why this PET series."""
    files: dict[str, Path] = field(default_factory=dict)
    problem: str = ""
    """Why it cannot be converted."""
    code: str = ""
    """Of the problem, for `UserError`."""
    order: tuple = ()
    """Puts the visits of a patient in order; () if the study has no date."""
    folders: tuple[str, ...] = ()
    """Names of the folders and files, which shall be shown nowhere."""


def find_visits(
    inputs: Sequence[Path], known: Collection[str] = (), level: int | None = None, progress: bool = True
) -> tuple[list[Visit], list[Series], list[str]]:
    """All visits below the folders `inputs`, all RTSTRUCT and SEG series there, and messages about the whole.

    Args:
        known, level: which folders are patients' where headers do not say it, see `PatientFolders`.

    Raises:
        UserError: there is no such folder, nothing in it, or the patients' folders cannot be told.
    """
    messages, series, cases, unreadable = [], {}, {}, 0
    roots: dict[Path, Path] = {}
    closed: dict[Path, list[Path]] = {}
    archives: Counter[str] = Counter()
    for root in inputs:
        found, bad = scan(root, progress, messages)
        closed[root] = unreadable_folders(root)
        archives += count_archives(root)
        unreadable += bad
        for one in found:
            series.setdefault((one.patient, one.study_uid, one.series_uid, one.modality), one)
            roots |= dict.fromkeys(one.files, root)
        cases[root] = nifti_cases(root)
    people = _People(list(series.values()), roots, cases, known, level)
    nifti = [_nifti_visit(*case, people.folders[root]) for root in inputs for case in cases[root].items()]
    visits = _merge(_dicom_visits(people, messages), nifti, messages)
    for root in inputs:
        visits = _with_unreadable(visits, root, closed[root], people.folders[root])
    packed = archives_message(archives)
    if not visits:
        where = " ".join(map(str, inputs))
        raise UserError(f"-i {where}: holds no PET or CT, neither DICOM nor NIfTI; "
                        + ("; ".join(messages) or packed or "give the folder of the studies"))  # fmt: skip
    messages += [packed] if packed else []
    for folders in people.folders.values():
        if folders.level:
            messages.append(f"-i {folders.root}: the folders {folders.level + 1} levels below it are taken for "
                            "patients; if they are not, say --patient-level N")  # fmt: skip
    if unreadable:
        messages.append(f"{unreadable} DICOM files or folders {UNREADABLE}")
    return _without_doubles(visits), [one for one in series.values() if one.modality in ("RTSTRUCT", "SEG")], messages


def select(visits: Iterable[Visit], timepoint: int) -> tuple[list[Visit], list[str]]:
    """The visits to convert: of each patient the `timepoint`-th with a usable PET (1 is the baseline), or all (0).

    Visits without a usable PET count only where a patient has no other: they are then reported as failed.
    """
    patients: dict[tuple, list[Visit]] = defaultdict(list)
    visits = _without_doubles(list(visits))  # again, for a table may have told their trials since
    for visit in visits:
        mine = patients[visit.trial, same_name(visit.patient)]
        mine.append(replace(visit, patient=mine[0].patient) if mine else visit)  # as it is spelled first
    chosen, without, faulty = [], 0, 0
    for mine in patients.values():
        usable = sorted((v for v in mine if not v.problem), key=lambda v: (v.pet is None, v.order))
        mixed = len({v.pet is None for v in usable}) > 1  # dates are not compared with names of folders
        unclear = len(usable) > 1 and timepoint != ALL and (mixed or any(not v.order for v in usable))
        if usable and len(usable) < len(mine):
            faulty += len(mine) - len(usable)
            problem = next(v.problem for v in mine if v.problem)
            text = f"; another study of the patient cannot be used: {problem}"
            usable = [replace(v, why=v.why + text) for v in usable]
        if not usable:
            chosen.append(mine[0])
        elif unclear:
            which = "some as DICOM and some as NIfTI" if mixed else "one without StudyDate (0008,0020)"
            text = f"{len(usable)} PET studies, {which}, so that their order is unknown; "
            chosen.append(replace(usable[0], problem=text + "say --timepoint all, or remove the others"))
        elif timepoint == ALL:
            chosen += usable
        elif timepoint <= len(usable):
            chosen.append(usable[timepoint - 1])
        else:
            without += 1
    left = sum(not v.problem for v in visits) - sum(not v.problem for v in chosen)
    messages = [f"{left} PET studies at other time points are left out (--timepoint)"] if left else []
    messages += [f"{without} patients have no time point {timepoint} and are left out"] if without else []
    messages += [f"{faulty} studies that cannot be used are left out, their patients have others"] if faulty else []
    return chosen, messages


def trial_in(text: str) -> str:
    """The trial that a text names ("HD18"), or ""."""
    found = {f"HD{number}" for number in _TRIAL.findall(text)}
    return found.pop() if len(found) == 1 else ""


class _People:
    """Whose each series is, as far as the headers say it, and the folders of the patients."""

    def __init__(
        self, series: list[Series], roots: Mapping[Path, Path], cases: Mapping[Path, Mapping[Path, dict]],
        known: Collection[str], level: int | None,
    ) -> None:  # fmt: skip
        self.series, self.roots = series, roots
        images = _images(series)
        self.number = _numbers_of_people(series)
        # One ID for all, but of different people in one trial, is a dummy, however it is spelled.
        all_one = len({n for n, one in zip(self.number, series, strict=True) if one.modality in IMAGES}) == 1
        all_one = all_one and any(_different_people(theirs) for theirs in _by_trial(series, roots).values())
        self.has_id = [not all_one and not _DUMMY.fullmatch(number) for number in self.number]
        self.person = [
            number if has_id else f"study {one.study_uid}"
            for one, number, has_id in zip(series, self.number, self.has_id, strict=True)
        ]
        self.subjects: dict[str, set[str]] = defaultdict(set)
        """By person; the number in the trial counts for all series, since not every scanner or program writes it."""
        for one, who in zip(series, self.person, strict=True):
            subject = _tag(one, "ClinicalTrialSubjectID")
            self.subjects[who] |= set() if _DUMMY.fullmatch(subject) else {subject}
        sure = [has_id or bool(self.subjects[who]) for has_id, who in zip(self.has_id, self.person, strict=True)]
        self.by_header = sure
        """Whether PatientID or the number in the trial say whose a series is."""

        files: dict[str, list[Path]] = defaultdict(list)
        for one in images or series:
            files[one.study_uid] += one.files
        self._study_folder = {study: _common_folder(found, roots) for study, found in files.items()}
        beside = {parent for one, is_sure in zip(series, sure, strict=True) if is_sure
                  for parent in one.files[0].parents}  # fmt: skip
        self.folders: dict[Path, PatientFolders] = {}
        for root, nifti in cases.items():
            here = [(self.folder_of(one), is_sure) for one, is_sure in zip(series, sure, strict=True)
                    if roots[one.files[0]] == root and one.modality in IMAGES]  # fmt: skip
            deciding = {folder for folder, is_sure in here if not is_sure} | (set(nifti) - beside)
            others = {folder for folder, is_sure in here if is_sure}
            self.folders[root] = PatientFolders(root, deciding, others, known, level)

    def folder_of(self, one: Series) -> Path:
        """The folder that holds the study of a series; contours may lie elsewhere."""
        return self._study_folder.get(one.study_uid) or one.files[0].parent

    def patient_folder(self, one: Series) -> tuple[str, str]:
        """The patient by its folder, and the folder's name; "" if there is none."""
        return self.folders[self.roots[one.files[0]]].split(self.folder_of(one))[:2]


def _numbers_of_people(series: Sequence[Series]) -> list[str]:
    """PatientID of each series, in one spelling for one patient: as the PET has it.

    A study is of one patient. Its IDs are taken for one if nothing else says that they are of different people and if
    they differ only in zeros, blanks, case or punctuation, or one is missing, or if the CT alone has the one and the
    PET, in the same frame of reference, the other. (A StudyInstanceUID that more have in common comes from
    de-identification by hand, and they stay apart.)
    """
    studies: dict[str, list[Series]] = defaultdict(list)
    for one in _images(series):
        studies[one.study_uid].append(one)
    missing: dict[str, str] = {}  # by study: the ID of the others
    groups: list[set[str]] = []
    for study, mine in studies.items():
        kinds: dict[str, set[str]] = defaultdict(set)
        for one in mine:
            kinds[one.patient].add(one.modality)
        ids = {number for number in kinds if not _DUMMY.fullmatch(number)}
        alike = len({re.sub(r"\W|_", "", number).lstrip("0").casefold() for number in ids}) == 1
        frames = {one.frame_uid for one in mine}
        halves = len(ids) == 2 and len(frames) == 1 and all(frames) and not set.intersection(*(kinds[i] for i in ids))
        if len(kinds) > 1 and (alike or halves) and not _different_people(mine):
            near = [group for group in groups if group & ids]
            groups = [group for group in groups if not group & ids] + [ids.union(*near)]
            missing[study] = min(ids)
    of_pet = {one.patient for one in series if one.modality == "PT"}
    best = [min(group & of_pet or group, key=lambda number: (len(number), number)) for group in groups]
    spelled = {number: spelling for group, spelling in zip(groups, best, strict=True) for number in group}
    given = [missing.get(one.study_uid, one.patient) if _DUMMY.fullmatch(one.patient) else one.patient
             for one in series]  # fmt: skip
    return [spelled.get(number, number) for number in given]


def _common_folder(files: Sequence[Path], roots: Mapping[Path, Path]) -> Path:
    """The deepest folder that holds all files that are below the root of the first."""
    root = roots[files[0]]
    return Path(os.path.commonpath([file.parent for file in files if roots[file] == root]))


def _dicom_visits(people: _People, messages: list[str]) -> list[Visit]:
    owners: dict[str, set] = defaultdict(set)
    for one, number in zip(people.series, people.number, strict=True):
        if one.modality in IMAGES:
            owners[one.series_uid].add(number)
    patients: dict[str, list[Series]] = defaultdict(list)
    for one, patient in zip(people.series, _identities(people, messages), strict=True):
        patients[patient].append(one)
    visits = []
    for patient, mine in patients.items():
        for trial, theirs in _by_trial(mine, people.roots).items():
            if _images(theirs):
                problem = ""
                if any(len(owners[one.series_uid]) > 1 for one in _images(theirs)):
                    problem = "one of its series holds images of two patients (PatientID); export the patients apart"
                elif _different_people(theirs):
                    problem = ("under one PatientID are people of different sex, birth date or age, or of two "
                               "institutions without an age that says that they are one; correct the headers, or "
                               "leave out what is not the patient's")  # fmt: skip
                visits += _visits_of(trial, patient, theirs, people, problem)
    return visits


def _identities(people: _People, messages: list[str]) -> list[str]:
    """Whose each series is: number in the trial (0012,0040), else PatientID, else folder, else the study's UID."""
    series = people.series
    folders = [people.patient_folder(one)[0] for one in series]
    unknown = [i for i, one in enumerate(series) if one.modality in IMAGES and not people.by_header[i]]
    several = len({folders[i] for i in unknown}) > 1
    if unknown:
        studies = len({series[i].study_uid for i in unknown})
        what = (
            f"{len({folders[i] for i in unknown})} folders are taken for patients" if several else "each is a patient"
        )
        messages.append(f"{studies} studies have an empty PatientID or the same dummy as others: {what}")
    names = []
    for i, who in enumerate(people.person):
        if len(people.subjects[who]) == 1:
            names.append(next(iter(people.subjects[who])))
        elif people.has_id[i]:
            names.append(people.number[i])
        else:
            names.append((several and folders[i]) or series[i].study_uid)
    return names


def _visits_of(trial: str, patient: str, series: list[Series], people: _People, problem: str) -> list[Visit]:
    """The visits of one patient, one a study with PET, in the order of their dates."""
    studies: dict[str, list[Series]] = defaultdict(list)
    for one in series:
        if one.modality == "PT":
            studies[one.study_uid].append(one)
    first = series[0]
    folder = people.patient_folder(_images(series)[0])[1]
    spellings = sorted({one.patient for one in series if not _DUMMY.fullmatch(one.patient)} - {first.patient})
    numbers = (_tag(first, "ClinicalTrialSubjectID"), first.patient, *spellings, patient, folder, without_trial(folder))
    names = {name for one in series for name in _names(one.files[:1], people.roots[one.files[0]])}
    visit = Visit(trial, patient, "", str(first.files[0].parent), tuple(dict.fromkeys(filter(None, numbers))),
                  tuple(series), problem=problem, folders=tuple(names))  # fmt: skip
    if not studies:
        return [replace(visit, problem=problem or "no PET series (Modality PT)")]
    of_date: dict[str, int] = defaultdict(int)
    visits = []
    for pets in sorted(studies.values(), key=_moment):
        date, uid = pets[0].date, pets[0].study_uid
        again = chr(ord("a") + min(of_date[date], 25)) if of_date[date] else ""
        of_date[date] += 1
        one = replace(visit, timepoint=date + again if date else uid, order=_moment(pets) if date else (),
                      source=str(pets[0].files[0].parent))  # fmt: skip
        try:
            pet, why = choose_pet(pets)
            visits.append(replace(one, pet=pet, why=why))
        except UserError as error:
            visits.append(replace(one, problem=problem or str(error), code="" if problem else "PET_UNUSABLE"))
    return visits


def _by_trial(series: list[Series], roots: Mapping[Path, Path]) -> dict[str, list[Series]]:
    """The series of one patient number by trial; studies that name none belong to the only trial that there is."""
    said: dict[str, str] = {}
    for one in series:
        root = roots[one.files[0]]
        tags, folder = " ".join(_tag(one, tag) for tag in _TRIAL_TAGS), one.files[0].relative_to(root).parent
        texts = (tags, _tag(one, "StudyDescription"), " ".join((root.name, *folder.parts)))
        said[one.study_uid] = said.get(one.study_uid) or next((t for t in map(trial_in, texts) if t), "")
    known = {trial for trial in said.values() if trial}
    only = known.pop() if len(known) == 1 else ""
    trials: dict[str, list[Series]] = defaultdict(list)
    for one in series:
        trials[said[one.study_uid] or only].append(one)
    return trials


def _images(series: Iterable[Series]) -> list[Series]:
    return [one for one in series if one.modality in IMAGES]


def _different_people(series: Iterable[Series]) -> bool:
    """Whether sex, birth date or age differ, or institutions do and no age says that it is the same person."""
    images = _images(series)
    sexes = {_tag(one, "PatientSex").upper() for one in images} & {"M", "F"}
    births = {_tag(one, "PatientBirthDate") for one in images} - {""}
    if births or len(sexes) > 1:
        return len(sexes) > 1 or len(births) > 1
    born = [_born(one) for one in images]
    known = [year for year in born if year is not None]
    if known and max(known) - min(known) > AGE_TOLERANCE:
        return True
    images = [one for one in images if not _tag(one, "ClinicalTrialSubjectID")]  # which the trial gave to one person
    return _separate_sites(images) and len(known) < len(born)


def _separate_sites(images: Iterable[Series]) -> bool:
    """Whether there are institutions that no study has in common: departments of one have names of their own."""
    sites: dict[str, set[str]] = defaultdict(set)
    for one in images:
        sites[one.study_uid] |= {re.sub(r"[\W_]", "", _tag(one, "InstitutionName").casefold())} - {""}
    together: list[set[str]] = []
    for names in filter(None, sites.values()):
        near = [group for group in together if group & names]
        together = [group for group in together if not group & names] + [names.union(*near)]
    return len(together) > 1


def _born(series: Series) -> float | None:
    """Year of birth, to a year, by StudyDate (0008,0020) and PatientAge (0010,1010)."""
    age, date = re.fullmatch(r"(\d{3})([YMWD])", _tag(series, "PatientAge")), parse_date(series.date)
    if not age or not date or date.year < 1950:  # a dummy of de-identification
        return None
    return date.year + (date.month - 1) / 12 - int(age[1]) * YEARS[age[2]]


def _nifti_visit(folder: Path, kinds: dict[str, list[Path]], folders: PatientFolders) -> Visit:
    patient, name, timepoint = folders.split(folder)
    patient, name = patient or folder.name, name or folder.name
    problem, files = "", {}
    for kind, found in kinds.items():
        better = [f for f in found if re.search("suv|ctres", f.name, re.I)]  # not PET in Bq/ml, CT as scanned
        found = better if len(found) > 1 and better else found
        if len(found) > 1:
            problem = problem or f"{len(found)} NIfTI files could be the {kind}; leave one, or rename the others"
        elif found:
            files[kind] = found[0]
    if "PET" not in files:
        problem = problem or "no NIfTI file is the PET; its name must have SUV or PET in it"
    root = folders.root
    trial = trial_in(" ".join((root.name, *folder.relative_to(root).parts)))
    numbers = tuple(dict.fromkeys(filter(None, (patient, name, without_trial(name)))))
    order = tuple((0, int(t), "") if t.isdigit() else (1, 0, t.casefold()) for t in re.split(r"(\d+)", timepoint))
    names = _names((f for found in kinds.values() for f in found), root)
    return Visit(trial, patient, timepoint, str(folder), numbers, files=files, problem=problem, order=order,
                 folders=names)  # fmt: skip


def _merge(dicom: list[Visit], nifti: list[Visit], messages: list[str]) -> list[Visit]:
    """All visits, where a folder with the DICOM files of a patient and NIfTI files has one only: of the NIfTI files the
    lesions are given to the PET study, CT and PET are left out."""
    visits, left = list(dicom), 0
    for one in nifti:
        beside = [i for i, visit in enumerate(dicom) if visit.pet and Path(one.source) in visit.pet.files[0].parents]
        if not beside:
            visits.append(one)
        elif len(beside) == 1 and "lesions" in one.files and not visits[beside[0]].files:
            study = visits[beside[0]]
            files = {"lesions": one.files["lesions"]}
            visits[beside[0]] = replace(study, files=files, folders=study.folders + one.folders)
        elif "PET" in one.files:
            left += 1
        else:
            problem = (
                "lesions as NIfTI, but not one file in the folder of one PET study; put each into its study's folder"
            )
            visits.append(replace(one, problem=problem))
    if left:
        messages.append(f"{left} folders of NIfTI files beside the DICOM files of the same patient are left out")
    return visits


def _with_unreadable(visits: list[Visit], root: Path, closed: list[Path], folders: PatientFolders) -> list[Visit]:
    """All visits, where one fails that has files beside a folder that cannot be read, for these may be the rest of it;
    and such a folder that belongs to no patient, or of whom it is unclear, is a visit of its own, which fails."""
    visits = list(visits)
    for folder in closed:
        problem = "one of its folders cannot be read; permit it (chmod -R u+rX), then say the same again"
        beside = [i for i, visit in enumerate(visits) if folder.parent != root and _is_below(visit, folder.parent)]
        if len({(visits[i].trial, visits[i].patient) for i in beside}) == 1:
            for i in beside:
                visits[i] = replace(visits[i], problem=visits[i].problem or problem)
        else:
            patient, name, timepoint = folders.split(folder)
            names = tuple(folder.relative_to(root).parts)
            visits.append(Visit(trial_in(" ".join((root.name, *names))), patient or folder.name, timepoint, str(folder),
                                tuple(filter(None, (name, without_trial(name)))), problem=problem,
                                folders=names))  # fmt: skip
    return visits


def _is_below(visit: Visit, folder: Path) -> bool:
    files = [*(visit.pet.files[:1] if visit.pet else ()), *visit.files.values()]
    files += [file for one in visit.series for file in one.files[:1]]
    return any(folder in file.parents for file in files)


def _names(files: Iterable[Path], root: Path) -> tuple[str, ...]:
    parts = (file.relative_to(root).parts for file in files)
    return tuple({name for *folders, last in parts for name in (*folders, last.split(".")[0])})


def _moment(series: Sequence[Series]) -> tuple:
    return min((one.date, _tag(one, "AcquisitionTime") or _tag(one, "StudyTime"), one.study_uid) for one in series)


def _tag(series: Series, keyword: str) -> str:
    return str(series.header.get(keyword) or "").strip()


def _without_doubles(visits: list[Visit]) -> list[Visit]:
    def who(visit: Visit) -> tuple[str, str, str]:
        return visit.trial, same_name(visit.patient), same_name(visit.timepoint)

    count = Counter(map(who, visits))
    text = "two folders hold the same patient and time point; keep one, or name the trial (HD18) in its folder"
    once = {key for key, number in count.items() if number == 1}
    return [v if who(v) in once else replace(v, problem=text) for v in visits]
