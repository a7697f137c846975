"""Nothing that tells who a patient is gets out of fratmae_convert_ghsg but into the key table, whatever goes wrong."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from nnUNet_raw_conversion import ghsg
from tests.dicom_files import write_ct, write_pet
from tests.test_ghsg import Trial, trial, write_nifti_case  # noqa: F401 (a fixture)
from tests.trial_files import LESION, write_patient, write_rtstruct

# As they stand in headers, folders, files, ROI names, tables; searched for in any case and as their parts
SECRETS = [
    "Kettler", "Josephine", "Müßiggang", "Muessiggang", "Hanssen", "Grünwald", "Gruenwald", "Eisenbart", "Rosengasse",
    "88471105", "ACC777001", "19521130", "1952-11-30", "30.11.1952", "20210304", "1.2.826.0", "1.2.840.99",
]  # fmt: skip
PERSON = {
    "patient": "K-88471105", "PatientName": "Kettler^Josephine^Müßiggang", "PatientBirthDate": "19521130",
    "SpecificCharacterSet": "ISO_IR 192", "AccessionNumber": "ACC777001", "OtherPatientIDs": "OLD-88471105",
    "ReferringPhysicianName": "Eisenbart^Dr", "PatientAddress": "Rosengasse 7", "PatientAge": "068Y",
    "StudyDescription": "PET CT Josephine Kettler 30.11.1952", "ImageComments": "Kettler", "ProtocolName": "Kettler WB",
}  # fmt: skip


@pytest.fixture
def secretive(trial: Trial) -> Trial:  # noqa: F811
    """A trial that is full of names."""
    home = trial.input / "Kettler_Josephine_19521130"
    rois = {"GTV_Kettler_1": LESION, "Organ Müßiggang": LESION}
    write_patient(home / "Müßiggang 88471105", rois=rois, **PERSON | {"SeriesDescription": "PET WB KETTLER 1952-11-30"})
    write_nifti_case(trial.input / "Hanssen_Grünwald", "Hanssen_ct", "Hanssen_suv", "Hanssen_seg")
    for file in (trial.input / "Hanssen_Grünwald").glob("*.nii.gz"):
        image = nibabel.load(file)
        image.header["descrip"], image.header["db_name"], image.header["aux_file"] = b"Kettler", b"Hanssen", b"88471105"
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Josephine Kettler"))
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header), file)
    return trial


def add_failures(folder: Path) -> int:
    """Patients that cannot be converted, each for another reason; how many."""

    def person(number: int, **tags) -> dict:
        return PERSON | {"patient": f"88471105-{number}", "SeriesDescription": "Kettler PET"} | tags

    def home(number: int) -> Path:
        return folder / f"Kettler {number}"

    write_patient(home(1), **person(1, PatientWeight=None))
    cut = write_pet(home(2) / "pet", **person(2), names="Kettler{}")[5]
    write_ct(home(2) / "ct", **person(2))
    cut.write_bytes(cut.read_bytes()[:-300])
    write_pet(home(3) / "pet", **person(3), omit_slices=[7])
    write_ct(home(3) / "ct", **person(3))
    write_pet(home(4) / "nac", **person(4, SeriesDescription="Kettler NAC"))
    write_pet(home(5) / "pet", **person(5))
    write_patient(home(6), **person(6), rois={"PTV Kettler": LESION, "CTV Josephine 88471105": LESION})
    pet = write_pet(home(7) / "pet", **person(7))
    write_ct(home(7) / "ct", **person(7))
    broken = write_rtstruct(home(7) / "Kettler.dcm", pet[0], {"GTV Kettler": LESION})
    header = pydicom.dcmread(broken)
    header.ROIContourSequence[0].ContourSequence[0].ContourData = ["1", "2", "3", "4"]
    header.save_as(broken)
    write_pet(home(8) / "pet", **person(8, Units="Kettler"))
    write_ct(home(8) / "ct", **person(8))
    write_pet(
        home(9) / "pet", **person(9, RadiopharmaceuticalStartDateTime="Kettler", RadiopharmaceuticalStartTime=None)
    )
    write_ct(home(9) / "ct", **person(9))
    write_nifti_case(folder / "Grünwald_1", pet="Kettler_pet")
    write_nifti_case(folder / "Grünwald_1", pet="Hanssen_pet")
    write_nifti_case(folder / "Grünwald_2", pet="Hanssen_pet")
    pet_file = folder / "Grünwald_2" / "Hanssen_pet.nii.gz"
    pet_file.write_bytes(pet_file.read_bytes()[:-500])
    (folder / "Kettler unreadable.dcm").write_bytes(b"\0" * 128 + b"DICMKettler" + b"Josephine" * 20)
    return 11


def written_texts(folder: Path) -> dict[str, bytes]:
    """All that a curious person can read below a folder: names, texts, headers of images."""
    texts = {}
    for path in folder.rglob("*"):
        texts[f"name of {path.name}"] = str(path.relative_to(folder)).encode()
        if path.is_symlink():
            texts[f"target of {path.name}"] = os.readlink(path).encode()
        elif path.name.endswith(".nii.gz"):
            content = gzip.decompress(path.read_bytes())
            texts[str(path)] = content[: int(nibabel.load(path).header["vox_offset"])]
            texts[f"{path} gzip header"] = path.read_bytes()[:100]
        elif path.suffix == ".png":
            with Image.open(path) as image:
                texts[str(path)] = repr(image.info).encode()
        elif path.is_file():
            texts[str(path)] = path.read_bytes()
    return texts


def assert_no_secret(texts: dict[str, bytes]) -> None:
    found = [
        (where, secret)
        for where, content in texts.items()
        for secret in SECRETS
        if secret.casefold() in content.decode("utf-8", "replace").casefold()
    ]
    assert not found


def test_no_output_names_a_patient(secretive, tmp_path):
    """Good and bad cases in several processes; standard output and error as the terminal gets them."""
    failures = add_failures(secretive.input)
    command = [sys.executable, "-m", "nnUNet_raw_conversion.ghsg", "-i", str(secretive.input), "-d", "522", "-np", "2"]
    done = subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[1], check=False)
    output = (done.stdout + done.stderr).decode()
    assert done.returncode == 1, output
    rows = secretive.table("conversion_report")
    assert sorted(row["status"] for row in rows) == ["done"] * 2 + ["failed"] * failures, output
    assert not any("please report this" in row["error"] for row in rows), rows  # each is a fault that is understood
    assert_no_secret({"output": done.stdout + done.stderr, **written_texts(secretive.raw)})
    assert {path.name for path in tmp_path.iterdir()} == {"in", "raw", "key_in.csv"}
    keys = secretive.keys.read_text(encoding="utf-8")
    assert "88471105" in keys and oct(secretive.keys.stat().st_mode)[-3:] == "600"
    rois = {row["name"] for row in secretive.table("conversion_rois")}
    assert "GTV_…_1" in rois


def test_contours_under_another_name_do_not_show_it(trial):  # noqa: F811
    """Images that were de-identified, and contours that were not: they belong together by their UIDs."""
    write_patient(trial.input / "p", "p", rois={})
    pet = next((trial.input / "p" / "b").iterdir())
    names = {"PatientID": "K-88471105", "PatientName": "Kettler^Josephine"}
    write_rtstruct(trial.input / "rt" / "1.dcm", pet, {"GTV Kettler": LESION}, **names)
    output = trial.convert()
    assert [row["name"] for row in trial.table("conversion_rois")] == ["GTV …"]
    assert_no_secret({"output": output.encode(), **written_texts(trial.raw)})


def test_an_unexpected_error_names_nobody(secretive, monkeypatch):
    """As from a file system that fails while its folders are looked at."""

    def fail(path, *_, **__):
        raise OSError(5, "Input/output error", str(secretive.input / "Kettler_Josephine_19521130"))

    monkeypatch.setattr("nnUNet_raw_conversion.folders.os.walk", fail)
    output = secretive.convert(fails=True)
    assert "a file below -i cannot be read or written (Input/output error)" in output
    assert output.count("\n") == 1 and "Traceback" not in output
    assert_no_secret({"output": output.encode()})
    monkeypatch.setattr("sys.argv", ["x", "-i", str(secretive.input), "-d", "522", "--debug"])
    with pytest.raises(OSError):
        ghsg.main()


def test_links_do_not_name_a_patient(secretive):
    write_nifti_case(secretive.input / "Kettler_2")
    output = secretive.convert("--link")
    assert "3 files are links" in output
    assert_no_secret({"output": output.encode(), **written_texts(secretive.raw)})


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--clinical", "case_id,stage\nKettler,of Josephine\n"),
        ("--clinical", "case_id,age\nKettler,30.11.1952\n"),
        ("--clinical", "case_id,stage\nKettler,I\nKettler,II\n"),
        ("--test-list", "Josephine Kettler\n"),
        ("--key-file", "case_id,patient\nKettler J.,88471105\n"),
        ("--key-file", "case_id,patient\nG1,Kettler\nG1,Josephine\n"),
        ("--suv-override", "case_id,weight_kg\nKettler,70\n"),
        ("--suv-override", "case_id,weight_kg\nKettler,70\nKettler,71\n"),
        ("--suv-override", "case_id,weight_kg\nG1,Kettler\n"),
    ],
)
def test_no_message_on_a_bad_table_names_a_patient(secretive, tmp_path, option, text):
    (tmp_path / "table.csv").write_text(text, encoding="utf-8")
    output = secretive.convert(option, tmp_path / "table.csv", fails=True)
    assert "table.csv" in output and "Traceback" not in output
    assert_no_secret({"output": output.encode()})
