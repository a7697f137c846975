"""Grids in space: reading, equality, overlap and resampling against computations done another way."""

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from nnUNet_raw_conversion.command import UserError
from nnUNet_raw_conversion.geometry import overlap_fraction, read_image, resample_to, same_grid

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
