"""clinical.csv: what is written is read again, synonyms become one word, and mistakes are named with their line."""

import datetime
import subprocess
import sys

import openpyxl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.clinical import (
    ClinicalRecord,
    clinical_record,
    name_patients,
    prompt,
    read_clinical,
    write_clinical,
)

words = st.text(st.characters(exclude_categories=("C",)), max_size=20)
records = st.builds(
    clinical_record,
    case_id=words.filter(str.strip),
    tracer=st.sampled_from(["FDG", "Ga-68 PSMA-11", "11C-choline", None]) | words,
    diagnosis=st.none() | words,
    age=st.none() | st.floats(0, 120),
    sex=st.sampled_from(["M", "F", None]),
    stage=st.sampled_from(["I", "II", "III", "IV", "early", "advanced", None]),
    missing=st.sampled_from(["CT", None]),
)


def write_xlsx(path, *rows):
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.create_sheet("notes").append(["nobody reads this"])
    book.save(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(records, unique_by=lambda r: r.case_id))
def test_what_is_written_is_read_again(tmp_path, written):
    write_clinical(tmp_path / "clinical.csv", written)
    assert list(read_clinical(tmp_path / "clinical.csv").values()) == written


def test_the_file_is_the_one_of_the_contract(tmp_path):
    file = tmp_path / "clinical.csv"
    write_clinical(file, [ClinicalRecord("a", "18F-FDG", "melanoma", 61.0, "M", "II"), ClinicalRecord("b", age=0.5)])
    assert file.read_text(encoding="utf-8") == (
        "case_id,tracer,diagnosis,age,sex,stage\na,18F-FDG,melanoma,61,M,II\nb,,,0.5,,\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["clinical.csv"]
    write_clinical(file, [ClinicalRecord("a", stage="early"), ClinicalRecord("b", missing="CT")])
    assert (
        file.read_text(encoding="utf-8") == "case_id,tracer,diagnosis,age,sex,stage,missing\na,,,,,early,\nb,,,,,,CT\n"
    )


def test_writing_refuses_what_reading_would_and_leaves_the_old_file(tmp_path):
    file = tmp_path / "clinical.csv"
    write_clinical(file, [ClinicalRecord("a")])
    for bad in ([ClinicalRecord("b", age=300.0)], [ClinicalRecord("b"), ClinicalRecord("b")], [ClinicalRecord("")]):
        with pytest.raises(UserError):
            write_clinical(file, bad)
    assert list(read_clinical(file)) == ["a"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(("separator", "newline"), [(",", "\n"), (";", "\r\n"), ("\t", "\r")])
def test_spreadsheet_dialects(tmp_path, encoding, separator, newline):
    table = [["Case_ID", "diagnosis", "age"], ["a", "Seminom rechts, groß", "61"], ["b", "", ""], ["", "", ""]]
    lines = [separator.join(f'"{cell}"' if "," in cell else cell for cell in row) for row in table]
    (tmp_path / "t.csv").write_bytes((newline.join(lines) + newline).encode(encoding))
    assert read_clinical(tmp_path / "t.csv") == {
        "a": ClinicalRecord("a", diagnosis="Seminom rechts, groß", age=61.0),
        "b": ClinicalRecord("b"),
    }


@pytest.mark.parametrize(
    ("field", "said", "meant"),
    [
        *[("tracer", t, "18F-FDG") for t in (
            "F-18 FDG", "FDG", "[18F]FDG", "18F FDG", "Fluorodeoxyglucose F^18^", "FDG -- fluorodeoxyglucose",
            "^18^Fluorine FDG", "18F-Fluordesoxyglukose")],
        *[("tracer", t, "68Ga-PSMA") for t in (
            "Ga-68 PSMA-11", "[68Ga]Ga-PSMA-11", "68Ga PSMA", "PSMA-11", "^68^Gallium PSMA")],
        *[("tracer", t, "18F-PSMA") for t in ("F18-PSMA-1007", "[18F]PSMA-1007", "18F-rhPSMA-7.3", "DCFPyL")],
        *[("tracer", t, t) for t in ("PSMA", "68Ga-DOTATATE", "11C-choline")],
        *[("sex", s, "F") for s in ("F", "female", "w", "weiblich", "Female ")],
        *[("sex", s, "M") for s in ("m", "Male", "männlich")],
        *[("sex", s, None) for s in ("d", "unknown", "O", "")],
        *[("stage", s, "I") for s in ("I", "IA", "IE", "1", 1, 1.0, "Stadium IA", "I A")],
        *[("stage", s, "II") for s in ("2", "II", "iia", "IIB", "IIBE", "Stage II", "2.0", "IIAX", "Stage IIB",
                                       "IIB/E", "II B E", "II-B", "Stage IIb", "II (B)", "Stadium: II")],
        *[("stage", s, "III") for s in ("3", "IIIA", "IIIS", "IIIC2")],
        *[("stage", s, "IV") for s in ("4", "IVB", "IVS")],
        *[("stage", s, "early") for s in (
            "early", "Early favorable", "early-unfavourable", "Intermediate", "limited stage", "Frühes Stadium",
            "frühes Stadium (ungünstig)", "intermediäres Stadium", "HD16", "HD 17", "early unfavorable/intermediate")],
        *[("stage", s, "advanced") for s in (
            "advanced", "Advanced stage", "fortgeschritten", "HD18", "fortgeschrittenes Stadium")],
        *[("age", s, 61.0) for s in ("61", "061Y", "61Y", "61.0", 61, "61,0")],
        ("age", "61,5", 61.5), ("age", "018M", 1.5), ("age", "nan", None), ("age", "unknown", None),
        ("age", "003W", pytest.approx(21 / 365.25)), ("age", "010D", pytest.approx(10 / 365.25)),
        ("missing", "ct", "CT"), ("missing", "", None),
        ("diagnosis", "  two \n words", "two words"),
    ],
)  # fmt: skip
def test_synonyms(field, said, meant):
    assert getattr(clinical_record("a", **{field: said}), field) == meant


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("case_id,wieght\na,70\n", ["line 1", "wieght", "diagnosis"]),
        ("case_id,age,age\na,1,2\n", ["line 1", "age"]),
        ("tracer\nFDG\n", ["line 1", "case_id"]),
        ("", ["line 1", "case_id"]),
        ("case_id,age\na,61\nb,abc\n", ["line 3", "age", "not a number"]),
        ("case_id,age\na,121\n", ["line 2", "age", "0 to 120"]),
        ("case_id,age\na,-1\n", ["line 2", "age"]),
        ("case_id,age\na,inf\n", ["line 2", "age"]),
        *[(f"case_id,age\na,{date}\n", ["line 2", "age", "date"])
          for date in ("1961-03-02", "02.03.1961", "3/2/61", "19610302", "1961")],
        ("case_id,age\na,061X\n", ["line 2", "age"]),
        ("case_id,age\na,130Y\n", ["line 2", "age"]),
        ("case_id,sex\na,x\n", ["line 2", "sex"]),
        ("case_id,stage\na,earlier\n", ["line 2", "stage", "early or advanced"]),
        ("case_id,stage\na,V\n", ["line 2", "stage"]),
        ("case_id,stage\na,I-II\n", ["line 2", "stage"]),
        ("case_id,missing\na,PET\n", ["line 2", "missing", "CT"]),
        ("case_id,age\na,61\n\na,62\n", ["line 4", "case_id", "twice", "line 2"]),
        ("case_id,age\n,61\n", ["line 2", "case_id", "empty"]),
        ("case_id,diagnosis\na,lung, left\n", ["line 2", "quotes"]),
        ("case_id,,age\na,lung,61\n", ["line 1", "unknown column ''"]),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_file_line_and_field(tmp_path, content, named):
    (tmp_path / "t.csv").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_clinical(tmp_path / "t.csv")
    message = str(error.value)
    assert "\n" not in message
    for word in ["t.csv", *named]:
        assert word in message


@pytest.mark.parametrize("cell", ["Müller, Anna", "19610302", "02.03.1961"])
@pytest.mark.parametrize("field", ["age", "sex", "stage", "missing"])
def test_no_cell_gets_into_a_message(tmp_path, field, cell):
    """Who takes the wrong column of a hospital's table for the age must not find names in the log."""
    (tmp_path / "t.csv").write_text(f'PatNr,wrong\n4711,"{cell}"\n', encoding="utf-8")
    with pytest.raises(UserError, match=f"line 2: {field}: ") as error:
        read_clinical(tmp_path / "t.csv", {"case_id": "PatNr", field: "wrong"})
    assert not any(word in str(error.value) for word in ("Müller", "1961", "4711"))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin1.csv").write_bytes("case_id,diagnosis\na,groß\n".encode("latin-1"))
    (tmp_path / "broken.xlsx").write_text("case_id\na\n", encoding="utf-8")
    (tmp_path / "old.xls").write_text("case_id\na\n", encoding="utf-8")
    for name in ("latin1.csv", "absent.csv", "broken.xlsx", "old.xls", "."):
        with pytest.raises(UserError, match=name):
            read_clinical(tmp_path / name)


def test_a_spreadsheet_is_read_as_well(tmp_path):
    write_xlsx(tmp_path / "t.xlsx", ["case_id", "Age", "stage", "sex", None], [12.0, 61.0, 3, "w", None], [None] * 5,
               ["13", "058Y", "#N/A", None])  # fmt: skip
    assert read_clinical(tmp_path / "t.xlsx") == {
        "12": ClinicalRecord("12", age=61.0, sex="F", stage="III"),
        "13": ClinicalRecord("13", age=58.0),
    }
    write_xlsx(tmp_path / "t.xlsx", ["case_id", "age"], ["a", 61], ["b", datetime.date(1961, 3, 2)])
    with pytest.raises(UserError, match="line 3: age: is a date") as error:
        read_clinical(tmp_path / "t.xlsx")
    assert "1961" not in str(error.value)
    write_xlsx(tmp_path / "t.xlsx")
    with pytest.raises(UserError, match="no column case_id"):
        read_clinical(tmp_path / "t.xlsx")


def test_columns_of_a_foreign_table_are_named_and_the_rest_is_ignored(tmp_path):
    (tmp_path / "t.csv").write_text(
        "Name;PatNr;Ann Arbor;stage;stage;Alter;sex\nMüller;7;IIB;x;x;61,5;w\nMeier;8;HD18;x;x;;\n", encoding="utf-8",
    )
    columns = {"case_id": "patnr", "stage": " Ann  Arbor", "age": "Alter"}
    assert read_clinical(tmp_path / "t.csv", columns) == {
        "7": ClinicalRecord("7", age=61.5, sex="F", stage="II"),
        "8": ClinicalRecord("8", stage="advanced"),
    }


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"case_id": "PatNr", "stage": "AnnArbor"}, "'AnnArbor', which shall be stage"),
        ({"case_id": "PatNr", "stadium": "Stage"}, "'stadium' is none of ours"),
        ({"stage": "Stage"}, "no column case_id"),
        ({"case_id": "PatNr", "age": "Alter"}, "'Alter' is there twice"),
        ({"case_id": "Alter"}, "'Alter' is there twice"),
        ({"case_id": "Stage"}, "line 3: case_id: is there twice"),
    ],
)
def test_a_wrong_mapping_is_named(tmp_path, columns, named):
    (tmp_path / "t.csv").write_text("PatNr,Stage,Alter,Alter\n7,I,1,1\n8,I,1,1\n", encoding="utf-8")
    with pytest.raises(UserError, match=named):
        read_clinical(tmp_path / "t.csv", columns)


