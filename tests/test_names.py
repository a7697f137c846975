"""Which ROIs are lesions, by their names, their types and their codes; what is not known waits for the user."""

from __future__ import annotations

import pytest
from pydicom import Dataset
from pydicom.sr.codedict import codes

from nnUNet_raw_conversion.dicom.names import Kind, kind_of, kind_of_codes
from tests.dicom_files import code


@pytest.mark.parametrize("name", [
    "GTV_Mass", "LN mediastinal", "Lung lesion 1", "liver met", "external iliac LN left", "Läsion 3", "Herd Leber",
    "GTVp", "Tumour", "spleen lesion", "skin met", "bulky", "headneck LN", "Lesion1", "Lesion 1 41%", "GTV_50 %",
    "Liver met 2", "Lymphknoten axillär links", "métastase hépatique", "lésion osseuse", "lesione ossea",
    "Rundherd OL re", "ganglio axilar", "Lebermetastase", "Liver-Met 2", "GTV-Lung", "GTV ohne Luft", "GTVLee",
    "GTVMUELLER", "GTV李", "Target lesion 1", "iGTV", "lesão hepática",
    "uitzaaiing lever", "adénopathie médiastinale", "Lymph node 4R", "GTVp 70 Gy",
    "GTVp+GTVn", "lesion with necrosis", "lesion in liver", "bone met L3", "GTV60Gy", "LK axillär sin",
    "Lymphom iliaca com sin 2", "Lokalrezidiv", "Tu rechts", "Rektumkarzinom", "Spleen involvement", "soft tissue mass",
    "LN neck II left", "ganglion cervical",
])  # fmt: skip
def test_names_of_lesions(name):
    assert kind_of(name) is Kind.LESION


PEDIATRIC_CT_SEG = """Adrenal Left|Adrenal Right|Bladder|Breast Left|Duodenum|Femoral Head Lef|Femoral Head Rig
Gall Bladder|Gonads|Heart|Kidney Left|Large Intestine|Liver|Prostate|Spinal Canal|Thymus|UteroCervix
Lung_L|Skin|Bones"""
TOTALSEGMENTATOR = """spleen|kidney_right|gallbladder|adrenal_gland_left|lung_upper_lobe_left|lung_middle_lobe_right
esophagus|trachea|thyroid_gland|small_bowel|urinary_bladder|kidney_cyst_left|sacrum|vertebrae_S1
vertebrae_L1|vertebrae_T12|heart|pulmonary_vein|brachiocephalic_trunk|subclavian_artery_right
common_carotid_artery_left|atrial_appendage_left|superior_vena_cava|portal_vein_and_splenic_vein
iliac_artery_left|iliac_vena_right|humerus_left|scapula_right|clavicula_left|femur_left|hip_left
spinal_cord|gluteus_maximus_left|autochthon_right|iliopsoas_left|skull|rib_left_1|rib_right_12
sternum|costal_cartilages|body_trunc|body_extremities|subcutaneous_fat|torso_fat|skeletal_muscle
intervertebral_discs|face"""
TG263 = """A_Aorta|A_Carotid_L|Bag_Bowel|Bladder_Wall|Bone_Mandible|Bowel_Small|BrachialPlexus|Brainstem
Breast_L|Bronchus_Prox|CaudaEquina|Cavity_Oral|Cochlea_L|Esophagus|External|Eye_L|Femur_Head_L
Glnd_Submand_L|Glnd_Thyroid|GreatVes|Kidney_Cortex_L|Larynx|Lens_L|Lips|Lobe_Frontal|Lungs
Musc_Constrict_I|OpticChiasm|OpticNrv_L|Parotid_R|PenileBulb|SeminalVes|SpinalCanal|SpinalCord_PRV05
UteroCervix|V_Venacava_I|VB_T01|Lungs-GTV|Brain-GTV"""
REFERENCES = """Mediastinal blood pool|MBP|Referenz Mediastinum|PERCIST liver|PERCIST sphere|Leberreferenz
Right liver lobe|Blutpool Aorta ascendens|Urinary bladder|Physiologic uptake|Injection site
brown fat|Liver ref|Liver_ref 3cm|background 2|Hintergrund|Kontur|BODY|Body outline|spine
Vertebral body L3|Lung minus GTV|Leber ohne Herd"""
LANGUAGES = """Rechte Niere|NiereRechts|Leber|Milz|Harnblase|Körper|rein gauche|vessie|foie|cerveau|hígado
riñón derecho|vejiga|fegato|rene destro|vescica|lever|rechter nier|blaas|fígado|rim esquerdo|coração"""
PLANNING = """PTV60|PTV_50Gy|CTVn|zPTV_opt|ITV1|ring 2cm|CouchSurface|Bolus|95%|105 %|isodose 40|GTV_Edema
PRV cord|avoid_bowel|Organ Müßiggang|OAR_x|BrainStem|Aorta asc|GTV+5mm|GTV_N + 1 cm|Dose 50Gy
Lungs – GTV|Liver w/o GTV|Lungs_sub_GTV|Plexus brachialis li"""


