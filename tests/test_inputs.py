"""Studies that are predicted or planned are checked as those that are converted: whole, on one grid, HU and SUVbw."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_fratmae.base.command import UserError
from plans.inputs import check_dataset_images, check_study
from tests.test_convert_pairs import SPACING, study

BOTH = {"channel_names": {"0": "CT", "1": "CT"}, "fratmae": {"modalities": ["CT", "PET"]}, "file_ending": ".nii.gz"}


def edited(name, change):
    def make(images):
        array = change(sitk.GetArrayFromImage(images[name]).astype(np.float32))
        new = sitk.GetImageFromArray(array, isVector=False)
        if new.GetDimension() == 3:
            new.SetSpacing(SPACING)
            new.SetOrigin(images[name].GetOrigin())
        return {**images, name: new}

    return make


def shifted(images):
    ct = sitk.Image(images["CT"])
    ct.SetOrigin(np.add(ct.GetOrigin(), (20, 0, 0)).tolist())
    return {**images, "CT": ct}


def cropped(images):
    return {**images, "CT": images["CT"][1:]}


def some(value, share=0.001):
    def change(array):
        array[np.random.default_rng(0).random(array.shape) < share] = value
        return array

    return change


BAD = {
    "CT with NaN": (edited("CT", some(np.nan)), "NaN"),
    "PET with inf": (edited("PET", some(np.inf)), "NaN or infinite"),
    "PET of zeros": (edited("PET", lambda a: a * 0), "zero everywhere"),
    "CT of zeros": (edited("CT", lambda a: a * 0), "not HU"),
    "CT of air": (edited("CT", lambda a: a * 0 - 1000), "no body"),
    "another origin": (shifted, "not on one grid .voxels lie up to 20 mm apart"),
    "another grid": (cropped, "not on one grid .23x18x21 and 24x18x21 voxels"),
    "4D": (edited("PET", lambda a: np.stack([a, a])), "is 4D with 1 values"),
    "a single slice": (lambda images: {k: v[:, :, 3:4] for k, v in images.items()}, "single slice"),
    "a single voxel": (lambda images: {k: v[3:4, 3:4, 3:4] for k, v in images.items()}, "single slice"),
    "Bq/ml": (edited("PET", lambda a: a * 4000), "Bq/ml"),
    "kBq/ml": (edited("PET", lambda a: a * 3.4), "kBq/ml"),
    "swapped": (lambda images: {"CT": images["PET"], "PET": images["CT"]}, "is this the PET"),
    "another body": (edited("CT", lambda a: np.roll(a, 11, 2)), "disagree"),
}


def write(folder, images, ending=".nii.gz", case="case"):
    folder.mkdir(parents=True, exist_ok=True)
    files = [str(folder / f"{case}_{i:04d}{ending}") for i in range(2)]
    for name, file in zip(("CT", "PET"), files, strict=True):
        sitk.WriteImage(images[name], file)
    return files


def repack(file, change):
    """Change the content of a gzip file."""
    path = Path(file)
    path.write_bytes(gzip.compress(change(bytearray(gzip.decompress(path.read_bytes())))))


def check(files, **options):
    return check_study("case", dict(zip(("CT", "PET"), files, strict=True)), **options)


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
@pytest.mark.parametrize(("change", "said"), BAD.values(), ids=BAD.keys())
def test_a_study_that_cannot_be_is_one_line(change, said, ending, tmp_path):
    images = {name: sitk.Cast(volume, sitk.sitkFloat32) for name, volume in study().items() if name != "SEG"}
    assert check(write(tmp_path, images, ending)) == []
    with pytest.raises(UserError, match=f"^case case: .*{said}") as error:
        check(write(tmp_path, change(images), ending))
    assert "\n" not in str(error.value) and error.value.code


def test_a_file_that_was_cut_off(tmp_path):
    for channel in range(2):
        files = write(tmp_path, study())
        repack(files[channel], lambda content: content[: len(content) // 2])
        with pytest.raises(UserError, match="case_000.*ends too early"):
            check(files)


def test_orientation_counts_as_nnunets_reader_takes_it(tmp_path):
    """The CT stored the other way round is at the same places; only one of nnU-Net's readers turns it back."""
    images = study()
    files = write(tmp_path, {**images, "CT": images["CT"][:, ::-1]})
    assert check(files) == []
    with pytest.raises(UserError, match="not on one grid"):
        check(files, reader="SimpleITKIO")


def dataset(folder, *cases):
    """Studies of a raw dataset, each (name, images, labels)."""
    studies = {}
    for case, images in cases:
        labels = str(folder / f"{case}.nii.gz")
        files = write(folder, images, case=case)
        sitk.WriteImage(images["SEG"], labels)
        studies[case] = (files, labels)
    return studies


def test_a_dataset_is_read_to_the_end_before_it_is_planned(tmp_path, capsys):
    studies = dataset(tmp_path, ("a", study(1)), ("b", study(2)), ("c", study(3)), ("d", study(4)))
    studies["e"] = (studies["d"][0], None)
    check_dataset_images(studies, BOTH, 1)
    assert "WARNING" not in capsys.readouterr().out
    for file in (studies["b"][0][1], studies["c"][1]):
        repack(file, lambda content: content[:-100])
    with pytest.raises(UserError, match=r"^2 of 5 cases cannot be used: case b: .*b_0001.*early.*; case c: .*c\.nii"):
        check_dataset_images(studies, BOTH, 2)


def test_units_of_other_peoples_datasets_are_told_and_taken(tmp_path, capsys):
    z_scores = edited("PET", lambda a: (a - a.mean()) / a.std())(study(1))
    filled = {**study(2), "CT": study(2)["CT"] * 0 - 1024}
    check_dataset_images(dataset(tmp_path, ("a", z_scores), ("b", filled)), BOTH, 1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert line.startswith("WARNING: case a: PET has negative values")
    alone = {"channel_names": {"0": "CT"}, "fratmae": {"modalities": ["PET"]}}
    files, _ = dataset(tmp_path, ("a", study(1)))["a"]
    check_dataset_images({"a": (files[1:], None)}, alone, 1)


def test_what_nnunets_other_readers_read_is_left_to_them(tmp_path):
    """NIfTI-2 and sheared axes are read by NibabelIO, which nnU-Net takes where ITK cannot read."""
    studies = dataset(tmp_path, ("a", study(1)))

    def shear(content):
        struct.pack_into("<h", content, 252, 0)  # no qform
        struct.pack_into("<4f", content, 280, -7, 1, 0, 0)
        return content

    repack(studies["a"][0][1], shear)
    check_dataset_images(studies, BOTH, 1)
    with pytest.raises(UserError, match="sheared by"):
        check(studies["a"][0])
    assert check(studies["a"][0], reader="NibabelIO") == []
