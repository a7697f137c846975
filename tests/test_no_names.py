"""No name, date of birth or number of a patient in any output: every tag full of them, every output unpacked, searched.

Through conversion of DICOM and of folders, planning, pretraining, training and staging, with what is said on the way.
"""

from __future__ import annotations

import gzip
import io
import unicodedata
import zipfile
from pathlib import Path

import blosc2
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.datadict import DicomDictionary

from tests.conftest import SETTINGS, Workspace
from tests.dicom_files import code
from tests.test_ghsg import write_nifti_case
from tests.trial_files import LESION, write_patient

NAMES = ["Kettler", "Josephine", "Müßiggang", "Muessiggang", "Eisenbart", "Grünwald", "Hanssen", "Rosengasse", "李明"]
NUMBERS = ["88471105", "ACC777001", "19521130", "30111952", "301152", "30.11.52", "30.11.1952", "30NOV1952", "1952-11",
           "1.2.826.0.1.3680043"]  # fmt: skip
TEXT = "Kettler^Josephine^Müßiggang"
# Of each value representation one text that tells who it is; the others hold figures and codes
FILLED = {
    "PN": TEXT, "LO": "Kettler 88471105 *30.11.1952", "SH": "ACC777001", "ST": "Josephine Kettler, Rosengasse 7",
    "LT": "Frau Müßiggang, geb. 301152, Dr. Eisenbart 李明", "UT": "Kettler 30NOV1952", "UC": "Hanssen 1952-11",
    "AE": "KETTLER", "UR": "file:///Kettler",
}  # fmt: skip
# Text that decides how a series is read, which a scanner writes and no person
MEANT = {
    "TimezoneOffsetFromUTC", "RescaleType", "CodeValue", "CodingSchemeDesignator", "SpecificCharacterSet",
    "SeriesDescription", "ConvolutionKernel", "RadionuclideCodeSequence", "ROIName", "ClinicalTrialProtocolID",
    "ClinicalTrialSubjectID",
    "ModalityLUTSequence", "ContrastBolusAgent", "AttenuationCorrectionMethod",
}  # fmt: skip
ROIS = ["GTVKettler", "GTV李明", "GTV_30111952", "Läsion 301152", "Lesion_30NOV1952", "LN 1952-11 axillär",
        "Lesion 30.11.52", "Tumor Müßiggang", "Herd_88471105", "Leber"]  # fmt: skip


def keywords(representation: str) -> list[str]:
    """All keywords of the standard of this value representation that a header may have."""
    found = (
        entry[4] for tag, entry in DicomDictionary.items() if entry[0] == representation and 0x0007 < tag >> 16 < 0x5000
    )
    return [keyword for keyword in found if keyword and keyword not in MEANT]


def fill(dataset: pydicom.Dataset, everything: bool) -> None:
    """Put who the patient is in all text elements that are not there yet, in sequences, and in private blocks."""
    dataset.SpecificCharacterSet = "ISO_IR 192"
    nested = pydicom.Dataset()
    for target in (dataset, nested):
        for representation, value in FILLED.items():
            for keyword in keywords(representation)[:: 1 if everything else 25]:
                if keyword not in target:
                    setattr(target, keyword, value)
    nested.PatientID, nested.TypeOfPatientID = "OLD-88471105", "TEXT"
    dataset.OtherPatientIDsSequence = dataset.RequestAttributesSequence = dataset.OriginalAttributesSequence = [nested]
    block = dataset.private_block(0x0029, "KETTLER HEADER", create=True)
    block.add_new(0x10, "LO", "Kettler 30.11.52")
    block.add_new(0x20, "SQ", [nested])
    block.add_new(0x30, "OB", "Josephine Kettler ".encode("utf-16-le"))
    for roi, name in zip(dataset.get("StructureSetROISequence", ()), ROIS, strict=False):
        roi.ROIName = name  # once more, in this character set
    for drug in dataset.get("RadiopharmaceuticalInformationSequence", ()):
        drug.Radiopharmaceutical = "Kettler FDG"
        drug.RadiopharmaceuticalCodeSequence = code("K1", "99KETTLER", "Kettler FDG")
        drug.RadionuclideCodeSequence = code("77004003", "SCT", "Kettler 18F")
    dataset.PatientName, dataset.PatientBirthDate, dataset.AccessionNumber = TEXT, "19521130", "ACC777001"
    dataset.InstitutionName, dataset.StationName = "Klinikum Eisenbart", "GRUENWALD"


