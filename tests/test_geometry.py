"""Grids in space: reading, equality, overlap and resampling against computations done another way."""

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator
from scipy.spatial.transform import Rotation

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.checks import checked_case
from nnUNet_raw_conversion.geometry import (
    canonical,
    overlap_fraction,
    read_image,
    resample_to,
    same_grid,
    target_grid,
)
from nnUNet_raw_conversion.raw_dataset import write_case

# All 48 ways to lay the axes of an image along those of the patient, mirrored ones too.
ORIENTATIONS = [
    np.eye(3)[list(order)] * signs
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
orientations = st.sampled_from(ORIENTATIONS)


def grid(size, spacing, direction=None, centre=(0, 0, 0), values=None):
    """An image of `size` (x, y, z) whose middle lies at `centre` (mm)."""
    direction = np.eye(3) if direction is None else direction
    image = sitk.Image([int(n) for n in size], sitk.sitkFloat32)
    if values is not None:
        image = sitk.GetImageFromArray(np.asarray(values, np.float32).transpose(2, 1, 0))
    image.SetSpacing([float(s) for s in spacing])
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin((np.array(centre) - direction @ ((np.array(size) - 1) / 2 * spacing)).tolist())
    return image


def positions(image):
    """Where the voxels of `image` lie, (X, Y, Z, 3) in mm, one by one from ITK itself."""
    where = [image.TransformIndexToPhysicalPoint(i) for i in np.ndindex(image.GetSize())]
    return np.reshape(where, (*image.GetSize(), 3))


def values(image):
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0)


@settings(max_examples=25, deadline=None)
@given(a=orientations, b=orientations, seed=st.integers(0, 99))
def test_without_smoothing_it_is_linear_interpolation_in_space(a, b, seed):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(7, 8, 9))
    moving = grid((7, 8, 9), (4.5, 4.5, 4.5), a, values=noise)
    reference = grid((6, 5, 11), (4.0, 3.0, 2.0), b, centre=rng.uniform(-8, 8, 3))  # finer: nothing to smooth
    index = np.linalg.solve(a * 4.5, (positions(reference) - moving.GetOrigin())[..., None])[..., 0]
    expected = RegularGridInterpolator([np.arange(n) for n in (7, 8, 9)], noise, bounds_error=False)(index)
    inside, far = np.isfinite(expected), np.any((index < -0.51) | (index > np.array((7, 8, 9)) - 0.49), axis=-1)
    result = values(resample_to(moving, reference, -1024))
    assert result.shape == (6, 5, 11)
    np.testing.assert_allclose(result[inside], expected[inside], atol=1e-4)
    assert np.all(result[far] == -1024)


@settings(max_examples=15, deadline=None)
@given(a=orientations, b=orientations)
def test_a_slope_stays_where_it_is_for_any_orientation(a, b):
    """Smoothing and interpolation leave a linear function of place as it is, unless axes are mistaken."""
    fine = grid((24, 26, 28), (1.0, 1.2, 0.9), a)
    fine = grid((24, 26, 28), (1.0, 1.2, 0.9), a, values=positions(fine) @ (1, 2, 3))
    coarse = grid((4, 5, 6), (3.0, 2.5, 2.0), b)
    np.testing.assert_allclose(values(resample_to(fine, coarse, 0)), positions(coarse) @ (1, 2, 3), atol=0.01)


def test_only_the_finer_axis_is_smoothed_and_to_the_voxel_of_the_reference():
    """A bright plane of a CT of 1 mm gets the FWHM sqrt(4^2 - 1^2) mm along that axis and no other."""
    planes = np.zeros((33, 33, 33))
    planes[16] = 1
    line = values(resample_to(grid((33,) * 3, (1, 4, 4), values=planes), grid((33,) * 3, (4, 4, 4)), 0))[:, 16, 16]
    sigma = np.sqrt(15) / 2.3548
    np.testing.assert_allclose(line[16], 1 / (sigma * np.sqrt(2 * np.pi)), rtol=0.02)
    planes = np.moveaxis(planes, 0, 1)
    line = values(resample_to(grid((33,) * 3, (1, 4, 4), values=planes), grid((33,) * 3, (4, 4, 4)), 0))[16, :, 16]
    np.testing.assert_allclose(line[15:18], [0, 1, 0], atol=1e-6)


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_the_order_of_the_axes_in_a_file_changes_nothing(order):
    """The same noise and the same target voxels, with their axes stored in another order."""
    order = list(order)
    noise = np.random.default_rng(0).normal(size=(20, 21, 22))
    reference = grid((9, 7, 8), (4, 2, 1))
    expected = values(resample_to(grid((20, 21, 22), (1, 1.5, 2), values=noise), reference, 0))
    axes = np.eye(3)[:, order]
    turned = grid(np.array((9, 7, 8))[order], np.array((4, 2, 1))[order], axes)
    result = values(resample_to(grid((20, 21, 22), (1, 1.5, 2), values=noise), turned, 0))
    np.testing.assert_allclose(result, expected.transpose(order), atol=1e-5)
    moving = grid(np.array((20, 21, 22))[order], np.array((1, 1.5, 2))[order], axes, values=noise.transpose(order))
    np.testing.assert_allclose(values(resample_to(moving, reference, 0)), expected, atol=1e-5)