@pytest.mark.parametrize("names", [PEDIATRIC_CT_SEG, TOTALSEGMENTATOR, TG263, REFERENCES, LANGUAGES, PLANNING])
def test_names_that_are_no_lesions(names):
    assert not [name for name in names.replace("\n", "|").split("|") if kind_of(name) is not Kind.NONE]


@pytest.mark.parametrize("name", [
    "1", "L", "L1", "ROI 1", "Segment_1", "boost", "Kettler", "Liver Kettler", "mediastinum",
    "axilla left", "Liver 2", "bone", "string", "no lesion", "kein Tumor", "benign lesion", "tumor background",
    "reference lesion", "Lung free of tumor", "nicht maligne LK", "reactive LN", "LN neg", "elective nodes",
    "Liver incl. GTV", "GTV margin", "Tumor Rand 5mm", "Tumor bed", "bounding box tumor", "lesion excluded",
    "LN_Neck_II_L", "LN_Ax_L1_R", "AV node", "Ganglion coeliacum", "stellate ganglion", "muscle mass",
    "Liver with lesions", "Leber mit Metastasen", "foie avec lésions", "Lung+GTV", "liver con metastasi",
])  # fmt: skip
def test_names_that_only_a_person_can_tell(name):
    assert kind_of(name) is Kind.UNKNOWN


@pytest.mark.parametrize(
    ("name", "stated", "kind"),
    [
        ("boost", "GTV", Kind.LESION), ("boost", "ORGAN", Kind.UNKNOWN), ("GTV 1", "ORGAN", Kind.LESION),
        ("GTV 1", "EXTERNAL", Kind.NONE), ("boost", "PTV", Kind.NONE), ("Liver", "GTV", Kind.UNKNOWN),
        ("GTV_Edema", "GTV", Kind.NONE), ("Liver", "ORGAN", Kind.NONE),
    ],
)  # fmt: skip
def test_interpreted_types_are_evidence(name, stated, kind):
    assert kind_of(name, stated) is kind


def segment(category, kind) -> Dataset:
    described = Dataset()
    described.SegmentedPropertyCategoryCodeSequence = code(*category)
    described.SegmentedPropertyTypeCodeSequence = code(*kind)
    return described


LESION_CATEGORY, ORGAN_CATEGORY = ("49755003", "SCT", ""), ("123037004", "SCT", "")


@pytest.mark.parametrize(
    ("category", "kind", "name", "expected"),
    [
        (LESION_CATEGORY, ("108369006", "SCT", ""), "Segment_1", Kind.LESION),
        (("M-01000", "SRT", ""), ("M-80003", "SRT", ""), "x", Kind.LESION),
        (LESION_CATEGORY, ("79654002", "SCT", ""), "Segment_1", Kind.NONE),  # oedema
        (ORGAN_CATEGORY, ("10200004", "SCT", ""), "Segment_2", Kind.NONE),
        (ORGAN_CATEGORY, ("10200004", "SCT", ""), "Lesion", Kind.UNKNOWN),
        (ORGAN_CATEGORY, ("59441001", "SCT", ""), "LN 2", Kind.LESION),  # a lymph node, by its name one of the disease
        (("85756007", "SCT", ""), ("85756007", "SCT", ""), "Segment_1", Kind.UNKNOWN),  # "Tissue", 3D Slicer's default
        (LESION_CATEGORY, ("108369006", "SCT", ""), "Liver", Kind.NONE),
    ],
)
def test_codes_of_segments_are_evidence(category, kind, name, expected):
    assert kind_of(name, kind_of_codes(segment(category, kind)) or "") is expected


def test_the_codes_are_those_of_the_standard():
    assert codes.SCT.MorphologicallyAbnormalStructure.value == "49755003" and codes.SCT.Edema.value == "79654002"
    assert kind_of_codes(Dataset()) is None
