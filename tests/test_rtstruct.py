"""Contours become the voxels whose centre they enclose, however they are drawn; bad RTSTRUCTs end in one line."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from scipy.spatial.transform import Rotation
from skimage.measure import points_in_poly

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.lesions import read_lesions
from nnUNet_raw_conversion.dicom.names import select_rois, shown_name
from nnUNet_raw_conversion.dicom.rtstruct import Roi, rasterise, read_rois, share_inside

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
FRAME, OTHER_FRAME = "1.2.826.0.1.4711", "1.2.826.0.1.4712"
PATIENT = "Muster^Erika"
SIZE, SPACING = (31, 26, 22), (4.0, 5.0, 3.0)  # x, y, z


def grid(size=SIZE, spacing=SPACING, direction=None, centre=(0, 0, 0)):
    """An empty image around `centre`; the columns of `direction` are its axes x, y, z."""
    image = sitk.Image(list(size), sitk.sitkFloat32)
    image.SetSpacing(spacing)
    direction = np.eye(3) if direction is None else direction
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin((np.array(centre) - direction @ ((np.array(size) - 1) / 2 * spacing)).tolist())
    return image


def centres(image):
    """Positions in mm of all voxels, (z, y, x, 3)."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in image.GetSize()[::-1]], indexing="ij"), -1)[..., ::-1]
    matrix = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    return index @ matrix.T + image.GetOrigin()


def heights(image):
    """z of the slices of an axial image."""
    return centres(image)[:, 0, 0, 2]


def polygon(z, *corners):
    return np.array([(*corner, z) for corner in corners], float)


def box(z, x0, x1, y0, y1):
    return polygon(z, (x0, y0), (x1, y0), (x1, y1), (x0, y1))


def circle(z, radius, x=0.0, y=0.0, points=90):
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False) + 0.03
    return np.column_stack([x + radius * np.cos(angle), y + radius * np.sin(angle), np.full(points, z)])


def ball(radius, centre, gap, offset=0.0):
    """Contours of a ball on the planes z = offset + n * gap."""
    z = np.arange(np.ceil((centre[2] - radius - offset) / gap), np.floor((centre[2] + radius - offset) / gap) + 1)
    z = z * gap + offset
    return [circle(h, np.sqrt(radius**2 - (h - centre[2]) ** 2), *centre[:2]) for h in z]


def roi(contours, gap=3.0, **more):
    return Roi(1, "GTV", "", FRAME, tuple(contours), gap=gap, **more)


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def write_rtstruct(path, rois, frame=FRAME, **tags):
    """An RTSTRUCT of {name: contours}; a contour is an array (N, 3) or (array, ContourGeometricType)."""
    dataset = pydicom.Dataset()
    dataset.Modality, dataset.SOPClassUID, dataset.SOPInstanceUID = "RTSTRUCT", "1.2.840.10008.5.1.4.1.1.481.3", "1.2.3"
    dataset.PatientName, dataset.PatientID = PATIENT, "PID-4711"
    dataset.StructureSetROISequence, dataset.ROIContourSequence, dataset.RTROIObservationsSequence = [], [], []
    for number, (name, contours) in enumerate(rois.items(), 5):
        names, drawn, observed = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        names.ROINumber, names.ROIName, names.ReferencedFrameOfReferenceUID = number, name, frame
        drawn.ReferencedROINumber = observed.ReferencedROINumber = number
        observed.RTROIInterpretedType = "PTV" if name == "boost" else ""
        drawn.ContourSequence = []
        for contour in contours:
            points, kind = contour if isinstance(contour, tuple) else (contour, "CLOSED_PLANAR")
            item = pydicom.Dataset()
            item.ContourGeometricType, item.NumberOfContourPoints = kind, len(points)
            item.ContourData = [f"{value:.4f}" for value in np.ravel(points)]
            drawn.ContourSequence.append(item)
        dataset.StructureSetROISequence.append(names)
        dataset.RTROIObservationsSequence.append(observed)
        if contours:
            dataset.ROIContourSequence.append(drawn)
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.save_as(path, enforce_file_format=True)
    return path


# The reference masks