def test_what_the_reference_cannot_show_is_averaged_not_aliased():
    x = np.arange(80)
    wave = np.broadcast_to(np.cos(2 * np.pi * x / 5.3)[:, None, None], (80, 9, 10))  # 5.3 mm: not to be seen at 5 mm
    result = values(resample_to(grid((80, 9, 10), (1, 5, 5), values=wave), grid((12, 7, 8), (5, 5, 5)), 0))
    assert np.abs(result).max() < 0.1


@settings(max_examples=40, deadline=None)
@given(a=orientations, b=orientations, shift=st.tuples(*[st.floats(-80, 80)] * 3))
def test_overlap_is_that_of_boxes_in_space(a, b, shift):
    first, second = grid((10, 12, 14), (3, 4, 5), a), grid((20, 11, 13), (2, 6, 3), b, centre=shift)
    low = np.maximum(-np.abs(a @ (15, 24, 35)), np.array(shift) - np.abs(b @ (20, 33, 19.5)))
    high = np.minimum(np.abs(a @ (15, 24, 35)), np.array(shift) + np.abs(b @ (20, 33, 19.5)))
    expected = np.prod(np.maximum(high - low, 0)) / (30 * 48 * 70)
    assert overlap_fraction(first, second) == pytest.approx(expected, abs=0.07)
    assert overlap_fraction(first, first) == 1


def test_same_grid():
    base = grid((5, 6, 7), (2, 3, 4))
    assert same_grid(base, grid((5, 6, 7), (2.000001, 3, 4), centre=(0.01, 0, 0)))
    turned = np.array([[np.cos(0.01), -np.sin(0.01), 0], [np.sin(0.01), np.cos(0.01), 0], [0, 0, 1]])
    for other in (
        grid((5, 6, 8), (2, 3, 4)),
        grid((5, 6, 7), (2.1, 3, 4)),
        grid((5, 6, 7), (2, 3, 4), centre=(0.2, 0, 0)),
        grid((5, 6, 7), (2, 3, 4), np.diag((1, -1, 1))),
        grid((5, 6, 7), (2, 3, 4), turned),
    ):
        assert not same_grid(base, other)


def test_a_file_is_read_or_named(tmp_path):
    noise = np.random.default_rng(0).normal(size=(5, 6, 7))
    for ending in (".nii.gz", ".nii", ".mha", ".nrrd"):
        whole, cut = tmp_path / f"whole{ending}", tmp_path / f"cut{ending}"
        sitk.WriteImage(grid((5, 6, 7), (2, 3, 4), values=noise), whole)
        np.testing.assert_array_equal(values(read_image(whole)), noise.astype(np.float32))
        for share in (0, 0.1, 0.5, 0.95):
            cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
            with pytest.raises(UserError, match=cut.name):
                read_image(cut)


@pytest.mark.parametrize("image", [sitk.Image(5, 6, sitk.sitkInt16), sitk.Image([5, 6, 7, 2], sitk.sitkInt16),
                                   sitk.Image([5, 6, 7], sitk.sitkVectorFloat32, 3)])  # fmt: skip
def test_an_image_that_is_not_a_scalar_volume_is_named(tmp_path, image):
    sitk.WriteImage(image, tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match=r"a\.nii\.gz.*D with"):
        read_image(tmp_path / "a.nii.gz")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="b.nii.gz"):
        read_image(tmp_path / "b.nii.gz")


def test_a_file_can_be_called_otherwise(tmp_path):
    """Where folders and files have patients' names, messages do not show them."""
    for content in (None, b"", b"x" * 500):
        path = tmp_path / "Mueller.nii.gz"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match="^the CT: ") as error:
            read_image(path, called="the CT")
        assert "Mueller" not in str(error.value) and str(tmp_path) not in str(error.value)


