"""Whose studies a folder of a trial holds: trials, patients and time points of DICOM trees and of NIfTI folders.

DICOM is put together by its headers, since every hospital names its folders in its own way; folder names count only
where the headers say nothing (PatientID empty or the same dummy for all), and for NIfTI, which has no such header.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nnUNet_raw_conversion.command import UserError
from nnUNet_raw_conversion.dicom.choose import choose_pet
from nnUNet_raw_conversion.dicom.index import Series, scan

ALL = 0
IMAGES = ("PT", "CT")
# HD16, HD-17, "GHSG HD 18"; but not the "HD" of a reconstruction in front of "18F"
_TRIAL = re.compile(r"(?<![A-Za-z0-9])HD[ _-]?([12]\d)(?![A-Za-z0-9])", re.I)
_TRIAL_TAGS = [f"ClinicalTrial{what}" for what in ("ProtocolID", "ProtocolName", "SponsorName", "SubjectID")]
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
_DUMMY = re.compile(r"[\W_0x]*|[\W_0x]*(?:anonym[a-z]*|anon|unknown|unbekannt|none|null|n/?a|de-?identified|removed"
                    r"|dummy|no ?name|no ?id|patient(?: ?id)?|test|id)[\W_0]*", re.I)  # fmt: skip
_SEG_NAME = re.compile(r"seg|mask|lesion|label|gtv|annotation|contour|(?<![a-z])roi", re.I)
_PET_NAME = re.compile(r"suv|(?<![a-z])pe?t(?![a-z])", re.I)
_CT_NAME = re.compile(r"(?<![a-z])ct(?:res|ac)?(?![a-z])", re.I)


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
    order: tuple = ()
    """Puts the visits of a patient in order; () if the study has no date."""
    folders: tuple[str, ...] = ()
    """Names of the folders and files, which shall be shown nowhere."""


def find_visits(inputs: Sequence[Path], progress: bool = True) -> tuple[list[Visit], list[Series], list[str]]:
    """All visits below the folders `inputs`, all RTSTRUCT and SEG series there, and messages about the whole.

    Raises:
        UserError: there is no such folder, or nothing in it.
    """
    nifti, messages, series, unreadable = [], [], {}, 0
    roots: dict[Path, Path] = {}
    for root in inputs:
        found, bad = scan(root, progress)
        unreadable += bad
        for one in found:
            series.setdefault((one.patient, one.study_uid, one.series_uid, one.modality), one)
            roots |= dict.fromkeys(one.files, root)
        nifti += _nifti_visits(root)
    visits = _merge(_dicom_visits(list(series.values()), roots, messages), nifti, messages)
    if not visits:
        where = " ".join(map(str, inputs))
        raise UserError(f"-i {where}: holds no PET or CT, neither DICOM nor NIfTI; give the folder of the studies")
    if unreadable:
        messages.append(f"{unreadable} DICOM files or folders could not be read and are left out")
    return _without_doubles(visits), [one for one in series.values() if one.modality in ("RTSTRUCT", "SEG")], messages


def select(visits: Iterable[Visit], timepoint: int) -> tuple[list[Visit], list[str]]:
    """The visits to convert: of each patient the `timepoint`-th with a usable PET (1 is the baseline), or all (0).

    Visits without a usable PET count only where a patient has no other: they are then reported as failed.
    """
    patients: dict[tuple, list[Visit]] = defaultdict(list)
    for visit in visits:
        patients[visit.trial, visit.patient].append(visit)
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


def _dicom_visits(series: list[Series], roots: dict[Path, Path], messages: list[str]) -> list[Visit]:
    owners: dict[str, set] = defaultdict(set)
    for one in _images(series):
        owners[one.series_uid].add(one.patient)
    patients: dict[str, list[Series]] = defaultdict(list)
    for one, patient in zip(series, _identities(series, roots, messages), strict=True):
        patients[patient].append(one)
    visits = []
    for patient, mine in patients.items():
        for trial, theirs in _by_trial(mine, roots).items():
            if _images(theirs):
                problem = ""
                if any(len(owners[one.series_uid]) > 1 for one in _images(theirs)):
                    problem = "one of its series holds images of two patients (PatientID); export the patients apart"
                elif _different_people(theirs):
                    problem = ("under one PatientID are people of different sex or birth date; correct the headers, or "
                               "leave out what is not the patient's")  # fmt: skip
                visits += _visits_of(trial, patient, theirs, roots, problem)
    return visits


def _identities(series: list[Series], roots: dict[Path, Path], messages: list[str]) -> list[str]:
    """Whose each series is: number in the trial (0012,0040), else PatientID, else folder, else the study's UID.

    The number in the trial counts for all series of a PatientID, since not every scanner or program writes it.
    """
    images = _images(series)
    # One ID for all, but of people of different sex or birth date in one trial, is a dummy, however it is spelled.
    all_one = len({one.patient for one in images}) == 1
    all_one = all_one and any(_different_people(theirs) for theirs in _by_trial(series, roots).values())
    known = [not all_one and not _DUMMY.fullmatch(one.patient) for one in series]
    person = [
        one.patient if is_known else f"study {one.study_uid}" for one, is_known in zip(series, known, strict=True)
    ]
    subjects: dict[str, set[str]] = defaultdict(set)
    for one, who in zip(series, person, strict=True):
        subject = _tag(one, "ClinicalTrialSubjectID")
        subjects[who] |= set() if _DUMMY.fullmatch(subject) else {subject}
    folders = [_patient_folder(one.files[0], roots[one.files[0]]) for one in series]
    unknown = [i for i, one in enumerate(series) if one.modality in IMAGES and not (known[i] or subjects[person[i]])]
    several = len({folders[i] for i in unknown}) > 1
    if unknown:
        studies = len({series[i].study_uid for i in unknown})
        what = (
            f"{len({folders[i] for i in unknown})} folders are taken for patients" if several else "each is a patient"
        )
        messages.append(f"{studies} studies have an empty PatientID or the same dummy as others: {what}")
    names = []
    for i, who in enumerate(person):
        if len(subjects[who]) == 1:
            names.append(next(iter(subjects[who])))
        elif known[i]:
            names.append(series[i].patient)
        else:
            names.append((several and folders[i]) or series[i].study_uid)
    return names


def _visits_of(trial: str, patient: str, series: list[Series], roots: dict[Path, Path], problem: str) -> list[Visit]:
    """The visits of one patient, one a study with PET, in the order of their dates."""
    studies: dict[str, list[Series]] = defaultdict(list)
    for one in series:
        if one.modality == "PT":
            studies[one.study_uid].append(one)
    first = series[0]
    root = roots[first.files[0]]
    folder = _patient_folder(first.files[0], root)
    numbers = (_tag(first, "ClinicalTrialSubjectID"), first.patient, patient, folder, _without_trial(folder))
    names = {name for one in series for name in _names(one.files[:1], roots[one.files[0]])}
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
            visits.append(replace(one, problem=problem or str(error)))
    return visits


def _by_trial(series: list[Series], roots: dict[Path, Path]) -> dict[str, list[Series]]:
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
    sexes = {_tag(one, "PatientSex").upper() for one in _images(series)} & {"M", "F"}
    births = {_tag(one, "PatientBirthDate") for one in _images(series)} - {""}
    return len(sexes) > 1 or len(births) > 1


def _nifti_visits(root: Path) -> list[Visit]:
    """One visit for each folder with NIfTI files; files in folders such as CT and PET belong to the folder above."""
    cases: dict[Path, dict[str, list[Path]]] = {}
    for file in _nifti_files(root):
        folder = file.parent
        while folder != root and _PART.fullmatch(folder.name):
            folder = folder.parent
        kinds = cases.setdefault(folder, {"CT": [], "PET": [], "lesions": []})
        kind = _kind(file.name)
        if kind:
            kinds[kind].append(file)
    visits = []
    for folder, kinds in cases.items():
        inner = [part for part in folder.relative_to(root).parts if not _NO_PATIENT.fullmatch(part)] or [folder.name]
        problem, files = "", {}
        for kind, found in kinds.items():
            better = [f for f in found if re.search("suv|ctres", f.name, re.I)]  # not PET in Bq/ml, CT as scanned
            found = better if len(found) > 1 and better else found
            if len(found) > 1:
                problem = problem or f"{len(found)} NIfTI files could be the {kind}; leave one, or rename the others"
            elif found:
                files[kind] = found[0]
        trial = trial_in(" ".join((root.name, *folder.relative_to(root).parts)))
        numbers = tuple(filter(None, (inner[0], _without_trial(inner[0]))))
        timepoint = "/".join(inner[1:])
        if "PET" not in files:
            problem = problem or "no NIfTI file is the PET; its name must have SUV or PET in it"
        order = tuple((0, int(t), "") if t.isdigit() else (1, 0, t.casefold()) for t in re.split(r"(\d+)", timepoint))
        visits.append(Visit(trial, inner[0], timepoint, str(folder), numbers, files=files, problem=problem, order=order,
                            folders=_names((f for found in kinds.values() for f in found), root)))  # fmt: skip
    return visits


def _nifti_files(root: Path) -> list[Path]:
    """All NIfTI files below `root`, through links as well, each folder once."""
    seen, files = set(), []
    for path, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
        else:
            seen.add(real)
            files += [Path(path, n) for n in names if n.lower().endswith((".nii", ".nii.gz")) and n[0] != "."]
    return sorted(files)


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


def _kind(name: str) -> str | None:
    """ "CT", "PET" or "lesions" by a file's name; pet_seg.nii.gz is lesions; what names CT and PET alike is neither."""
    if _SEG_NAME.search(name):
        return "lesions"
    ct, pet = bool(_CT_NAME.search(name)), bool(_PET_NAME.search(name))
    return None if ct == pet else "CT" if ct else "PET"


