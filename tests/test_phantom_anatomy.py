"""Phantoms around organ maps: real organs kept, in the map's own geometry, with a plausible body and a true record."""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from nnUNet_raw_conversion.checks import checked_case
from nnUNet_raw_conversion.clinical import read_clinical
from nnUNet_raw_conversion.geometry import same_grid
from nnUNet_raw_conversion.phantom.command import main, make_case
from nnUNet_raw_conversion.phantom.from_labels import make_labelled_case
from nnUNet_raw_conversion.phantom.organs import labels_of

MAPS = Path(__file__).resolve().parents[2] / "shared" / "data" / "autopet3_organ_labels"
CODING = {1: ["spleen"], 2: ["kidneys"], 3: ["liver"], 4: ["bladder"], 5: ["lung"], 6: ["brain", "white matter"],
          7: ["myocardium"], 8: ["stomach"], 9: ["prostate"],
          10: ["parotid glands", "submandibular glands"]}  # fmt: skip
SPACING = (6.0, 5.0, 7.0)  # x, y, z
MAN, WOMAN = 0, 1  # indices of phantoms whose organs make the maps


@cache
def organ_map(index=MAN):
    """The organs of a phantom in the coding of autoPET III, with fat heart walls, as LPS image."""
    case = make_case(index, 7, SPACING)
    assert case.record.sex == ("M" if index == MAN else "F")
    labels = np.zeros(case.organs.shape, np.uint8)
    heart = ndimage.binary_closing(case.organs == labels_of("myocardium").argmax(), iterations=4)
    labels[heart] = 7
    for label, organs in CODING.items():
        labels[labels_of(*organs)[case.organs]] = label
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(case.grid.spacing)
    image.SetOrigin((-321.5, 77.25, -1204.0))
    return image


def write(folder, image, name="fdg_000.nii.gz"):
    folder.mkdir(exist_ok=True)
    sitk.WriteImage(image, folder / name)
    return folder / name


@cache
def built(folder, index=0, kind=MAN, name="fdg_000.nii.gz", spacing=None, tracer=None):
    return make_labelled_case(write(folder, organ_map(kind), name), index, 3, spacing, tracer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("maps")


def arrays(case):
    return [sitk.GetArrayFromImage(image) for image in (case.ct, case.pet, case.lesions)]


def organ_medians(image, labels, *, clear_of):
    """The median of `image` in the middle of each organ, away from its rim and from lesions."""
    values = {}
    for label in range(1, 11):
        region = ndimage.binary_erosion(labels == label) & ~clear_of
        if region.any():
            values[label] = float(np.median(image[region]))
    return values


def is_stage_true(lesions, labels, stage):
    """Lesions of stage I and II lie on one side of the diaphragm, of stage III on both."""
    dome = np.nonzero(labels == 3)[0].max()
    heights = np.nonzero(lesions)[0]
    sides = {"above" if height > dome else "below" for height in heights}
    return stage == "IV" or len(sides) == (2 if stage == "III" else 1)


def turned(image, code):
    return sitk.DICOMOrient(image, code)


@pytest.mark.parametrize("code", ["LAS", "RAI", "SPL", "PIR"])
def test_orientation_of_the_map_is_kept_and_changes_nothing_else(folder, tmp_path, code):
    image = turned(organ_map(), code)
    case = make_labelled_case(write(tmp_path, image, "fdg_000.nii"), 0, 3)
    for one, upright in zip(case[1:], built(folder)[1:], strict=True):
        assert one.GetSize() == image.GetSize() and one.GetDirection() == pytest.approx(image.GetDirection())
        assert same_grid(one, image)
        assert np.array_equal(*(sitk.GetArrayFromImage(turned(i, "LPS")) for i in (one, upright)))


def test_oblique_map(tmp_path):
    image = sitk.Image(organ_map())
    angle = np.radians(9)
    image.SetDirection([np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle), 0, 0, 0, 1])
    case = make_labelled_case(write(tmp_path, image), 0, 3)
    assert same_grid(case.ct, image) and case.ct.GetDirection() == pytest.approx(image.GetDirection())


def test_spacing_can_be_chosen(folder):
    case = built(folder, spacing=(9.0, 8.0, 10.0))
    assert case.pet.GetSpacing() == (9, 8, 10) and case.record == built(folder).record
    # the field of view begins at the same corner and is as large
    assert case.pet.GetOrigin() == pytest.approx([-324.5 + 4.5, 74.75 + 4, -1207.5 + 5])
    extent = np.array(case.pet.GetSize()) * case.pet.GetSpacing()
    assert extent == pytest.approx(np.array(organ_map().GetSize()) * SPACING, abs=5)


