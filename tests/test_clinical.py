"""clinical.csv: what is written is read again, synonyms become one word, and mistakes are named with their line."""

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnUNet_raw_conversion.clinical import ClinicalRecord, clinical_record, prompt, read_clinical, write_clinical
from nnUNet_raw_conversion.command import UserError

words = st.text(st.characters(exclude_categories=("C",)), max_size=20)
records = st.builds(
    clinical_record,
    case_id=words.filter(str.strip),
    tracer=st.sampled_from(["FDG", "Ga-68 PSMA-11", "11C-choline", None]) | words,
    diagnosis=st.none() | words,
    age=st.none() | st.floats(0, 120),
    sex=st.sampled_from(["M", "F", None]),
    stage=st.sampled_from(["I", "II", "III", "IV", None]),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(records, unique_by=lambda r: r.case_id))
def test_what_is_written_is_read_again(tmp_path, written):
    write_clinical(tmp_path / "clinical.csv", written)
    assert list(read_clinical(tmp_path / "clinical.csv").values()) == written


def test_the_file_is_the_one_of_the_contract(tmp_path):
    file = tmp_path / "clinical.csv"
    write_clinical(file, [ClinicalRecord("a", "18F-FDG", "melanoma", 61.0, "M", "II"), ClinicalRecord("b", age=0.5)])
    assert file.read_text() == (
        "case_id,tracer,diagnosis,age,sex,stage\na,18F-FDG,melanoma,61,M,II\nb,,,0.5,,\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["clinical.csv"]


def test_writing_refuses_what_reading_would_and_leaves_the_old_file(tmp_path):
    file = tmp_path / "clinical.csv"
    write_clinical(file, [ClinicalRecord("a")])
    for bad in ([ClinicalRecord("b", age=300.0)], [ClinicalRecord("b"), ClinicalRecord("b")], [ClinicalRecord("")]):
        with pytest.raises(UserError):
            write_clinical(file, bad)
    assert list(read_clinical(file)) == ["a"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(("separator", "newline"), [(",", "\n"), (";", "\r\n")])
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
        *[("tracer", t, "18F-FDG") for t in ("F-18 FDG", "FDG", "[18F]FDG", "18F FDG", "Fluorodeoxyglucose F^18^")],
        *[("tracer", t, "68Ga-PSMA") for t in ("Ga-68 PSMA-11", "[68Ga]Ga-PSMA-11", "68Ga PSMA", "PSMA-11")],
        *[("tracer", t, "18F-PSMA") for t in ("F18-PSMA-1007", "[18F]PSMA-1007", "18F-rhPSMA-7.3", "DCFPyL")],
        *[("tracer", t, t) for t in ("PSMA", "68Ga-DOTATATE", "11C-choline")],
        *[("sex", s, "F") for s in ("F", "female", "w", "weiblich", "Female ")],
        *[("sex", s, "M") for s in ("m", "Male", "männlich")],
        *[("sex", s, None) for s in ("d", "unknown", "O", "")],
        *[("stage", s, "II") for s in ("2", "II", "iia", "IIB", "IIBE", "Stage II", "2.0")],
        *[("stage", s, "IV") for s in ("4", "IVB", "IVS")],
        ("age", "61,5", 61.5), ("age", "nan", None), ("age", "unknown", None),
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
        ("case_id,age\na,61\nb,abc\n", ["line 3", "age", "abc"]),
        ("case_id,age\na,121\n", ["line 2", "age", "121"]),
        ("case_id,age\na,-1\n", ["line 2", "age"]),
        ("case_id,age\na,inf\n", ["line 2", "age"]),
        ("case_id,sex\na,x\n", ["line 2", "sex", "x"]),
        ("case_id,stage\na,early\n", ["line 2", "stage", "early"]),
        ("case_id,stage\na,V\n", ["line 2", "stage", "V"]),
        ("case_id,age\na,61\n\na,62\n", ["line 4", "case_id", "a", "twice"]),
        ("case_id,age\n,61\n", ["line 2", "case_id", "empty"]),
        ("case_id,diagnosis\na,lung, left\n", ["line 2", "quotes"]),
    ],
)
def test_a_mistake_is_named_with_file_line_and_field(tmp_path, content, named):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UserError) as error:
        read_clinical(tmp_path / "t.csv")
    message = str(error.value)
    assert "\n" not in message
    for word in ["t.csv", *named]:
        assert word in message


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin1.csv").write_bytes("case_id,diagnosis\na,groß\n".encode("latin-1"))
    for name in ("latin1.csv", "absent.csv", "."):
        with pytest.raises(UserError, match=name):
            read_clinical(tmp_path / name)


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