@pytest.mark.skipif(not (REAL / "sts_dicom").is_dir(), reason="needs shared/data")
@pytest.mark.parametrize("patient", ["STS_002", "STS_003", "STS_008", "STS_019"])
def test_ibsi_masks_of_the_pet_contours(patient):
    expected = sitk.ReadImage(str(REAL / "sts_petct" / patient / "SEG.nii.gz"))
    (gtv,) = read_rois(REAL / "sts_dicom" / patient / "PET" / "mask" / "RS.dcm")
    assert (gtv.name, gtv.kind, round(gtv.gap, 2)) == ("GTV_Mass_PET", "GTV", 3.27)
    np.testing.assert_array_equal(rasterise(gtv, expected), sitk.GetArrayFromImage(expected) > 0)


@pytest.mark.skipif(not (REAL / "sts_dicom").is_dir(), reason="needs shared/data")
@pytest.mark.parametrize("patient", ["STS_002", "STS_003", "STS_008"])  # CT and PET of STS_019 are 6 mm apart
def test_ibsi_masks_of_the_ct_contours(patient):
    expected = sitk.ReadImage(str(REAL / "sts_petct" / patient / "SEG.nii.gz"))
    mask = rasterise(read_rois(REAL / "sts_dicom" / patient / "CT" / "mask" / "RS.dcm")[0], expected)
    truth = sitk.GetArrayFromImage(expected) > 0
    assert dice(mask, truth) > 0.99
    assert abs(mask.sum() / truth.sum() - 1) < 0.02


@pytest.mark.skipif(not (REAL / "wholebody_fdg_dicom").is_dir(), reason="needs shared/data")
def test_ibsi_mask_of_the_whole_body():
    """IBSI's crop begins at voxel (59, 45, 0); the slices of the scanner are 3.19 to 3.29 mm apart."""
    folder = REAL / "wholebody_fdg_dicom" / "STS_001"
    slices = [pydicom.dcmread(file, stop_before_pixels=True) for file in (folder / "image").iterdir()]
    z = sorted(float(s.ImagePositionPatient[2]) for s in slices)
    pet = sitk.Image(128, 128, len(z), sitk.sitkFloat32)
    pet.SetSpacing((4.6875, 4.6875, (z[-1] - z[0]) / (len(z) - 1)))
    pet.SetOrigin((*map(float, slices[0].ImagePositionPatient[:2]), z[0]))
    expected = sitk.ReadImage(str(REAL / "sts_petct" / "STS_001" / "SEG.nii.gz"))
    lesions, rows = read_lesions([("RTSTRUCT", folder / "mask" / "1-1.dcm")], pet, "")
    x, y, depth = expected.GetSize()
    crop = sitk.GetArrayFromImage(lesions)[:depth, 45 : 45 + y, 59 : 59 + x]
    np.testing.assert_array_equal(crop, sitk.GetArrayFromImage(expected))
    assert crop.sum() == sitk.GetArrayFromImage(lesions).sum()
    assert [(row.name, row.kept) for row in rows] == [("GTV_Mass", True), ("GTV_Edema", False)]


# The centre rule


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(0, 1, 2), (1, 2, 0), (2, 0, 1), (1, 0, 2)]))
def test_voxels_whose_centre_is_inside(seed, axes):
    """Any polygon, on an image whose axes are any of the contours' axes, turned around anyhow."""
    rng = np.random.default_rng(seed)
    turn = Rotation.random(random_state=seed).as_matrix()
    direction = turn @ np.eye(3)[:, list(axes)] * rng.choice([-1, 1], 3)
    image = grid(direction=direction, centre=rng.uniform(-300, 300, 3))
    size = np.array(SIZE)[np.argsort(axes)]
    local = centres(image) @ turn  # in the axes of the contours
    across = np.unique(local[..., 2].round(6))
    assert len(across) == size[2]
    corners = local.reshape(-1, 3).mean(0)[:2] + rng.uniform(-45, 45, (rng.integers(3, 12), 2))  # may cross itself
    k = rng.integers(len(across))
    mask = rasterise(roi([polygon(across[k], *corners) @ turn.T], gap=np.diff(across)[0]), image)
    inside = points_in_poly(local[..., :2].reshape(-1, 2), corners).reshape(mask.shape)
    np.testing.assert_array_equal(mask, inside & (np.abs(local[..., 2] - across[k]) < 0.01))


@pytest.mark.parametrize(("spacing", "gap"), [((4.0, 5.0, 3.0), 3.0), ((4.0, 4.4, 3.0), 1.25), ((4.0, 3.6, 5.0), 3.0)])
@pytest.mark.parametrize("radius", [9, 20])
def test_volume_of_a_ball_is_right_on_the_mean(spacing, gap, radius):
    rng = np.random.default_rng(1)
    image = grid(spacing=spacing)
    volumes = []
    for _ in range(40):
        contours = ball(radius, rng.uniform(-5, 5, 3), gap, rng.uniform(0, gap))
        volumes.append(rasterise(roi(contours, gap), image).sum() * np.prod(spacing))
    assert np.mean(volumes) == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.03)


