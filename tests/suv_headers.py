"""PET headers as tests want them, and the SUV factors of the real ones in shared/data/suv_headers, derived by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pydicom

from tests.dicom_files import DATE, DOSE_BQ, HALF_LIFE_S, NAME, PATIENT, WEIGHT_KG

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
PHILIPS = "Philips PET Private Group"


def header(**tags):
    """A PET header: 70 kg, 350 MBq of F-18, injected at 12:15 and scanned from 13:15 on; None removes a field."""
    drug = {
        "RadionuclideTotalDose": DOSE_BQ, "RadionuclideHalfLife": HALF_LIFE_S,
        "RadiopharmaceuticalStartTime": "121500", "RadiopharmaceuticalStartDateTime": None,
        "RadionuclideCodeSequence": None, "Radiopharmaceutical": None,
    }  # fmt: skip
    top = {
        "PatientName": NAME, "PatientID": PATIENT, "PatientWeight": WEIGHT_KG, "Units": "BQML", "Manufacturer": "X",
        "DecayCorrection": "START", "CorrectedImage": ["ATTN", "DECY"], "SeriesDate": DATE, "SeriesTime": "131500",
        "AcquisitionDate": DATE, "AcquisitionTime": "131500",
    }  # fmt: skip
    private = tags.pop("private", {})
    drug |= {k: tags.pop(k) for k in list(tags) if k in drug}
    dataset, item = pydicom.Dataset(), pydicom.Dataset()
    for target, values in ((dataset, top | tags), (item, drug)):
        for keyword, value in values.items():
            if value is not None:
                setattr(target, keyword, value)
    dataset.RadiopharmaceuticalInformationSequence = [item]
    for (group, creator, element), (vr, value) in private.items():
        dataset.private_block(group, creator, create=True).add_new(element, vr, value)
    return dataset


def philips(suv=None, activity=None):
    both = {0x00: suv, 0x09: activity}
    return {(0x7053, PHILIPS, element): ("DS", str(value)) for element, value in both.items() if value is not None}


# For each file of shared/data/suv_headers: dose left at the decay reference = dose x 2^-(t / T), factor = weight / it.
BY_HAND = {
    # series 12:35:15 is 5 us after the acquisition 12:34:... 12:35:14.999995; injected 11:41:00: t = 54 min 15 s.
    "BQML_AC_DT_lessThan_S_DT_SIEMENS": 65000 / (225000000 * 2 ** -(3255 / 6586.2)),
    # series 13:49:18 is of a later reconstruction, the scan began at 13:03:48.234; injected 12:00:37: 3791.234 s.
    "CPS_AND_BQML_AC_DT_-_S_DT": 69000 / (388000000 * 2 ** -(3791.234 / 6586.2)),
    # 09:56:21 - 08:45:00 = 1 h 11 min 21 s = 4281 s.
    "GE_MEDICAL_AND_BQML": 52000 / (152022720 * 2 ** -(4281 / 6586.2001953125)),
    # Philips: acquisition 11:01:56 (not series 11:01:55) - 10:00:58 = 1 h 0 min 58 s = 3658 s.
    "PHILIPS_BQML": 64000 / (126000000 * 2 ** -(3658 / 6586.199707)),
    # Philips' factor of counts to SUV, as it is.
    "PHILIPS_CNTS_AND_BQML_SUV": 0.000551,
    "PHILIPS_CNTS_AND_SUV": 0.000728,
    # only a start time: 13:54:31.843 - 12:50:00 = 1 h 4 min 31.843 s = 3871.843 s.
    "RADIOPHARM_DATETIME_UNDEFINED": 102000 / (412000000 * 2 ** -(3871.843 / 6586.2)),
    # 10:48:29 - 08:30:45 = 2 h 17 min 44 s = 8264 s.
    "SIEMENS": 67000 / (374000000 * 2 ** -(8264 / 6586.2)),
}


def real_headers(name):
    """The headers of one file of shared/data/suv_headers."""
    headers = []
    for tags in json.loads((REAL / "suv_headers" / f"{name}-instances.json").read_text(encoding="utf-8")):
        own = tags.pop("PhilipsPETPrivateGroup")
        start = tags.pop("RadiopharmaceuticalStartDateTime", None)
        private = philips(own.get("SUVScaleFactor"), own.get("ActivityConcentrationScaleFactor"))
        headers.append(header(**tags, RadiopharmaceuticalStartDateTime=start, private=private))
    return headers
