"""fratmae_phantom: patients that are anatomically and physically right, the same on every grid, with a true record."""

import csv
import sys
from functools import cache

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnUNet_raw_conversion.clinical import read_clinical
from nnUNet_raw_conversion.phantom.command import main, make_case
from nnUNet_raw_conversion.phantom.lesions import EXTRANODAL, NODAL, ann_arbor, draw_sites
from nnUNet_raw_conversion.phantom.organs import LABEL, labels_of
from nnUNet_raw_conversion.phantom.render import add_pet_noise
from nnUNet_raw_conversion.phantom.shapes import Grid

SPACING = (9.0, 8.0, 11.0)  # x, y, z
CASES = 24


@cache
def cohort():
    return [make_case(index, 7, SPACING) for index in range(CASES)]


@cache
def fine(index):
    """A case on a grid that resolves organs, for what partial volume would blur."""
    return make_case(index, 7, (4, 4.5, 5))


def with_tracer(tracer, count=1):
    return [index for index, case in enumerate(cohort()) if case.record.tracer == tracer][:count]


def organ_mean(case, image, *organs):
    region = labels_of(*organs)[case.organs] & (case.lesions == 0)
    assert region.any(), organs
    return float(np.median(image[region]))


def centroid(case, *organs):
    """x, y, z in mm of LPS space."""
    z, y, x = (index.mean() for index in np.nonzero(labels_of(*organs)[case.organs]))
    return np.array([x, y, z]) * case.grid.spacing + case.grid.origin


@pytest.mark.parametrize("sites, stage", [
    ([], ""),
    (["cervical left"], "I"),
    (["cervical left", "cervical left"], "I"),
    (["cervical left", "supraclavicular left"], "I"),  # one region of Ann Arbor
    (["inguinal right"], "I"),
    (["cervical left", "cervical right"], "II"),
    (["mediastinal", "hilar left"], "II"),
    (["iliac left", "inguinal left"], "II"),
    (["para-aortic", "mesenteric"], "II"),
    (["mediastinal", "para-aortic"], "III"),
    (["axillary left", "inguinal right"], "III"),
    (["liver"], "IV"),
    (["bone", "mediastinal"], "IV"),
    (["cervical left", "iliac right", "lung"], "IV"),
])  # fmt: skip
def test_stage_follows_ann_arbor(sites, stage):
    assert ann_arbor(sites) == stage


def test_stages_of_lymphoma_are_balanced():
    rng = np.random.default_rng(0)
    stages = [ann_arbor(draw_sites(rng, "Hodgkin lymphoma")) for _ in range(800)]
    assert all(150 < stages.count(stage) < 250 for stage in ("I", "II", "III", "IV"))


def test_disease_sits_where_its_stage_says():
    """The lesions of the volume, seen from the diaphragm, agree with the stage on record."""
    seen = set()
    for case in cohort():
        stage, z = case.record.stage, np.nonzero(case.lesions)[0]
        if stage in ("I", "II", "III"):
            dome = np.nonzero(case.organs == LABEL["liver"])[0].max()
            sides = {"above" if height > dome else "below" for height in z}
            assert len(sides) == (2 if stage == "III" else 1), case.record
            seen.add(stage)
    assert "III" in seen and len(seen) > 1


def test_record_is_true_of_the_volume():
    for case in cohort():
        record = case.record
        assert case.lesions.any() == (record.diagnosis != "negative control")
        assert (record.stage is not None) == (record.diagnosis == "Hodgkin lymphoma")
        assert (case.organs == LABEL["prostate"]).any() == (record.sex == "M")
        assert (case.organs == LABEL["breast"]).any() == (record.sex == "F")
        assert ("PSMA" in record.tracer) <= (record.sex == "M")
    fdg = [case for case in cohort() if case.record.tracer == "18F-FDG"]
    ages = [case.record.age for case in fdg]
    assert np.corrcoef(ages, [organ_mean(case, case.pet, "brain") for case in fdg])[0, 1] < -0.3
    assert np.corrcoef(ages, [organ_mean(case, case.ct, "femora") for case in fdg])[0, 1] < -0.6