def test_volume_of_a_cylinder_between_thin_and_thick_slices():
    """20 contours 3 mm apart are 60 mm, on whatever slices."""
    contours = [circle(-28.5 + 3 * i, 20) for i in range(20)]
    for thickness, count in ((1.0, 81), (6.0, 15), (3.0, 30)):
        spacing, size = (2.0, 1.5, thickness), (31, 40, count)
        volume = rasterise(roi(contours), grid(size, spacing)).sum() * np.prod(spacing)
        assert volume == pytest.approx(np.pi * 20**2 * 60, rel=0.02), spacing


# Holes


# no border runs through the centres of voxels
SQUARE, INNER, ISLAND = (-41, 42, -41, 43), (-21, 19, -26, 21), (-9, 9, -8, 12)


def slice_of(contours, xor=False):
    """The mask of contours at height `z`, which must be in that slice only, and the x and y of its voxels."""
    image = grid()
    mask = rasterise(roi(contours, xor=xor), image)
    assert mask.any(axis=(1, 2)).nonzero()[0].tolist() == [12]
    x, y = np.moveaxis(centres(image)[12, ..., :2], -1, 0)
    return mask[12], lambda x0, x1, y0, y1: (x > x0) & (x < x1) & (y > y0) & (y < y1)


Z = heights(grid())[12]


def test_a_contour_within_a_contour_is_a_hole_and_one_in_the_hole_an_island():
    mask, within = slice_of([box(Z, *ISLAND), box(Z, *SQUARE), box(Z, *INNER)[::-1]])
    np.testing.assert_array_equal(mask, within(*SQUARE) & ~within(*INNER) | within(*ISLAND))


def keyhole(z):
    """The square with the inner one cut out, in one contour."""
    x0, x1, y0, y1 = SQUARE
    a0, a1, b0, b1 = INNER
    return polygon(z, (0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0), (0, y0),
                   (0, b0), (a0, b0), (a0, b1), (a1, b1), (a1, b0), (0, b0))  # fmt: skip


def test_a_keyhole_is_a_hole():
    for points in (keyhole(Z), keyhole(Z)[::-1]):
        mask, within = slice_of([points])
        np.testing.assert_array_equal(mask, within(*SQUARE) & ~within(*INNER))


def test_the_channel_of_a_keyhole_does_not_show_between_planes():
    larger = (1.23, 1.23, 1)
    nested = [box(-6, *SQUARE), box(-6, *INNER), box(6, *SQUARE) * larger, box(6, *INNER) * larger]
    image = grid()
    np.testing.assert_array_equal(
        rasterise(roi([keyhole(-6), keyhole(6) * larger], 12), image), rasterise(roi(nested, 12), image)
    )


def test_overlapping_contours_are_united_but_xor_ones_are_not():
    other = (10, 60, 0, 45)
    mask, within = slice_of([box(Z, *SQUARE), box(Z, *other)])
    np.testing.assert_array_equal(mask, within(*SQUARE) | within(*other))
    mask, within = slice_of([box(Z, *SQUARE), box(Z, *other)], xor=True)
    np.testing.assert_array_equal(mask, within(*SQUARE) ^ within(*other))


def test_a_contour_stored_twice_counts_once():
    twice = [box(Z, *SQUARE), np.roll(box(Z, *SQUARE), 1, 0)]
    mask, within = slice_of(twice)
    np.testing.assert_array_equal(mask, within(*SQUARE))
    other = [circle(Z + 10, 25)]
    once = rasterise(roi(twice[:1] + other, 10), grid())
    np.testing.assert_array_equal(rasterise(roi(twice + other, 10), grid()), once)


def test_several_contours_in_a_slice():
    left, right = (-50, -20, -30, 5), (10, 50, -10, 40)
    mask, within = slice_of([box(Z, *left), box(Z + 0.03, *right)])
    np.testing.assert_array_equal(mask, within(*left) | within(*right))


# Contours off the slices


