"""A small trial on disk: patients with CT, PET and RTSTRUCT, as `dicom_files` writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom import Dataset, FileMetaDataset, Sequence
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from tests.dicom_files import LESION_CENTRE, LESION_RADIUS, PET_ORIGIN, PET_SHAPE, PET_SPACING, write_ct, write_pet

LESION = (LESION_CENTRE, LESION_RADIUS)


def write_patient(folder: Path, patient: str, date: str = "20210304", rois: dict | None = None, **tags) -> None:
    """CT, PET and RTSTRUCT of one study in one folder, as `write_series` takes them; the lesion is the ROI "Lesion"."""
    write_ct(folder / "a", patient=patient, date=date, **tags)
    pet = write_pet(folder / "b", patient=patient, date=date, **tags)
    if rois != {}:
        write_rtstruct(folder / "c" / "RS1", pet[0], rois or {"Lesion": LESION})


def write_rtstruct(file: Path, drawn_on: Path, rois: dict[str, tuple], **tags) -> Path:
    """An RTSTRUCT of balls {name: (centre, radius) in mm}, drawn on the slices of the PET that `drawn_on` is a file of.

    Its header is that of the PET; `tags` are further DICOM keywords.
    """
    image = pydicom.dcmread(drawn_on, stop_before_pixels=True)
    header = Dataset()
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate"):
        setattr(header, keyword, image.get(keyword))
    header.Modality, header.SOPClassUID = "RTSTRUCT", RTStructureSetStorage
    header.SeriesInstanceUID, header.SOPInstanceUID = generate_uid(), generate_uid()
    header.SeriesDescription, header.StructureSetDate, header.StructureSetTime = "RTstruct", "20210305", "120000"
    header.ReferencedFrameOfReferenceSequence = _items(
        FrameOfReferenceUID=image.FrameOfReferenceUID,
        RTReferencedStudySequence=_items(
            ReferencedSOPInstanceUID=image.StudyInstanceUID,
            RTReferencedSeriesSequence=_items(SeriesInstanceUID=image.SeriesInstanceUID),
        ),
    )
    structures, contours = [], []
    for number, (name, (centre, radius)) in enumerate(rois.items(), 1):
        frame = image.FrameOfReferenceUID
        structures += _items(ROINumber=number, ROIName=name, ReferencedFrameOfReferenceUID=frame)
        contours += _items(ReferencedROINumber=number, ContourSequence=Sequence(_circles(centre, radius)))
    header.StructureSetROISequence, header.ROIContourSequence = Sequence(structures), Sequence(contours)
    for keyword, value in tags.items():
        setattr(header, keyword, value)
    header.file_meta = FileMetaDataset()
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(file, enforce_file_format=True)
    return file


def _circles(centre: tuple, radius: float) -> list[Dataset]:
    circles, angle = [], np.linspace(0, 2 * np.pi, 60, endpoint=False)
    for z in PET_ORIGIN[2] + PET_SPACING[2] * np.arange(PET_SHAPE[0]):
        if abs(z - centre[2]) < radius:
            r = np.sqrt(radius**2 - (z - centre[2]) ** 2)
            points = np.stack([centre[0] + r * np.cos(angle), centre[1] + r * np.sin(angle), np.full(60, z)], 1)
            data = [f"{v:.4f}" for v in points.ravel()]
            circles += _items(ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=60, ContourData=data)
    return circles


def _items(**tags) -> Sequence:
    item = Dataset()
    for keyword, value in tags.items():
        setattr(item, keyword, value)
    return Sequence([item])