def test_everything_follows_from_the_seed():
    first, again, other = (make_case(3, seed, SPACING) for seed in (1, 1, 2))
    assert first.record == again.record
    for name in ("ct", "pet", "lesions", "organs"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert first.pet.shape != other.pet.shape or not np.array_equal(first.pet, other.pet)


def test_spacing_does_not_move_the_patient():
    for index in range(3):
        coarse = cohort()[index]
        assert coarse.record == fine(index).record
        for organ in ("liver", "spleen", "brain", "lung", "kidneys", "bladder", "pelvis", "muscle"):
            shift = np.abs(centroid(coarse, organ) - centroid(fine(index), organ))
            assert shift.max() < min(SPACING) / 2, organ
        volumes = [np.prod(c.grid.spacing) * (c.organs == LABEL["liver"]).sum() for c in (coarse, fine(index))]
        assert volumes[0] == pytest.approx(volumes[1], rel=0.05)


@pytest.mark.parametrize("spacing", [(2.5, 11, 12), (12, 12, 12)])
def test_extreme_spacings_work(spacing):
    case = make_case(0, 7, spacing)
    assert case.ct.shape == case.pet.shape == case.lesions.shape == case.grid.size[::-1]
    assert case.lesions.any() and np.isfinite(case.ct).all()


def test_organs_lie_where_they_belong():
    for case in cohort():
        organs = ("liver", "spleen", "spine", "myocardium", "brain", "bladder")
        x, y, z = np.transpose([centroid(case, organ) for organ in organs])
        midline = x[2]
        assert x[0] < midline - 30 and x[1] > midline + 60 and x[3] > midline + 10  # LPS: x grows to the left
        assert y[2] > y[3] + 40 and y[2] > y[5]  # y grows to the back
        assert z[4] > z[3] > z[0] > z[5]  # z grows to the head
        assert z[4] - z[5] == pytest.approx(715, rel=0.15)  # of real patients, mm
        table = case.ct[:, int((centroid(case, "spine")[1] - case.grid.origin[1]) / SPACING[1]) + 6 :]
        assert (table > -940).any()


def test_hu_classes():
    case = fine(0)
    hu = [organ_mean(case, case.ct, organ) for organ in ("air", "lung", "fat", "bladder", "muscle", "spine", "skull")]
    assert hu == sorted(hu) and hu[0] < -950 and -900 < hu[1] < -700 and -130 < hu[2] < -80
    assert 40 < hu[4] < 70 and hu[5] > 100 and hu[6] > 300


def test_uptake_of_fdg():
    for index in with_tracer("18F-FDG", 3):
        case = fine(index)
        suv = [organ_mean(case, case.pet, organ) for organ in ("bladder", "liver", "blood", "muscle", "fat", "air")]
        assert suv == sorted(suv, reverse=True)
        assert organ_mean(case, case.pet, "brain") > 1.5 * suv[1] > organ_mean(case, case.pet, "lung")
    fdg = [case for case in cohort() if case.record.tracer == "18F-FDG"]
    assert np.mean([case.pet[case.organs > 0].mean() for case in fdg]) == pytest.approx(1, abs=0.15)
    hearts = [organ_mean(case, case.pet, "myocardium") for case in fdg]
    assert max(hearts) > 3 * min(hearts)


@pytest.mark.parametrize("tracer", ["18F-PSMA", "68Ga-PSMA"])
def test_uptake_of_psma(tracer):
    for index in with_tracer(tracer, 2):
        case = fine(index)
        suv = {name: organ_mean(case, case.pet, name) for name in
               ("kidneys", "liver", "parotid glands", "spleen", "blood", "muscle", "brain", "bladder")}  # fmt: skip
        assert suv["kidneys"] > suv["liver"] > suv["blood"] > suv["muscle"] > suv["brain"]
        assert suv["parotid glands"] > 4 * suv["blood"] and suv["spleen"] > suv["blood"]
        assert (suv["liver"] > suv["bladder"]) == (tracer == "18F-PSMA")


def test_a_threshold_is_no_good():
    scores = []
    for case in cohort():
        if case.lesions.any():
            hot, lesion = case.pet > 2.5, case.lesions > 0
            scores.append(2 * (hot & lesion).sum() / (hot.sum() + lesion.sum()))
    assert np.mean(scores) < 0.2


def test_lesions_stand_out_of_the_soft_tissue():
    """All lesions can be seen beside fat and muscle; some are fainter than the liver, some hotter than most organs."""
    ratios = []
    for index, case in enumerate(cohort()[:8]):
        if case.lesions.any():
            lesion = np.percentile(fine(index).pet[fine(index).lesions > 0], 80)
            assert lesion > 1.5 * organ_mean(case, case.pet, "muscle"), case.record
            ratios.append(lesion / organ_mean(case, case.pet, "liver"))
    assert max(ratios) > 2.5


def test_noise_grows_with_the_root_of_activity():
    grid = Grid.covering((0, 0, 0), (200, 150, 160), (5, 4, 4))
    deviation = [
        add_pet_noise(np.full(grid.shape, level, np.float32), 0.1, grid, np.random.default_rng(0)).std()
        for level in (1, 4, 16)
    ]
    assert deviation == pytest.approx([0.1, 0.2, 0.4], rel=0.02)
    image = add_pet_noise(np.ones(grid.shape, np.float32), 0.1, grid, np.random.default_rng(0)) - 1
    assert np.mean(image[..., 1:] * image[..., :-1]) > 0.2 * image.var()  # neighbours are alike


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["fratmae_phantom", *words])
    main()
    return capsys.readouterr().out


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    return tmp_path