def test_shapes_change_gradually_between_planes():
    image = grid((61, 61, 21), (1.0, 1.1, 1.0))
    mask = rasterise(roi([circle(-10, 10), circle(10, 20)], 20), image)
    radii = [np.sqrt(s.sum() * 1.1 / np.pi) for s in mask]
    assert radii == pytest.approx(np.linspace(10, 20, 21).tolist(), abs=1.1)  # the outer tenths are the contours'
    assert np.all(np.diff(radii) >= 0)


def test_a_ball_between_coarse_planes():
    image = grid((45, 41, 51), (2.0, 2.2, 2.0))
    mask = rasterise(roi(ball(30, (1, 2, 3), 5, 0.7), 5), image)
    assert dice(mask, np.linalg.norm(centres(image) - (1, 2, 3), axis=-1) < 30) > 0.98


def test_thin_slices_between_and_beyond_the_contours_are_filled():
    image = grid((31, 26, 41), (4.0, 5.0, 1.0))  # slices at -20, -19, ... 20
    mask = rasterise(roi([box(z, *SQUARE) for z in (-5, 0, 5)], 5), image)
    assert heights(image)[mask.any(axis=(1, 2))].tolist() == list(range(-7, 8))


def test_thick_slices_take_one_contour_not_several():
    image = grid((31, 26, 11), (4.0, 5.0, 6.0))  # slices at -30, -24, ... 30
    steps = [box(z, -40, 6 * z + 4, -40, 40) for z in range(-7, 8)]
    mask = rasterise(roi(steps, 1), image)
    widths = [row.sum() * 4 for row in mask[:, 12]]
    assert [round(w) for w in widths] == [0, 0, 0, 0, 8, 44, 80, 0, 0, 0, 0]


def test_what_was_not_drawn_stays_empty():
    """Two lesions of one ROI above each other, and one of a single contour, are not joined."""
    image = grid()
    z = heights(image)
    drawn = [2, 3, 4, 7, 8, 9, 18]
    mask = rasterise(roi([box(z[i], *SQUARE) for i in drawn], None), image)
    assert mask.any(axis=(1, 2)).nonzero()[0].tolist() == drawn


def test_a_skipped_slice_is_noted(tmp_path):
    z = heights(grid())
    file = write_rtstruct(tmp_path / "rs", {
        "one": [box(z[i], *SQUARE) for i in (2, 3, 4, 6, 7)], "two": [box(z[i], *SQUARE) for i in (2, 3, 4, 15, 16)],
        "even": [box(z[i], *SQUARE) for i in (2, 4, 6)],
    })  # fmt: skip
    one, two, even = read_rois(file)
    assert one.notes == ("1 times a contour or two are missing between others; left empty",)
    assert two.notes == even.notes == ()
    assert rasterise(even, grid()).any(axis=(1, 2)).nonzero()[0].tolist() == [1, 2, 3, 4, 5, 6]  # half-open


def test_a_part_that_ends_between_planes_ends_half_way():
    image = grid((61, 26, 41), (2.0, 5.0, 1.0))
    small, large = (-52, -44, -10, 10), (0, 50, -40, 40)
    mask = rasterise(roi([box(0, *small), *(box(z, *large) for z in (-6, 0, 6))], 6), image)
    x = centres(image)[0, 0, :, 0]
    assert heights(image)[mask[:, :, x < -30].any(axis=(1, 2))].tolist() == list(range(-3, 3))


@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 1, 0), (1, 2, 3)])
def test_contours_on_tilted_planes(axis):
    """As on a CT with tilted gantry: the planes are not the image's."""
    turn = Rotation.from_rotvec(np.deg2rad(20) * np.array(axis) / np.linalg.norm(axis)).as_matrix()
    contours = [points @ turn.T for points in ball(24, (5, -3, 2), 3, 0.4)]
    image = grid()
    truth = np.linalg.norm(centres(image) - turn @ (5, -3, 2), axis=-1) < 24
    mask = rasterise(roi(contours), image)
    assert dice(mask, truth) > 0.97
    assert mask.sum() == pytest.approx(truth.sum(), rel=0.03)


def test_the_part_outside_of_the_image_is_cut_off():
    image = grid()
    contours = [box(z, 30, 300, -500, 0) for z in heights(image)]
    mask = rasterise(roi(contours), image)
    np.testing.assert_array_equal(mask, (centres(image)[..., 0] > 30) & (centres(image)[..., 1] < 0))
    assert 0 < share_inside(roi(contours), image) < 1


def test_smaller_than_a_voxel_is_empty():
    assert not rasterise(roi([circle(heights(grid())[4], 0.8, 2.0, 2.5)]), grid()).any()


# Files