@pytest.mark.parametrize("name, kind", [("fdg_000.nii.gz", MAN), ("fdg_000.nii.gz", WOMAN), ("psma_1.nii.gz", MAN)])
def test_organs_of_the_map_are_those_of_the_images(folder, name, kind):
    case = built(folder, 0, kind, name)
    (ct, pet, lesions), labels = arrays(case), sitk.GetArrayViewFromImage(organ_map(kind))
    hu = organ_medians(ct, labels, clear_of=lesions > 0)
    suv = organ_medians(pet, labels, clear_of=lesions > 0)
    assert hu[5] < -600 and all(20 < hu[label] < 80 for label in (1, 3, 6)) and -20 < hu[4] < 25
    assert suv[5] < 0.8 * suv[3]
    if name.startswith("fdg"):
        assert suv[6] > 1.3 * suv[3] and suv[4] > suv[3] > suv[5]
    else:
        assert suv[2] > suv[3] > 5 * suv[6] and suv[10] > 3 * suv[5]


def test_body_bones_and_table(folder):
    """The organs lie in one body that has ribs around its lungs, a skull around its brain and a table under it."""
    (ct, pet, _), labels = arrays(built(folder)), sitk.GetArrayViewFromImage(organ_map())
    parts, _ = ndimage.label(ct > -300)
    body = parts == np.bincount(parts[parts > 0]).argmax()
    filled = np.stack([ndimage.binary_fill_holes(row) for row in body])
    assert filled[labels > 0].mean() > 0.995
    distance = ndimage.distance_transform_edt(labels != 6, SPACING[::-1])
    assert np.median(ct[(distance > 2) & (distance < 6)]) > 200  # skull
    distance = ndimage.distance_transform_edt(labels != 5, SPACING[::-1])
    wall = (distance > 3) & (distance < 15) & (labels == 0)
    assert 0.05 < (ct[wall] > 150).mean() < 0.5  # ribs, spine and sternum
    kidneys = np.nonzero(labels == 2)
    spine = ct[kidneys[0].min() : kidneys[0].max(), :, kidneys[2].min() : kidneys[2].max()]
    assert (spine > 150).any((1, 2)).mean() > 0.7  # discs between the vertebrae
    back = np.nonzero(body.any((0, 2)))[0].max()
    assert (ct[:, back + 1 :] > -950).any((1, 2)).mean() > 0.9
    hull = ndimage.distance_transform_edt(~filled, SPACING[::-1])
    assert filled.mean() > 0.05 and pet[hull > 15].max() < 0.2


def test_record_is_true_of_the_volume(folder):
    labels = sitk.GetArrayViewFromImage(organ_map())
    stages = set()
    for index in range(10):
        record, lesions = built(folder, index).record, arrays(built(folder, index))[2]
        assert record.case_id == f"phantom_{index:03d}" and record.tracer == "18F-FDG" and record.sex == "M"
        assert lesions.any() == (record.diagnosis != "negative control")
        assert (record.stage is not None) == (record.diagnosis == "Hodgkin lymphoma")
        if record.stage:
            assert is_stage_true(lesions, labels, record.stage), record
            stages.add(record.stage)
    assert len(stages) > 2
    assert built(folder, 0, WOMAN).record.sex == "F"
    assert "PSMA" in built(folder, 0, MAN, "x_psma_1.nii.gz").record.tracer
    assert built(folder, 0, MAN, "any.nii.gz", tracer="[68Ga]Ga-PSMA-11").record.tracer == "68Ga-PSMA"


def test_everything_follows_from_seed_and_index(folder, tmp_path):
    path = write(tmp_path, organ_map())
    again, other = make_labelled_case(path, 0, 3), make_labelled_case(path, 0, 4)
    for a, b, c in zip(arrays(built(folder)), arrays(again), arrays(other), strict=True):
        assert np.array_equal(a, b)
        assert not (a.any() and np.array_equal(a, c))


@pytest.mark.parametrize("organs", [(5, 7), (4, 9), (6, 10), (1, 2, 3, 8), (2, 4)])
def test_cropped_maps(tmp_path, organs):
    """A field of view of a few organs: disease is only where it is seen, and a converter takes the case."""
    labels = sitk.GetArrayFromImage(organ_map())
    slices = np.flatnonzero(np.isin(labels, organs).any((1, 2)))
    first, last = slices[0] + len(slices) // 8, slices[-1] - len(slices) // 8
    path = write(tmp_path, organ_map()[:, :, int(first) : int(last)])
    for index in range(4):
        case = make_labelled_case(path, index, 5)
        assert arrays(case)[2].any() == (case.record.diagnosis != "negative control")
        assert checked_case(case.ct, case.pet, case.lesions)