def places(image):
    """Voxels by their place in space, to a thousandth of a mm."""
    where = np.round(positions(image).reshape(-1, 3) + 0.0, 3) + 0.0
    return {tuple(place): value for place, value in zip(where.tolist(), values(image).ravel(), strict=True)}


@pytest.mark.parametrize("index", range(48))
def test_canonical_orientation_moves_no_voxel(index):
    noise = np.random.default_rng(index).normal(size=(3, 4, 5))
    tilted = ORIENTATIONS[index] @ Rotation.from_euler("yz", [(0, 0), (10, -20)][index % 2], True).as_matrix()
    image = grid((3, 4, 5), (2, 3.5, 1.25), tilted, centre=(5, -7, 11), values=noise)
    result = canonical(image)
    axes = np.reshape(result.GetDirection(), (3, 3))
    assert np.all(np.abs(axes).argmax(0) == (0, 1, 2)) and np.all(np.diag(axes) > 0)
    assert places(result) == places(image)


@settings(max_examples=40, deadline=None)
@given(a=orientations, turn=st.tuples(*[st.floats(-180, 180)] * 3), origin=st.tuples(*[st.floats(-2000, 2000)] * 3),
       spacing=st.tuples(*[st.floats(0.5, 6)] * 3))  # fmt: skip
def test_files_are_where_the_images_were(tmp_path_factory, a, turn, origin, spacing):
    """To 0.01 mm for oblique grids at the ends of a body, single precision of NIfTI included; voxels are the same."""
    folder = tmp_path_factory.mktemp("files")
    noise = np.random.default_rng(0).uniform(0, 20, (400, 3, 5)).astype(np.float32)
    pet = grid((400, 3, 5), spacing, a @ Rotation.from_euler("xyz", turn, True).as_matrix(), origin, noise)
    lesions = sitk.Cast(pet > 10, sitk.sitkUInt8)
    ct = sitk.Cast(sitk.Round(pet * 100 - 1000), sitk.sitkInt16)
    names = write_case(folder, "a", ct, pet, lesions)
    assert names == ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz"]
    stored = [sitk.ReadImage(folder / name) for name in names]
    corners = list(itertools.product(*[(0, n - 1) for n in stored[0].GetSize()]))
    for image, original in zip(stored, map(canonical, (ct, pet, lesions)), strict=True):
        assert image.GetPixelID() == original.GetPixelID()
        np.testing.assert_array_equal(values(image), values(original))
        for corner in corners:
            there, expected = (i.TransformIndexToPhysicalPoint(corner) for i in (image, original))
            np.testing.assert_allclose(there, expected, atol=0.01, rtol=0)
        assert image.GetDirection() == stored[0].GetDirection() and image.GetOrigin() == stored[0].GetOrigin()


def test_a_grid_that_nifti_cannot_hold_is_refused(tmp_path):
    pet = grid((5, 6, 7), (2, 3, 4), centre=(1e7 + 0.3, 0, 0))
    with pytest.raises(UserError, match="mm off"):
        write_case(tmp_path, "a", pet, pet, None)
    assert not list(tmp_path.rglob("*.gz"))


@settings(max_examples=25, deadline=None)
@given(a=orientations, b=orientations)
def test_the_grid_to_write(a, b):
    pet = grid((6, 7, 8), (8, 9, 10), a, centre=(10, 20, 30))
    ct = grid((10, 12, 30), (6, 7, 8), b, centre=(12, 19, 30))
    assert same_grid(target_grid(ct, pet, "pet"), canonical(pet))
    free = target_grid(None, pet, "3,7,6")
    assert free.GetSpacing() == (3, 7, 6) and free.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    np.testing.assert_allclose(positions(free).reshape(-1, 3).mean(0), (10, 20, 30), atol=1e-6)
    extent = np.abs(a @ (6 * 8, 7 * 9, 8 * 10))
    size = np.array(free.GetSize())
    assert np.all(size * (3, 7, 6) >= extent - 0.01) and np.all((size - 1) * (3, 7, 6) < extent)
    cut = target_grid(ct, pet, "ct")
    inside = positions(ct).reshape(-1, 3)
    inside = inside[np.all(np.abs(inside - (10, 20, 30)) <= extent / 2 + 0.002, axis=1)]
    assert set(places(cut)) == set(map(tuple, (np.round(inside + 0.0, 3) + 0.0).tolist()))


def test_grids_that_cannot_be(monkeypatch):
    pet = grid((12, 14, 16), (4, 4.5, 5))
    for wrong in ("", "mr", "4", "4,4", "4,4,4,4", "0.5,4,4", "4,4,50", "4;4;4", "nan,4,4"):
        with pytest.raises(UserError, match="--grid"):
            target_grid(pet, pet, wrong)
    with pytest.raises(UserError, match="there is no CT"):
        target_grid(None, pet, "ct")
    with pytest.raises(UserError, match="do not overlap"):
        target_grid(grid((12, 14, 16), (1, 1, 1), centre=(500, 0, 0)), pet, "ct")