def test_reading_passes_over_what_is_no_closed_contour(tmp_path):
    closed = box(3, *SQUARE)
    file = write_rtstruct(tmp_path / "rs", {
        "node": [closed, (closed[:1], "POINT"), (closed, "OPEN_PLANAR"), (closed, "OPEN_NONPLANAR"), closed[:2],
                 box(6, *SQUARE)],
        "marker": [(closed[:1], "POINT")], "nothing": [], "ring": [(closed, "CLOSEDPLANAR_XOR")],
    })  # fmt: skip
    node, marker, nothing, ring = read_rois(file)
    assert [len(r.contours) for r in (node, marker, nothing, ring)] == [2, 0, 0, 1]
    assert node.notes == ("4 points or open contours passed over",)
    assert (node.number, node.name, node.frame_uid, node.gap) == (5, "node", FRAME, 3)
    assert ring.xor and not node.xor
    assert ring.gap == 3  # of one plane; as the other ROIs of the file
    with pytest.raises(UserError, match="'nothing' has no closed contours"):
        rasterise(nothing, grid())


def test_a_repeated_first_point_changes_nothing(tmp_path):
    contour = box(heights(grid())[3], *SQUARE)
    first, second = read_rois(write_rtstruct(tmp_path / "rs", {"a": [contour], "b": [np.r_[contour, contour[:1]]]}))
    np.testing.assert_array_equal(rasterise(first, grid()), rasterise(second, grid()))


def refused(call, *args):
    with pytest.raises(UserError) as error:
        call(*args)
    message = str(error.value)
    assert "\n" not in message
    for secret in ("Muster", "Erika", "4711", "4712", "pytest", "1.2.8"):
        assert secret not in message
    return message


@pytest.mark.parametrize(
    ("contours", "frame", "what"),
    [
        ([box(0, *SQUARE)], OTHER_FRAME, "another frame of reference"),
        ([box(500, *SQUARE)], FRAME, "wholly outside"),
        ([box(0, 200, 300, 0, 10)], FRAME, "wholly outside"),
        ([], FRAME, "no closed contours"),
        ([np.array([(0, 0, 0), (30, 0, 20), (30, 45, -5), (7, 8, 9)]), box(0, *SQUARE)], FRAME, "not flat"),
        ([box(0, *SQUARE), box(0, *SQUARE)[:, [2, 0, 1]]], FRAME, "several directions"),
    ],
)
def test_contours_that_are_refused(contours, frame, what):
    assert what in refused(rasterise, Roi(1, "GTV", "", FRAME, tuple(contours)), grid(), frame)


def test_frames_of_reference_are_compared_where_known():
    assert rasterise(roi([box(0, *SQUARE)]), grid(), "").any()
    assert rasterise(roi([box(0, *SQUARE)]), grid(), FRAME).any()


def test_files_cut_off_anywhere_are_refused(tmp_path):
    """Or give all contours, where only the last observations are cut off."""
    file = write_rtstruct(tmp_path / "Muster_Erika.dcm", {f"GTV {i}": ball(20, (i, 0, 0), 3) for i in range(3)})
    content, whole = file.read_bytes(), read_rois(file)
    for size in np.linspace(0, len(content) - 1, 50).astype(int):
        file.write_bytes(content[:size])
        if size < len(content) - 500:
            assert "RTSTRUCT" in refused(read_rois, file)
            continue
        for roi, expected in zip(read_rois(file), whole, strict=True):
            np.testing.assert_array_equal(np.concatenate(roi.contours), np.concatenate(expected.contours))


def damage(file, change):
    dataset = pydicom.dcmread(file)
    change(dataset)
    dataset.save_as(file)


def remove(keyword):
    return lambda dataset: delattr(dataset, keyword)


