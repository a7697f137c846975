"""DICOM SEG, as highdicom writes it, becomes masks on the PET's grid, whatever its order, kind and grid."""

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from highdicom import PixelMeasuresSequence, PlaneOrientationSequence, PlanePositionSequence
from highdicom.seg import Segmentation, SegmentDescription
from pydicom.sr.codedict import codes
from pydicom.uid import RLELossless, generate_uid
from scipy.spatial.transform import Rotation

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.lesions import read_lesions
from nnUNet_raw_conversion.dicom.segmentation import read_segments
from tests.dicom_files import (
    CT_ORIGIN,
    CT_SHAPE,
    CT_SPACING,
    PATIENT,
    PET_ORIGIN,
    PET_SHAPE,
    PET_SPACING,
    lesion,
    positions,
    write_ct,
    write_pet,
)

OBLIQUE = Rotation.from_euler("xyz", [10, -20, 30], degrees=True).as_matrix()


def reference(shape=PET_SHAPE, spacing=PET_SPACING, origin=PET_ORIGIN, direction=None):
    image = sitk.GetImageFromArray(np.random.default_rng(0).random(shape, np.float32))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection((np.eye(3) if direction is None else direction).ravel().tolist())
    return image


def masks(shape=PET_SHAPE, seed=1):
    """Two masks that overlap, with no symmetry; slices 0 to 3 and the last are empty."""
    rng = np.random.default_rng(seed)
    found = rng.random((2, *shape)) < 0.3
    found[:, :4] = found[:, -1] = False
    return found


def headers(files):
    """The slices, with the tags (empty) that highdicom copies into a SEG."""
    slices = [pydicom.dcmread(file) for file in files]
    for one in slices:
        one.AccessionNumber = one.StudyID = one.ReferringPhysicianName = ""
    return slices


def write_seg(path, pixels, sources, labels=("LN left", "Bulk"), kind="BINARY", **more):
    """A SEG of masks (segment, z, y, x) drawn on the slices `sources`."""
    descriptions = [
        SegmentDescription(number, label, codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Neoplasm,
                           algorithm_type="MANUAL")
        for number, label in enumerate(labels[: len(pixels)], 1)
    ]  # fmt: skip
    seg = Segmentation(
        source_images=sources, pixel_array=np.moveaxis(np.asarray(pixels), 0, -1), segmentation_type=kind,
        segment_descriptions=descriptions, series_instance_uid=generate_uid(), series_number=7,
        sop_instance_uid=generate_uid(), instance_number=1, manufacturer="test", manufacturer_model_name="test",
        software_versions="1", device_serial_number="1", **more,
    )  # fmt: skip
    seg.save_as(path)
    return path


@pytest.fixture(scope="module")
def pet(tmp_path_factory):
    return headers(write_pet(tmp_path_factory.mktemp("pet")))


def frame_of(sources):
    return str(sources[0].FrameOfReferenceUID)


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
@pytest.mark.parametrize("sparse", [True, False])
def test_on_the_pets_own_grid_it_is_copied(tmp_path, pet, kind, sparse):
    expected = masks()
    order = np.random.default_rng(3).permutation(len(pet))  # frames in any order
    file = write_seg(tmp_path / "seg", expected[:, order].astype(float if kind == "FRACTIONAL" else np.uint8),
                     [pet[i] for i in order], kind=kind, omit_empty_frames=sparse)  # fmt: skip
    found = read_segments(file, reference(), frame_of(pet))
    assert [name for name, _ in found] == ["LN left", "Bulk"]
    for (_, mask), truth in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mask, truth)
        assert mask.dtype == bool


def test_a_compressed_one(tmp_path, pet):
    expected = masks()[:1]
    file = write_seg(tmp_path / "seg", expected.astype(float), pet, kind="FRACTIONAL", transfer_syntax_uid=RLELossless)
    np.testing.assert_array_equal(read_segments(file, reference())[0][1], expected[0])


def test_a_labelmap(tmp_path, pet):
    first, second = masks()
    expected = [first & ~second, second]
    file = write_seg(tmp_path / "seg", expected, pet, kind="LABELMAP")
    for (_, mask), truth in zip(read_segments(file, reference()), expected, strict=True):
        np.testing.assert_array_equal(mask, truth)


@pytest.mark.parametrize("greatest", [255, 200])
def test_fractions_count_from_one_half(tmp_path, pet, greatest):
    fractions = np.zeros(PET_SHAPE)
    fractions[5, 3, 2:7] = 0.2, 0.49, 0.5 + 1 / greatest, 0.8, 1
    file = write_seg(tmp_path / "seg", fractions[None], pet, kind="FRACTIONAL", fractional_type="PROBABILITY",
                     max_fractional_value=greatest)  # fmt: skip
    np.testing.assert_array_equal(read_segments(file, reference())[0][1], fractions > 0.5)


