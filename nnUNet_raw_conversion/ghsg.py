"""fratmae_convert_ghsg: PET/CT of a multi-centre trial (DICOM in any layout, NIfTI folders) to a raw dataset.

Made for the trials of the German Hodgkin Study Group (HD16, HD17, HD18), and as good for any hospital's PET/CT. What
the headers say decides: which series belong together, which PET and CT are taken, which contours are the lesions.
Cases are called by pseudonyms; the key table that tells who they are lies outside of the dataset.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from nnunet_fratmae.base.command import UserError, run_command
from nnUNet_raw_conversion.clinical import ClinicalRecord, name_patients
from nnUNet_raw_conversion.conversion import Loaded, Study, convert_studies
from nnUNet_raw_conversion.dicom.believed import believed
from nnUNet_raw_conversion.dicom.choose import choose_lesions, usable_cts, voxels_of
from nnUNet_raw_conversion.dicom.index import Series, read_header
from nnUNet_raw_conversion.dicom.lesions import read_lesions
from nnUNet_raw_conversion.dicom.overrides import SuvOverride, read_overrides
from nnUNet_raw_conversion.dicom.reading import read_ct, read_pet
from nnUNet_raw_conversion.geometry import parse_grid, read_image, resample_to, target_grid
from nnUNet_raw_conversion.linking import link_unchanged
from nnUNet_raw_conversion.patients import (
    PATIENT_COLUMNS,
    Table,
    diagnosis_of,
    in_known_words,
    known_numbers,
    left_out,
    other_sex,
    parse_columns,
    read_patients,
    read_test_list,
    record_of,
    still_unknown,
)
from nnUNet_raw_conversion.pseudonyms import (
    Key,
    assign,
    check_keys,
    key_file,
    only_user,
    read_keys,
    write_keys,
)
from nnUNet_raw_conversion.raw_dataset import RawDataset
from nnUNet_raw_conversion.shown import secrets_of, without_secrets
from nnUNet_raw_conversion.splits import SPLITS_FILE, make_splits, write_splits
from nnUNet_raw_conversion.trial import ALL, UNREADABLE, Visit, find_visits, select

PROGRAM_BYTES = 600_000_000
"""Of a process before it reads anything."""


@dataclass(frozen=True)
class Recipe:
    """How the images of a visit are made; picklable."""

    visit: Visit
    contours: tuple[tuple[str, Path], ...] = ()
    """("RTSTRUCT" or "SEG", file)."""
    contours_why: str = ""
    override: SuvOverride | None = None
    lesion_roi: str | None = None
    grid: str = "pet"
    trust_study: bool = False


def load_visit(recipe: Recipe) -> Loaded:
    """Read the images of a visit; nothing that is said about them names the patient.

    Raises:
        UserError: why it cannot be converted.
    """
    visit = recipe.visit
    # Contours are found by what they refer to, so that they may be told under another number and name
    secrets = secrets_of([one.header for one in visit.series] + [read_header(file) for _, file in recipe.contours])
    try:
        if visit.problem:
            raise UserError(visit.problem, visit.code)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of pydicom show what is in the headers
            loaded = _load_dicom(recipe, secrets) if visit.pet else _load_nifti(visit)
    except UserError as error:
        error.args = (without_secrets(str(error), secrets),)
        raise
    loaded.notes = [without_secrets(note, secrets) for note in loaded.notes]
    loaded.used = {what: without_secrets(why, secrets) for what, why in loaded.used.items()}
    return loaded


def _load_dicom(recipe: Recipe, secrets: frozenset[str]) -> Loaded:
    visit = recipe.visit
    pet, notes = read_pet(visit.pet, recipe.override)
    used, rois, lesions = {"PET": visit.why}, [], None
    ct, ct_series, used["CT"], ct_notes = read_ct(visit.series, visit.pet, pet, recipe.trust_study)
    notes += ct_notes
    if recipe.contours:
        used["lesions"] = recipe.contours_why
        if len(recipe.contours) > 1:
            notes.append(f"lesions of {recipe.contours_why}; take away what is an older version")
        # Drawn on the grid that is written: contours resampled as masks would lose what is smaller than voxels
        target = target_grid(ct, pet, recipe.grid)
        image = pet if recipe.grid == "pet" else resample_to(pet, target, 0)
        drawn_on = [(visit.pet, pet)] + ([(ct_series, ct)] if ct_series else [])
        trusted = believed(recipe.contours, visit.pet.frame_uid, drawn_on)
        if trusted:
            notes.append("the contours name another frame of reference, but this very series, and lie on its slices")
        lesions, rows = read_lesions(
            recipe.contours, image, visit.pet.frame_uid, recipe.lesion_roi, trusted, secrets
        )
        rois = [asdict(row) for row in rows]
    elif "lesions" in visit.files:
        used["lesions"] = "a NIfTI file in the study's folder"
        lesions = read_image(visit.files["lesions"], "the NIfTI file of the lesions")
    elif any(one.modality in ("RTSTRUCT", "SEG") for one in visit.series):
        used["lesions"] = recipe.contours_why
        notes.append("the patient has RTSTRUCT or SEG, but none refers to this PET, its CT or their frame of reference")
    return Loaded(ct, pet, lesions, notes, used, rois)


def _load_nifti(visit: Visit) -> Loaded:
    notes: list[str] = []
    images = {what: read_image(file, f"the NIfTI file of the {what}", notes) for what, file in visit.files.items()}
    used = dict.fromkeys(images, "a NIfTI file")
    return Loaded(images.get("CT"), images["PET"], images.get("lesions"), list(dict.fromkeys(notes)), used)


def make_recipe(visit: Visit, contours: Sequence[Series], allow_missing_ct: bool, **settings) -> Recipe:
    """What a visit is made of, and whether it can be made; `contours` are all RTSTRUCT and SEG series there are."""
    files, why = [], ""
    has_ct = "CT" in visit.files
    if visit.pet:
        cts, left = usable_cts(visit.series, visit.pet, settings.get("trust_study", False))
        has_ct = bool(cts)
        files, why = choose_lesions(contours, visit.pet, cts)
    if not (has_ct or allow_missing_ct or visit.problem):
        what = "no CT in the PET's frame of reference" if visit.pet else "no NIfTI file is the CT"
        unusable = f" ({'; '.join(left)})" if visit.pet and left else ""
        other = visit.pet and usable_cts(visit.series, visit.pet, trust_study=True)[0]
        trust = "--trust-study to take that of this study if its body lies where the PET's does, or " if other else ""
        visit = replace(visit, problem=f"{what}{unusable}; say {trust}--allow-missing-ct to fill its channel with air",
                        code="CT_OTHER_FRAME" if other else "CT_MISSING")  # fmt: skip
    return Recipe(visit, tuple(files), why, **settings)


def convert_ghsg(args: argparse.Namespace) -> None:
    """The command: all tables and lists are checked before the first image is read."""
    parse_grid(args.grid)
    dataset = RawDataset(args.d, args.n)
    with dataset.locked():
        _convert_into(dataset, args)


def _convert_into(dataset: RawDataset, args: argparse.Namespace) -> None:
    columns = parse_columns(args.columns)
    table = read_patients(args.clinical, columns) if args.clinical else Table({})
    overrides = read_overrides(args.suv_override) if args.suv_override else {}
    keys_path = key_file(args.key_file, args.i[0])

    known = known_numbers(table, read_keys(keys_path), args.test_list)
    visits, contours, messages = find_visits(args.i, known, args.patient_level)
    visits = [table.with_trial(visit) for visit in visits]
    visits, more = select(visits, args.timepoint)
    with only_user(keys_path):  # not while folders are searched, which may take minutes
        keys = read_keys(keys_path)
        named = assign(keys, [Key("", v.trial, v.patient, v.timepoint, v.source) for v in visits], args.n)
        cases = {key.case_id: visit for key, visit in zip(named, visits, strict=True)}
        test = read_test_list(args.test_list, cases) if args.test_list else set()
        if strange := set(overrides) - set(cases):
            raise UserError(f"{args.suv_override}: {len(strange)} of its case_id are no case here; they are the "
                            f"pseudonyms in {keys_path}")  # fmt: skip
        write_keys(keys_path, keys)

    studies, without_row, unlabelled = [], 0, 0
    patients_of: dict[int, set[tuple[str, str]]] = {}  # by the row that was found for them
    doubtful: list[str] = []
    shortened: dict[str, list[str]] = {}  # cases by the field of the table that has other than known words
    for case_id, visit in sorted(cases.items()):
        settings = {"override": overrides.get(case_id), "lesion_roi": args.lesion_roi, "grid": args.grid,
                    "trust_study": args.trust_study}  # fmt: skip
        recipe = make_recipe(visit, contours, args.allow_missing_ct, **settings)
        row = table.find(visit, case_id)
        if row:
            patients_of.setdefault(id(row), set()).add((visit.trial, visit.patient))
            doubtful += [case_id] if len(patients_of[id(row)]) > 1 or other_sex(visit, row) else []
        record = record_of(case_id, visit, row, args.diagnosis, args.tracer)
        record = replace(record, diagnosis=record.diagnosis or diagnosis_of(visit, record.tracer))
        for name in in_known_words(row)[1] if row else ():
            shortened.setdefault(name, []).append(case_id)
        studies.append(_study(case_id, recipe, record, case_id in test))
        without_row += bool(args.clinical) and row is None
        unlabelled += studies[-1].part == "Pt" and not recipe.visit.problem
    who = {case_id: (visit.trial, visit.patient) for case_id, visit in cases.items()}
    records = name_patients({study.case_id: study.record for study in studies}, who)
    studies = [replace(study, record=records[study.case_id]) for study in studies]
    messages += [*more, *table.warnings]
    if unlabelled:
        messages.append(f"{unlabelled} cases without lesion contours are for pretraining only (imagesPt)")
    if without_row:
        messages.append(f"{without_row} cases have no row in {args.clinical}; what the headers say is taken")
    messages += left_out(shortened, args.clinical) + still_unknown([study.record for study in studies])
    if doubtful:
        shown = ", ".join(doubtful[:5]) + (", ..." if doubtful[5:] else "")
        messages.append(f"{args.clinical}: the rows of {shown} may be of others "
                        "(another patient has the same row, or the headers say another sex)")  # fmt: skip
    for message in messages:
        print(message, file=sys.stderr)
    print(f"{len({(v.trial, v.patient) for v in visits})} patients; who they are is in {keys_path}")

    options = {"command": "fratmae_convert_ghsg", "grid": args.grid, "timepoint": args.timepoint or "all"}

    def complete(folder: Path) -> None:
        if args.link:
            _link(folder, cases)
        _write_splits(folder, studies, cases)
        check_keys(keys_path, named)

    unread = any(UNREADABLE in message for message in messages)
    if convert_studies(dataset, studies, options, args.np, complete=complete) or unread:
        sys.exit(1)  # which cases, and why, has been said


def main() -> None:
    """The console script fratmae_convert_ghsg."""
    parser = argparse.ArgumentParser(prog="fratmae_convert_ghsg", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("-i", type=Path, nargs="+", required=True, metavar="DIR", help="folder(s) with the studies, in any layout")
    add("-d", type=int, required=True, metavar="ID", help="dataset ID, 1 to 999")
    add("-n", default="GHSG", metavar="NAME", help="dataset name, also of the pseudonyms [GHSG]")
    add("--clinical", type=Path, metavar="FILE", help="table (csv or xlsx) of stage, age, sex, ... a patient")
    add("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="how the table calls columns, as case_id=PatNr "
        f"stage=AnnArbor; ours are {', '.join(PATIENT_COLUMNS)}")  # fmt: skip
    add("--diagnosis", metavar="TEXT", help="where the table has none [Hodgkin lymphoma in HD16, HD17 and HD18, else "
        "unknown]")  # fmt: skip
    add("--tracer", metavar="TEXT", help="where neither table nor header has one that we know, as 18F-FDG [unknown]")
    add("--lesion-roi", metavar="REGEX", help="ROIs that are lesions [those that are called or coded so; a case with "
        "others than lesions and organs waits]")  # fmt: skip
    add("--grid", default="pet", help="grid to write: pet, ct, or a spacing x,y,z in mm [pet]")
    add("--timepoint", type=_timepoint, default=1, metavar="N", help="N-th PET study of a patient by date, or all [1]")
    add("--patient-level", type=_number, metavar="N", help="depth of the folders that are patients, 1: those in DIR; "
        "matters for NIfTI and for DICOM without patient IDs [told by their names]")  # fmt: skip
    add("--test-list", type=Path, metavar="FILE", help="patients (number or pseudonym, one a line) for imagesTs")
    add("--allow-missing-ct", action="store_true", help="PET without CT is converted, with a CT of air")
    add("--trust-study", action="store_true", help="a CT of the PET's study in another frame of reference is taken if "
        "the bodies of both lie in the same place")  # fmt: skip
    add("--suv-override", type=Path, metavar="FILE", help="csv of what headers lack: case_id (the pseudonym), "
        "weight_kg, dose_bq or dose_mbq, injection_datetime, half_life_s")  # fmt: skip
    add("--key-file", type=Path, metavar="FILE", help="table of pseudonyms, read and written [key_DIR.csv beside -i]")
    add("--link", action="store_true", help="hard links to NIfTI files that are just as they would be written")
    add("-np", type=int, default=4, metavar="N", help="processes at most, fewer where the memory asks for it [4]")
    run_command(parser, convert_ghsg)


def _study(case_id: str, recipe: Recipe, record: ClinicalRecord, test: bool) -> Study:
    visit = recipe.visit
    has_lesions = bool(recipe.contours) or "lesions" in visit.files
    cts = [one for one in visit.series if one.modality == "CT"] if visit.pet else []
    files = [file for one in (visit.pet.parts if visit.pet else ()) + tuple(cts) for file in one.files]
    inputs = (*files, *visit.files.values(), *(file for _, file in recipe.contours))
    part = "Ts" if test else "Tr" if has_lesions else "Pt"
    settings = (recipe.override, recipe.lesion_roi, visit.problem, *([True] if recipe.trust_study else []))
    return Study(case_id, record, part, partial(load_visit, recipe), (*inputs, *settings), _memory(recipe))


def _memory(recipe: Recipe) -> int:
    """Bytes that converting a visit takes at most, by its headers; measured: 3.9 GB for a PET of 400 x 400 x 1000 with
    a CT of 512 x 512 x 1300, of which there is one copy in float32, and on the grid that is written three."""
    visit = recipe.visit
    if visit.pet is None:
        return 0
    pet = sum(voxels_of(part) for part in visit.pet.parts)
    ct = max((voxels_of(one) for one in visit.series if one.modality == "CT"), default=0)
    written = ct if recipe.grid == "ct" else pet
    return PROGRAM_BYTES + 4 * (ct + 3 * max(pet, written))


def _link(folder: Path, cases: Mapping[str, Visit]) -> None:
    linked = refused = 0
    for case_id, visit in cases.items():
        if visit.files and (folder / "conversion" / f"{case_id}.png").exists():
            counts = link_unchanged(folder, case_id, visit.files)
            linked, refused = linked + counts[0], refused + counts[1]
    elsewhere = f"; {refused} are copies, for they lie on another file system" if refused else ""
    print(f"--link: {linked} files are links to the originals{elsewhere}")


def _write_splits(folder: Path, studies: Sequence[Study], cases: Mapping[str, Visit]) -> None:
    """splits_final.json where patients have several labelled cases, which nnU-Net would put on both sides."""
    there = [s for s in studies if s.part == "Tr" and (folder / "labelsTr" / f"{s.case_id}.nii.gz").exists()]
    patient_of = {study.case_id: f"{cases[study.case_id].trial}/{cases[study.case_id].patient}" for study in there}
    splits = []
    if len(set(patient_of.values())) < len(patient_of):
        stratum_of = {study.case_id: f"{study.record.tracer} {study.record.stage}" for study in there}
        splits = make_splits(patient_of, stratum_of)
    write_splits(folder, splits)
    if splits:
        print(f"{SPLITS_FILE}: every patient on one side only")


def _timepoint(text: str) -> int:
    return ALL if text == "all" else _number(text)


def _number(text: str) -> int:
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")


if __name__ == "__main__":
    main()