def first_contour(**tags):
    def change(dataset):
        for keyword, value in tags.items():
            setattr(dataset.ROIContourSequence[0].ContourSequence[0], keyword, value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        remove("ROIContourSequence"), remove("StructureSetROISequence"), remove("Modality"),
        first_contour(NumberOfContourPoints=77), first_contour(ContourData=["1", "2", "3", "4"]),
        first_contour(ContourData=None), lambda d: delattr(d.ROIContourSequence[0].ContourSequence[0], "ContourData"),
        lambda d: setattr(d, "Modality", "CT"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(tmp_path, change):
    file = write_rtstruct(tmp_path / "rs", {"GTV": [box(0, *SQUARE)]})
    damage(file, change)
    refused(read_rois, file)


def test_no_dicom_and_no_file(tmp_path):
    (tmp_path / "Muster.txt").write_text("Muster, Erika\n" * 100, encoding="utf-8")
    refused(read_rois, tmp_path / "Muster.txt")
    refused(read_rois, tmp_path / "missing")


# Which ROIs, and the table


def test_select_rois():
    names = ["GTV_1", "Liver", "gtv 2", "External", "boost"]
    assert select_rois(names[:4]) == [True, False, True, False]
    assert select_rois(names, kinds=["", "ORGAN", "GTV", "", "PTV"]) == [True, False, True, False, False]
    assert select_rois(names, "^gtv") == [True, False, True, False, False]
    assert select_rois(names, "liver|boost", kinds=["PTV"] * 5) == [False, True, False, False, True]
    with pytest.raises(UserError, match="regular expression"):
        select_rois(names, "gtv(")
    with pytest.raises(UserError, match=r"none of the ROIs \(1 'GTV_1', 2 'Liver'") as error:
        select_rois(names, "node")
    assert error.value.code == "ROI_NO_LESION"
    with pytest.raises(UserError, match="'Liver'.*--lesion-roi"):
        select_rois(["Liver"])


def test_an_unknown_name_waits_for_the_user():
    """It is told by its number, for it may be the patient's."""
    with pytest.raises(UserError, match="ROI 7 '…': not known whether this is a lesion .* --lesion-roi") as error:
        select_rois(["Lesion", "Liver", "Kettler"], numbers=[3, 5, 7])
    assert error.value.code == "ROI_UNKNOWN"
    with pytest.raises(UserError, match="ROIs 1 'ROI 1', 2 '… 2': not known"):
        select_rois(["ROI 1", "boost 2", "Lesion"])


def test_shown_names():
    assert shown_name("Muster^Erika\n/GTV=1.5_a-b") == "… /GTV_1.5_a-b"
    assert shown_name("lesion " * 9) == ("lesion " * 9)[:40].strip()
    assert shown_name("  ") == "unnamed"


def test_union_and_table(tmp_path):
    z = heights(grid())
    a = [box(h, -40, 0, -40, 40) for h in z[3:8]]
    b = [box(h, -10, 60, -30, 30) for h in z[5:10]] + [(box(0, *SQUARE)[:1], "POINT")]
    cut = [box(h, 0, 200, -500, 500) for h in z[15:17]]
    small = [circle(z[4], 0.8, 2.0, 2.5)]
    file = write_rtstruct(tmp_path / "rs", {
        "LN^a": a, "LN b": b, "LN cut": cut, "LN small": small, "Liver": a, "PTV": a, "LN none": [],
    })  # fmt: skip
    pet = grid()
    values = np.random.default_rng(0).exponential(3, pet.GetSize()[::-1]).astype(np.float32)
    image = sitk.GetImageFromArray(values)
    image.CopyInformation(pet)
    lesions, rows = read_lesions([("RTSTRUCT", file)], image, FRAME)
    masks = [rasterise(r, pet) for r in read_rois(file)[:4]]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(lesions), np.any(masks, 0))
    assert lesions.GetSpacing() == image.GetSpacing() and lesions.GetOrigin() == image.GetOrigin()
    names = ["LN_a", "LN b", "LN cut", "LN small", "Liver", "PTV", "LN none"]
    assert [(r.name, r.kept) for r in rows] == list(zip(names, [1, 1, 1, 1, 0, 0, 1], strict=True))
    assert rows[0].voxels == masks[0].sum()
    assert rows[0].volume_ml == pytest.approx(masks[0].sum() * 4 * 5 * 3 / 1000)
    assert rows[1].suv_max == pytest.approx(values[masks[1]].max())
    assert rows[1].suv_mean == pytest.approx(values[masks[1]].mean(), rel=1e-5)
    assert "passed over" in rows[1].note and "outside" in rows[2].note
    assert (rows[3].voxels, rows[3].suv_max) == (0, None) and "smaller than voxels" in rows[3].note
    assert rows[4].voxels is None and "no closed contours" in rows[6].note
    assert "no voxel" in refused(read_lesions, [("RTSTRUCT", file)], image, FRAME, "none|small")
    assert "frame of reference" in refused(read_lesions, [("RTSTRUCT", file)], image, OTHER_FRAME)
    both, _ = read_lesions([("RTSTRUCT", file)] * 2, image, FRAME)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(both), sitk.GetArrayFromImage(lesions))
