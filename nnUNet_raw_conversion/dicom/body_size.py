"""SUV by lean body mass, ideal weight or body surface (DICOM SUVType) to SUV by body weight."""

from __future__ import annotations

import pydicom

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.fields import field_name, no_number, number_of, shown_code, text_of

HEIGHTS_M = (0.4, 2.5)
HEIGHTS_CM = (100, 250)  # nobody is 100 m tall
# The two forms of James' formula differ by 2 % and more in men: not to be passed over.
JAMES_MEN = {"LBM": 120.0, "LBMJAMES128": 128.0}


def lean_body_mass_james(weight: float, height: float, sex: str, men: float = 128.0) -> float:
    """kg, of kg and m (James 1976, as in Sugawara, Radiology 1999;213:521).

    DICOM PS3.16 knows two forms for men, SUVlbm (126402, `men` 120, a slip of the literature that scanners have built
    in) and SUVlbm(James128) (126405, `men` 128). Women: 1.07 W - 148 (W / H)^2 with H in cm.
    """
    linear, square = (1.07, 148.0) if sex == "F" else (1.10, men)
    return linear * weight - square * (weight / (100 * height)) ** 2


def lean_body_mass_janmahasatian(weight: float, height: float, sex: str) -> float:
    """kg, of kg and m (Janmahasatian, Clin Pharmacokinet 2005;44:1051; DICOM 126406)."""
    constant, slope = (8780.0, 244.0) if sex == "F" else (6680.0, 216.0)
    return 9270.0 * weight / (constant + slope * weight / height**2)


def ideal_body_weight(height: float, sex: str) -> float:
    """kg, of m (Sugawara, Radiology 1999;213:521; DICOM 126404); the mean of both for PatientSex O, as IBSI has it."""
    women, men = 45.5 + 0.91 * (100 * height - 152), 48.0 + 1.06 * (100 * height - 152)
    return {"F": women, "M": men}.get(sex, (women + men) / 2)


def body_surface(weight: float, height: float) -> float:
    """cm2, of kg and m (Du Bois, Arch Intern Med 1916;17:863; DICOM 126403)."""
    return 71.84 * weight**0.425 * (100 * height) ** 0.725


def factor_to_body_weight(header: pydicom.Dataset, weight: float, notes: list[str]) -> float:
    """What makes SUVbw (g/ml) of stored SUV of the header's Units (GML or CM2ML) and SUVType, for `weight` in kg.

    SUV is concentration x size / dose, where size is the body's weight in g, another mass in g, or its surface in cm2:
    SUVbw = SUV x weight / size.

    Raises:
        UserError: Units and SUVType contradict each other, or sex or height that the size needs are missing.
    """
    units = text_of(header, "Units").upper()
    kind = text_of(header, "SUVType").upper() or {"GML": "BW", "CM2ML": "BSA"}[units]
    if kind == "BW" and units == "GML":
        return 1.0
    if (kind == "BSA") != (units == "CM2ML"):
        raise UserError(f"PET: {field_name('Units')} is {units}, but {field_name('SUVType')} is {shown_code(kind)}; "
                        "export it in Bq/ml or as SUVbw", "SUV_UNITS")  # fmt: skip
    if kind not in (*JAMES_MEN, "LBMJANMA", "IBW", "BSA"):
        raise UserError(f"PET: is SUV by {shown_code(kind)}, not by body weight ({field_name('SUVType')}), and that "
                        "is not known here; export it in Bq/ml or as SUVbw", "SUV_UNITS")  # fmt: skip
    sex, height = text_of(header, "PatientSex").upper(), _height_m(header, kind, notes)
    if kind != "BSA" and sex not in (("M", "F", "O") if kind == "IBW" else ("M", "F")):
        what = f"is {shown_code(sex)}, not M or F" if sex else "is missing"
        raise _needs(kind, "PatientSex", what, "SUV_SEX_MISSING")
    if kind == "BSA":
        size = body_surface(weight, height) / 1000
    elif kind == "IBW":
        size = ideal_body_weight(height, sex)
    elif kind == "LBMJANMA":
        size = lean_body_mass_janmahasatian(weight, height, sex)
    else:
        size = lean_body_mass_james(weight, height, sex, JAMES_MEN[kind])
    if not size > 0:
        raise _needs(kind, "PatientSize", "does not go with the weight", "SUV_HEIGHT")
    form = ""
    if kind == "LBM" and sex == "M":
        other = lean_body_mass_james(weight, height, sex) / size
        form = f" (James' form with 120, as DICOM has it; if the scanner took 128, SUV is {1 / other:.3f} times this)"
    notes.append(f"Units {units}: SUV by {kind} as stored, made SUVbw by weight, height and sex{form}")
    return weight / size


def _height_m(header: pydicom.Dataset, kind: str, notes: list[str]) -> float:
    height = number_of(header, "PatientSize") or 0.0
    if HEIGHTS_CM[0] <= height <= HEIGHTS_CM[1]:
        notes.append(f"{field_name('PatientSize')} is {height:g}, read as cm")
        height /= 100
    if not HEIGHTS_M[0] <= height <= HEIGHTS_M[1]:
        raise _needs(kind, "PatientSize", f"is {height:g} m" if height else no_number(header, "PatientSize"),
                     "SUV_HEIGHT")  # fmt: skip
    return height


def _needs(kind: str, keyword: str, what: str, code: str) -> UserError:
    return UserError(f"PET: is SUV by {kind}, not by body weight ({field_name('SUVType')}), and to make SUVbw of it "
                     f"{field_name(keyword)} is needed, which {what}; export it in Bq/ml or as SUVbw",
                     code)  # fmt: skip