def test_converters_take_the_cases(folder):
    for name in ("fdg_000.nii.gz", "psma_1.nii.gz"):
        case = built(folder, 0, MAN, name)
        *_, notes = checked_case(case.ct, case.pet, case.lesions)
        assert not notes


def test_a_threshold_is_no_good(folder):
    scores = []
    for index in range(10):
        _, pet, lesions = arrays(built(folder, index))
        if lesions.any():
            scores.append(2 * ((pet > 2.5) & (lesions > 0)).sum() / ((pet > 2.5).sum() + lesions.sum()))
    assert np.mean(scores) < 0.2


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["fratmae_phantom", *map(str, words)])
    main()
    return capsys.readouterr().out


def test_dataset(raw, tmp_path, monkeypatch, capsys):
    """One case a map by default, lesion masks passed over; more cases use the maps again, with other seeds."""
    maps = tmp_path / "maps"
    write(maps, turned(organ_map(), "LAS"), "fdg_a.nii.gz")
    write(maps, organ_map(), "psma_b.nii.gz")
    write(maps, organ_map() == 3, "lesion_example_psma.nii.gz")
    coarse = ("--spacing", 9, 8, 10)
    assert "2 phantoms" in run(monkeypatch, capsys, "-d", 41, "--anatomy", maps, *coarse)
    run(monkeypatch, capsys, "-d", 42, "--anatomy", maps, "-n", 3, "-np", 2, *coarse)
    one, two = raw / "Dataset041_Phantom", raw / "Dataset042_Phantom"
    records = read_clinical(two / "clinical.csv")
    assert [records[f"phantom_00{i}"].tracer[-3:] for i in range(3)] == ["FDG", "SMA", "FDG"]
    for path in one.rglob("*.nii.gz"):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes()
    first, third = (sitk.ReadImage(two / "imagesTr" / f"phantom_00{i}_0001.nii.gz") for i in (0, 2))
    assert first.GetSize() == third.GetSize()
    assert not np.array_equal(sitk.GetArrayViewFromImage(first), sitk.GetArrayViewFromImage(third))


def bad_value(image):
    return image * 2


def half_values(image):
    return sitk.Cast(image, sitk.sitkFloat32) / 2


@pytest.mark.parametrize("name, change, words, complaint", [
    ("fdg_0.nii.gz", bad_value, (), "fdg_0.nii.gz: is no organ map"),
    ("fdg_0.nii.gz", half_values, (), "value 0.5"),
    ("fdg_0.nii.gz", lambda image: image * 0, (), "there are no organ maps"),
    ("fdg_0.txt", None, (), "there are no organ maps"),
    ("patient.nii.gz", lambda image: image, (), "patient.nii.gz: the name says neither fdg nor psma"),
    ("fdg_0.nii.gz", lambda image: image, ("--tracer", "FLT"), "--tracer FLT"),
    ("fdg_0.nii.gz", lambda image: image, ("-n", "0"), "-n 0"),
])  # fmt: skip
def test_mistakes_end_in_one_line(raw, tmp_path, monkeypatch, capsys, name, change, words, complaint):
    maps = tmp_path / "maps"
    maps.mkdir()
    if change:
        write(maps, change(organ_map()), name)
    else:
        (maps / name).write_text("no image", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, capsys, "-d", 41, "--anatomy", maps, *words)
    assert complaint in str(stop.value.code) and "\n" not in str(stop.value.code)
    assert not list(raw.iterdir())


def test_anatomy_and_number_of_cases_belong_together(raw, monkeypatch, capsys):
    for words, complaint in (((), "-n is missing"), (("-n", 1, "--tracer", "FDG"), "--tracer FDG")):
        with pytest.raises(SystemExit, match=complaint):
            run(monkeypatch, capsys, "-d", 41, *words)
    with pytest.raises(SystemExit, match="no organ maps"):
        run(monkeypatch, capsys, "-d", 41, "--anatomy", raw / "nowhere")


@pytest.mark.parametrize("name", ["fdg_010", "psma_003"])
def test_real_map(name):
    """Real organs, whose faults (specks, ends before the field of view) must not show in the body."""
    path = MAPS / f"{name}.nii.gz"
    if not path.exists():
        pytest.skip("the organ maps of autoPET III are not here")
    case = make_labelled_case(path, 0, 3, (8.0, 8.0, 8.0))
    *_, notes = checked_case(case.ct, case.pet, case.lesions)
    assert not notes and case.ct.GetDirection() == sitk.ReadImage(path).GetDirection() == (1, 0, 0, 0, -1, 0, 0, 0, 1)
    body = sitk.GetArrayViewFromImage(case.ct) > -300
    litres = body.sum() * 0.8**3 / 1000
    assert 30 < litres < 140
    assert (case.record.stage is not None) == (case.record.diagnosis == "Hodgkin lymphoma")