def trunk(size, spacing, direction=None):
    """CT, PET and lesion, a ball of 33.5 ml, on one grid."""
    x, y, z = np.moveaxis(positions(grid(size, spacing, direction)), -1, 0)
    body = ((x - 10) / 60) ** 2 + ((y + 6) / 45) ** 2 < 1
    lesion = (x - 20) ** 2 + y**2 + (z - 15) ** 2 < 20**2
    make = (np.where(body, 30, -1000) - 130 * (np.hypot(x, y) < 20), np.where(body, 1, 0.02) + 6 * lesion, lesion)
    ct, pet, lesion = (grid(size, spacing, direction, values=array) for array in make)
    return ct, pet, sitk.Cast(lesion, sitk.sitkUInt8)


@pytest.mark.parametrize("where", ["pet", "ct"])
@pytest.mark.parametrize("chosen", ["pet", "ct", "5,6,7"])
def test_case_on_the_grid_asked_for(where, chosen):
    """CT, PET and lesions, which may be drawn on either grid, meet in space on the third."""
    fine, coarse = trunk((70, 60, 50), (2.5, 2.5, 3)), trunk((28, 25, 24), (7, 6.5, 8), ORIENTATIONS[20])
    lesions = {"pet": coarse, "ct": fine}[where][2]
    ct, pet, lesions, notes = checked_case(fine[0], coarse[1], lesions, chosen)
    assert same_grid(ct, pet) and same_grid(pet, lesions) and same_grid(pet, target_grid(fine[0], coarse[1], chosen))
    assert {"pet": "CT resampled to the PET's grid", "ct": "PET resampled to the CT's grid",
            "5,6,7": "CT resampled to a grid of 5,6,7 mm"}[chosen] in notes  # fmt: skip
    x, y, z = np.moveaxis(positions(pet), -1, 0)
    far = np.abs(np.sqrt((x - 20) ** 2 + y**2 + (z - 15) ** 2) - 20)
    inside = (x - 20) ** 2 + y**2 + (z - 15) ** 2 < 20**2
    np.testing.assert_array_equal(values(lesions)[far > 6], inside[far > 6])
    assert values(lesions).sum() * np.prod(pet.GetSpacing()) == pytest.approx(33510, rel=0.1)
    np.testing.assert_allclose(values(pet)[inside & (far > 12)], 7, atol=0.3)
    body, seen = ((x - 10) / 60) ** 2 + ((y + 6) / 45) ** 2 < 1, (abs(x) < 87) & (abs(y) < 74) & (abs(z) < 74)
    assert np.mean((values(ct) > -300)[seen] == body[seen]) > 0.96


def test_a_ct_that_ends_before_the_pet_is_told():
    ct, pet, lesions = trunk((35, 30, 25), (5, 5, 6))
    said = "the CT ends before the PET, where it is filled with air"
    assert said in checked_case(ct[:, :, 5:], pet, lesions)[3]
    assert said not in checked_case(ct, pet, lesions)[3]


def test_without_a_ct_there_is_air():
    _, pet, lesions = trunk((28, 25, 24), (7, 6.5, 8), ORIENTATIONS[5])
    ct, suv, labels, notes = checked_case(None, pet, lesions)
    assert same_grid(ct, canonical(pet)) and np.all(values(ct) == -1024)
    np.testing.assert_array_equal(values(suv), values(canonical(pet)))
    np.testing.assert_array_equal(values(labels), values(canonical(lesions)))
    assert notes == ["no CT: filled with air (-1024 HU)"]
    for factor, named in ((5000, "Bq/ml"), (0.001, "SUVbw"), (-1, "negative"), (0, "zero")):
        with pytest.raises(UserError, match=named):
            checked_case(None, pet * factor, lesions)


def test_lesions_too_small_for_the_grid_are_told():
    ct, pet, lesions = trunk((70, 60, 50), (2.5, 2.5, 3))
    dot = np.zeros((70, 60, 50))
    dot[30, 30, 30] = 1
    dot = sitk.Cast(grid((70, 60, 50), (2.5, 2.5, 3), values=dot), sitk.sitkUInt8)
    _, _, result, notes = checked_case(ct, pet, dot, "12,12,12")
    assert values(result).sum() == 0 and any("lesion volume" in note for note in notes)