def _patient_folder(file: Path, root: Path) -> str:
    """The first folder below the input that can be a patient's, "" if there is none."""
    parts = file.relative_to(root).parent.parts
    return next((part for part in parts if not _NO_PATIENT.fullmatch(part) and not _PART.fullmatch(part)), "")


def _names(files: Iterable[Path], root: Path) -> tuple[str, ...]:
    parts = (file.relative_to(root).parts for file in files)
    return tuple({name for *folders, last in parts for name in (*folders, last.split(".")[0])})


def _without_trial(folder: str) -> str:
    """The patient's number in a folder such as HD18_0012."""
    return re.sub(r"(?:GHSG[ _-]?)?HD[ _-]?[12]\d(?![0-9])", "", folder, flags=re.I).strip(" _-")


def _moment(series: Sequence[Series]) -> tuple:
    return min((one.date, _tag(one, "AcquisitionTime") or _tag(one, "StudyTime"), one.study_uid) for one in series)


def _tag(series: Series, keyword: str) -> str:
    return str(series.header.get(keyword) or "").strip()


def _without_doubles(visits: list[Visit]) -> list[Visit]:
    count = Counter((v.trial, v.patient.casefold(), v.timepoint) for v in visits)
    text = "two folders hold the same patient and time point; keep one, or name the trial (HD18) in its folder"
    once = {key for key, number in count.items() if number == 1}
    return [v if (v.trial, v.patient.casefold(), v.timepoint) in once else replace(v, problem=text) for v in visits]