@pytest.mark.parametrize("turn", [(0, 0, 1), (1, 1, 0), (0, 1, 0)])
def test_on_an_image_stored_the_other_way_round(tmp_path, pet, turn):
    file = write_seg(tmp_path / "seg", masks(), pet)
    flipped = sitk.PermuteAxes(sitk.Flip(reference(), [bool(t) for t in turn]), [2, 0, 1])
    for (_, mask), truth in zip(read_segments(file, flipped), masks(), strict=True):
        image = reference()
        truth = sitk.GetImageFromArray(truth.astype(np.uint8))
        truth.CopyInformation(image)
        truth = sitk.PermuteAxes(sitk.Flip(truth, [bool(t) for t in turn]), [2, 0, 1])
        np.testing.assert_array_equal(mask, sitk.GetArrayFromImage(truth) > 0)


def test_of_an_oblique_series(tmp_path):
    sources = headers(write_pet(tmp_path / "pet", direction=OBLIQUE))
    file = write_seg(tmp_path / "seg", masks(), sources)
    found = read_segments(file, reference(direction=OBLIQUE))
    np.testing.assert_array_equal([mask for _, mask in found], masks())


def test_slices_that_are_not_quite_evenly_spaced(tmp_path):
    """As GE writes them, 3.19 to 3.29 mm apart; a tenth of a slice or so in all."""
    shift = np.cumsum(np.random.default_rng(0).choice([0.02, -0.08, 0.02, 0.02], PET_SHAPE[0]))
    places = [{"ImagePositionPatient": [*PET_ORIGIN[:2], f"{PET_ORIGIN[2] + 6.5 * i + s:.3f}"]}
              for i, s in enumerate(shift)]  # fmt: skip
    sources = headers(write_pet(tmp_path / "pet", per_slice=places))
    file = write_seg(tmp_path / "seg", masks(), sources)
    np.testing.assert_array_equal([mask for _, mask in read_segments(file, reference())], masks())


def test_one_drawn_on_the_ct_is_sampled_at_the_pets_voxels(tmp_path):
    sources = headers(write_ct(tmp_path / "ct"))
    drawn = lesion(positions(CT_SHAPE, CT_SPACING, CT_ORIGIN))
    origin = np.array(PET_ORIGIN) + 0.3  # no voxel half-way between two of the CT
    ((_, mask),) = read_segments(write_seg(tmp_path / "seg", drawn[None], sources), reference(origin=origin.tolist()))
    index = np.rint((positions(PET_SHAPE, PET_SPACING, origin) - CT_ORIGIN) / CT_SPACING).astype(int)
    inside = np.all((index >= 0) & (index < CT_SHAPE[::-1]), axis=-1)
    x, y, z = np.moveaxis(np.where(inside[..., None], index, 0), -1, 0)
    np.testing.assert_array_equal(mask, drawn[z, y, x] & inside)
    assert mask.any()


def test_a_single_frame_and_slices_between_frames_are_empty(tmp_path, pet):
    expected = np.zeros((1, *PET_SHAPE), bool)
    for slices in ([9], [3, 9, 10]):
        expected[:, slices, 4:9, 5:7] = True
        file = write_seg(tmp_path / "seg", expected, pet)
        np.testing.assert_array_equal(read_segments(file, reference())[0][1], expected[0])


def test_an_empty_segment_is_an_empty_mask(tmp_path, pet):
    expected = masks()
    expected[1] = False
    found = read_segments(write_seg(tmp_path / "seg", expected, pet), reference())
    np.testing.assert_array_equal([mask for _, mask in found], expected)


def test_on_a_part_of_the_image(tmp_path, pet):
    """The frames need not be as large as the image: here a box of it, given by its own positions."""
    box = masks()[:1, 6:12, 5:15, 8:20]
    corner = np.array(PET_ORIGIN) + np.array([8, 5, 0]) * PET_SPACING
    places = [PlanePositionSequence("PATIENT", [*corner[:2], PET_ORIGIN[2] + PET_SPACING[2] * z]) for z in range(6, 12)]
    file = write_seg(
        tmp_path / "seg", box, pet[6:12], plane_positions=places,
        plane_orientation=PlaneOrientationSequence("PATIENT", [1, 0, 0, 0, 1, 0]),
        pixel_measures=PixelMeasuresSequence([PET_SPACING[1], PET_SPACING[0]], PET_SPACING[2]),
    )  # fmt: skip
    expected = np.zeros(PET_SHAPE, bool)
    expected[6:12, 5:15, 8:20] = box[0]
    np.testing.assert_array_equal(read_segments(file, reference())[0][1], expected)


def refused(call, *args):
    with pytest.raises(UserError) as error:
        call(*args)
    message = str(error.value)
    assert "\n" not in message
    for secret in (PATIENT, "Muster", "pytest", "1.2.8"):
        assert secret not in message
    return message