def test_prompt_is_the_one_of_the_paper():
    assert prompt(clinical_record("a", "FDG", "melanoma", "61", "male")) == (
        "<tracer> 18F FDG <diagnosis> melanoma <age> 61 <sex> M"
    )
    assert prompt(clinical_record("a", "68Ga-PSMA", age=61.9)) == "<tracer> 68Ga PSMA <age> 61"
    assert prompt(ClinicalRecord("a", age=0.0, stage="II")) == "<age> 0"
    assert prompt(ClinicalRecord("a")) == ""


def test_pretraining_can_read_it_without_image_libraries():
    code = "import sys, nnUNet_raw_conversion.clinical; sys.exit(bool({'SimpleITK', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_studies_of_one_patient_are_told_and_written(tmp_path):
    records = {name: clinical_record(name) for name in ("a", "b", "c")}
    named = name_patients(records, {"a": ("HD16", "Kettler"), "b": ("HD17", "Kettler"), "c": ("HD16", "Kettler")})
    assert {name: record.patient for name, record in named.items()} == {"a": "a", "b": None, "c": "a"}
    write_clinical(tmp_path / "clinical.csv", named.values())
    assert read_clinical(tmp_path / "clinical.csv") == named
    assert "missing" not in (tmp_path / "clinical.csv").read_text(encoding="utf-8") and "Kettler" not in str(named)