def write_input(folder: Path) -> None:
    """A DICOM patient with lesions, one without, and NIfTI folders, all of whose names and texts are the patients'."""
    home = folder / "Kettler_Josephine_19521130" / "Müßiggang 88471105"
    texts = {"SpecificCharacterSet": "ISO_IR 192"}
    rois = {f"{number}": LESION for number in range(len(ROIS))}
    write_patient(home, "K-88471105", rois=rois, SeriesDescription="PET AC Kettler 30.11.52", **texts)
    texts["SeriesDescription"] = "301152 Grünwald"
    write_patient(folder / "Hanssen 李明", "ACC777001", "20210505", rois={}, **texts)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            dataset = pydicom.dcmread(file)
            fill(dataset, everything=file.name in ("IM0001", "RS1"))
            dataset.save_as(file)
            file.rename(file.with_name(f"Kettler_{file.name}"))
    write_nifti_case(folder / "Eisenbart_Grünwald", "Hanssen_ct", "Hanssen_suv", "Hanssen_seg")


def write_pairs(folder: Path) -> None:
    """Two folders called by names, with a table that has them and more."""
    for name in ("Kettler, Josephine", "Müßiggang_30111952"):
        write_nifti_case(folder / name, "ct", "suv", "seg")
        for file in (folder / name).glob("*.nii.gz"):
            image = nibabel.load(file)
            for field, text in (("descrip", b"Kettler"), ("db_name", b"Hanssen"), ("aux_file", b"88471105")):
                image.header[field] = text
            image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Josephine Kettler"))
            nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header), file)
    (folder / "clinical.csv").write_text(
        "case_id,tracer,diagnosis,age,sex,stage,patient\n"
        '"Kettler, Josephine",FDG Kettler,"Hodgkin lymphoma, Fr. Kettler",61,F,II,Kettler\n'
        'Müßiggang_30111952,68Ga-PSMA-11,"prostate cancer, Grünwald 301152",50,M,III,Hanssen\n', encoding="utf-8",
    )


def unpacked(path: Path) -> dict[str, bytes]:
    """The content of a file by where it is, with all that is packed in it, and its name."""
    content = path.read_bytes()
    found = {str(path): content, f"name of {path}": str(path).encode()}
    if content[:2] == b"\x1f\x8b":
        found[f"{path} unpacked"] = gzip.decompress(content)
    elif content[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found |= {f"{path} {name}": archive.read(name) for name in archive.namelist()}
    elif path.suffix == ".b2nd":
        array = blosc2.open(str(path), mmap_mode="r")
        found[f"{path} voxels"] = array[:].tobytes()
        layers = [array.schunk.meta[key] for key in array.schunk.meta]
        found[f"{path} metadata"] = repr([array.schunk.vlmeta[:], layers]).encode()
    elif path.suffix == ".npz":
        found[f"{path} arrays"] = b"".join(array.tobytes() for array in np.load(path).values())
    elif path.suffix == ".png":
        with Image.open(path) as image:
            found[f"{path} texts"] = repr(image.info).encode()
    return found


def spellings(secret: str) -> set[bytes]:
    """A secret in the encodings and escapes in which programs write text."""
    forms = {secret.lower(), unicodedata.normalize("NFD", secret.lower()), secret.lower().replace("ß", "ss")}
    found = {form.encode(encoding) for form in forms for encoding in ("utf-8", "utf-16-le", "utf-16-be")}
    found |= {form.encode("latin-1") for form in forms if all(ord(c) < 256 for c in form)}
    found |= {form.encode("unicode_escape") for form in forms}
    return found | {form.encode("ascii", "xmlcharrefreplace") for form in forms}


def assert_nobody_is_named(*folders: Path, outputs: tuple[str, ...] = ()) -> None:
    wanted = {(secret, form) for secret in [*NAMES, *NUMBERS] for form in spellings(secret)}
    contents = {f"output {i}": text.encode() for i, text in enumerate(outputs)}
    count = 0
    for folder in folders:
        for path in folder.rglob("*"):
            contents |= {f"name of {path}": str(path.relative_to(folder)).encode()}
            if path.is_file():
                count += 1
                for where, content in unpacked(path).items():
                    low = content.lower()
                    found = [(where, secret) for secret, form in wanted if form in low]
                    assert not found
    found = [(where, secret) for where, text in contents.items() for secret, form in wanted if form in text.lower()]
    assert not found
    assert count or not folders


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Workspace, list[str]]:
    """The two inputs as datasets 7 and 8, the second planned; what the commands said."""
    workspace = Workspace(tmp_path_factory.mktemp("data"))
    inputs = tmp_path_factory.mktemp("inputs")
    write_input(inputs / "dicom")
    write_pairs(inputs / "pairs")
    said = [
        workspace.run(f"fratmae_convert_ghsg -i {inputs}/dicom -d 7 -n Trial -np 1"),
        workspace.run(f"fratmae_convert_pairs -i {inputs}/pairs -d 8 -n Pairs --ct ct.nii.gz --pet suv.nii.gz "
                      f"--seg seg.nii.gz --clinical {inputs}/pairs/clinical.csv -np 1"),
    ]  # fmt: skip
    return workspace, said