def test_another_frame_of_reference_is_refused(tmp_path, pet):
    file = write_seg(tmp_path / "seg", masks(), pet)
    assert "frame of reference" in refused(read_segments, file, reference(), generate_uid())
    assert len(read_segments(file, reference(), "")) == 2


def test_outside_of_the_image_is_refused(tmp_path, pet):
    file = write_seg(tmp_path / "seg", masks(), pet)
    assert "'LN left' lies wholly outside" in refused(read_segments, file, reference(origin=(500.0, 0, 0)))


def test_damaged_files_are_refused(tmp_path, pet):
    file = write_seg(tmp_path / "Muster_Erika", masks(), pet)
    content = file.read_bytes()
    for size in np.linspace(0, len(content) - 10, 12).astype(int):
        file.write_bytes(content[:size])
        assert "DICOM SEG" in refused(read_segments, file, reference())
    pet[0].save_as(file)
    assert "no SEG" in refused(read_segments, file, reference())
    refused(read_segments, tmp_path / "missing", reference())


def test_union_and_table(tmp_path, pet):
    expected = masks()
    labels = ("LN^left", "Liver")
    file = write_seg(tmp_path / "seg", expected, pet, labels)
    image = reference()
    lesions, rows = read_lesions([("SEG", file)], image, frame_of(pet))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(lesions), expected[0])
    assert [(r.name, r.kept) for r in rows] == [("LN_left", True), ("Liver", False)]
    assert rows[0].voxels == expected[0].sum()
    assert rows[0].suv_max == pytest.approx(sitk.GetArrayFromImage(image)[expected[0]].max())
    lesions, _ = read_lesions([("SEG", file)], image, frame_of(pet), "ln|liver")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(lesions), expected.any(0))


def test_highdicom_reads_what_is_written_here(tmp_path, pet):
    """That the tests' files are what other software takes for a SEG."""
    seg = highdicom.seg.segread(write_seg(tmp_path / "seg", masks(), pet))
    volume = seg.get_volume(segment_numbers=[1])
    assert volume.array.sum() == masks()[0].sum()


def without(file, *keywords):
    """The file without some attributes, wherever they stand."""

    def strip(dataset):
        for keyword in keywords:
            dataset.pop(keyword, None)
        for element in dataset:
            for item in element.value if element.VR == "SQ" else ():
                strip(item)

    dataset = pydicom.dcmread(file)
    strip(dataset)
    dataset.save_as(file)
    return file


@pytest.mark.parametrize(
    "keywords",
    [
        ["SliceThickness"],
        ["SegmentedPropertyCategoryCodeSequence", "SegmentedPropertyTypeCodeSequence"],
        ["SegmentAlgorithmType", "SegmentAlgorithmName"],
        ["DimensionIndexSequence", "DimensionIndexValues", "DimensionOrganizationSequence"],
        ["PixelMeasuresSequence", "PlaneOrientationSequence"],
        ["SegmentsOverlap", "ContentLabel", "ContentCreatorName", "ReferencedSeriesSequence", "FrameContentSequence"],
        ["SegmentationType"],
        ["SegmentLabel"],
    ],
)
def test_one_that_lacks_what_is_not_needed_is_read(tmp_path, pet, keywords):
    expected = masks()
    file = without(write_seg(tmp_path / "seg", expected, pet), *keywords)
    for (_, mask), truth in zip(read_segments(file, reference()), expected, strict=True):
        np.testing.assert_array_equal(mask, truth)


def test_geometry_in_the_header_itself(tmp_path, pet):
    file = write_seg(tmp_path / "seg", masks()[:1], pet)
    dataset = pydicom.dcmread(file)
    measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    dataset.PixelSpacing, dataset.ImageOrientationPatient = measures.PixelSpacing, [1, 0, 0, 0, 1, 0]
    del dataset.SharedFunctionalGroupsSequence
    dataset.save_as(file)
    [(_, mask)] = read_segments(file, reference())
    np.testing.assert_array_equal(mask, masks()[0])


@pytest.mark.parametrize(
    ("keyword", "tag"),
    [("ImagePositionPatient", "(0020,0032)"), ("PerFrameFunctionalGroupsSequence", "(5200,9230)"),
     ("SegmentSequence", "(0062,0002)"), ("SegmentIdentificationSequence", "ReferencedSegmentNumber (0062,000b)")],
)  # fmt: skip
def test_what_is_missing_is_named(tmp_path, pet, keyword, tag):
    file = without(write_seg(tmp_path / "seg", masks(), pet), keyword)
    assert f"{tag} is missing" in refused(read_segments, file, reference())


def test_pixel_size_is_not_guessed_on_another_grid(tmp_path, pet):
    file = without(write_seg(tmp_path / "seg", masks(), pet), "PixelMeasuresSequence")
    other = reference(shape=(20, 30, 40))
    assert "PixelSpacing (0028,0030) is missing" in refused(read_segments, file, other)
