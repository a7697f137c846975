"""DICOM series, structures and segmentations as images with units, and nothing that names the patient.

Names, IDs, UIDs and paths of a DICOM tree never reach a message: folders of hospitals are called after their patients.
"""

import pydicom.config

# pydicom's complaints about odd values quote them; what matters here is checked where it is used.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