def test_dataset_is_one_of_nnunet_and_processes_do_not_matter(raw, monkeypatch, capsys):
    words = ("-n", "3", "--seed", "7", "--spacing", "9", "8", "11")
    said = run(monkeypatch, capsys, "-d", "41", *words, "-np", "1")
    run(monkeypatch, capsys, "-d", "42", *words, "-np", "2")
    assert said.strip().endswith("Next: fratmae_plan_and_preprocess -d 41")
    one, two = raw / "Dataset041_Phantom", raw / "Dataset042_Phantom"
    found = get_filenames_of_train_images_and_targets(str(one))
    assert sorted(found) == ["phantom_000", "phantom_001", "phantom_002"]
    for index, name in enumerate(sorted(found)):
        images = [sitk.ReadImage(path) for path in (*found[name]["images"], found[name]["label"])]
        assert [image.GetPixelIDTypeAsString() for image in images] == [
            "16-bit signed integer", "32-bit float", "8-bit unsigned integer"]  # fmt: skip
        case = cohort()[index]
        for image in images:
            assert image.GetSpacing() == SPACING and image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
            assert image.GetOrigin() == pytest.approx(case.grid.origin)
        assert np.array_equal(sitk.GetArrayViewFromImage(images[1]), case.pet)
        assert np.array_equal(sitk.GetArrayViewFromImage(images[2]), case.lesions)
        assert case.pet.min() >= 0
    records = read_clinical(one / "clinical.csv")
    assert [records[name].tracer for name in sorted(found)] == [case.record.tracer for case in cohort()[:3]]
    assert [row["stage"] for row in csv.DictReader((one / "clinical.csv").open(encoding="utf-8"))] == [
        case.record.stage or "" for case in cohort()[:3]]  # fmt: skip
    for path in one.rglob("*.*"):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path.name


@pytest.mark.parametrize("words, complaint", [
    (("-d", "41", "-n", "0"), "-n 0"),
    (("-d", "41", "-n", "2", "-np", "0"), "-np 0"),
    (("-d", "41", "-n", "2", "--seed", "-1"), "--seed -1"),
    (("-d", "41", "-n", "2", "--spacing", "1", "4", "4"), "--spacing 1 4 4"),
    (("-d", "41", "-n", "2", "--spacing", "4", "nan", "4"), "--spacing 4 nan 4"),
    (("-d", "0", "-n", "2"), "-d 0"),
    (("-d", "77", "-n", "2"), "taken"),
])  # fmt: skip
def test_mistakes_end_in_one_line(raw, monkeypatch, capsys, words, complaint):
    (raw / "Dataset077_Other").mkdir()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, capsys, *words)
    assert complaint in str(stop.value.code) and "\n" not in str(stop.value.code)
    assert sorted(path.name for path in raw.iterdir()) == ["Dataset077_Other"]


def test_environment_must_be_set(monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(SystemExit, match="nnUNet_raw is not set"):
        run(monkeypatch, capsys, "-d", "41", "-n", "1")


def test_every_site_can_be_drawn():
    rng = np.random.default_rng(0)
    diagnoses = ("Hodgkin lymphoma", "melanoma", "lung cancer", "prostate cancer")
    drawn = {site for diagnosis in diagnoses for _ in range(150) for site in draw_sites(rng, diagnosis)}
    assert drawn == NODAL.keys() | EXTRANODAL.keys()
    assert draw_sites(rng, "negative control") == []