def test_the_search_finds_what_is_there(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress("x Müßiggang".encode("utf-16-le")))
    with pytest.raises(AssertionError, match="Müßiggang"):
        assert_nobody_is_named(tmp_path)
    with pytest.raises(AssertionError, match="301152"):
        assert_nobody_is_named(outputs=("ROI 301152",))


def test_datasets_name_nobody(converted):
    workspace, said = converted
    assert_nobody_is_named(workspace.raw, outputs=tuple(said))
    dataset = workspace.raw / "Dataset007_Trial"
    rois = (dataset / "conversion_rois.csv").read_text(encoding="utf-8")
    assert all(name in rois for name in ("GTV…", "Läsion …", "LN … axillär", "Tumor …", "Leber"))  # what is known
    assert len(list((dataset / "imagesTr").glob("*"))) == 4 and len(list((dataset / "imagesPt").glob("*"))) == 2
    assert "tracer of 3 cases" in said[0] and "unknown" in said[0]


def test_plans_and_stores_name_nobody(converted):
    workspace, _ = converted
    said = workspace.run(f"fratmae_plan_and_preprocess -d 7 -preset vit_nano -np 1 --set {' '.join(SETTINGS)}")
    assert_nobody_is_named(workspace.preprocessed, outputs=(said,))


@pytest.mark.slow
def test_trainings_name_nobody(converted, text_tower):
    workspace, _ = converted
    plan = f"fratmae_plan_and_preprocess -preset vit_nano -np 1 --set staging.epochs=1 {' '.join(SETTINGS)}"
    pretraining, artefact, table, stages = (workspace.folder / name for name in ("run", "artefact", "table", "stages"))
    model = workspace.results / "Dataset008_Pairs" / "FratMAEStagingTrainer__FratMAEPlans__wholebody"
    tower = f"pretrain.text_tower={text_tower} pretrain.text_weights=null pretrain.held_out=0"
    commands = (
        f"{plan} -d 8",
        f"fratmae_pretrain -d 8 -device cpu -o {pretraining} --set {tower}",
        f"fratmae_export -m {pretraining} -o {artefact}",
        f"fratmae_retrieve -d 8 -m {pretraining} -o {table}/8.csv -device cpu",
        "nnUNetv2_train 8 3d_fullres all -tr FratMAETrainer -p FratMAEPlans -device cpu",
        "nnUNetv2_train 8 wholebody all -tr FratMAEStagingTrainer -p FratMAEPlans -device cpu",
        f"fratmae_predict_stage -i {workspace.raw}/Dataset008_Pairs/imagesTr -o {stages} -m {model} -device cpu",
    )
    table.mkdir()
    said = [workspace.run(command, FRATMAE_PRETRAINED=str(pretraining)) for command in commands]
    assert (
        len((stages / "stages.csv").read_text(encoding="utf-8").splitlines()) == 3
        and len(list(stages.glob("*.png"))) == 2
    )
    assert len((table / "8.csv").read_text(encoding="utf-8").splitlines()) == 3
    outputs = (pretraining, artefact, table, stages)
    assert_nobody_is_named(workspace.preprocessed, workspace.results, *outputs, outputs=tuple(said))
