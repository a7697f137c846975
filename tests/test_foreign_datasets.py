"""Raw datasets that others made: what nnU-Net would stumble over in the middle is named before anything is planned."""

import json
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_fratmae.base.command import UserError
from plans.dataset_checks import check_studies
from plans.dataset_json import check_dataset_json, read_dataset_json
from plans.preprocessed import check_fold, check_replaceable, check_split_cases, planning, read_splits, replaced
from plans.store import list_raw_studies
from tests.test_plans import DATASET_JSON

SHAPE = (7, 5, 6)  # z, y, x
READER = "SimpleITKIOWithReorient"
DATASET = DATASET_JSON | {"labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz", "numTraining": 3,
                          "overwrite_image_reader_writer": READER}  # fmt: skip


def image(array: np.ndarray, **geometry) -> sitk.Image:
    volume = sitk.GetImageFromArray(array)
    volume.SetSpacing(geometry.get("spacing", (4.0, 5.0, 3.0)))
    volume.SetOrigin(geometry.get("origin", (-100.0, -90.0, 700.0)))
    volume.SetDirection(geometry.get("direction", (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    return volume


def lesions(dtype=np.uint8, **values) -> np.ndarray:
    array = np.zeros(SHAPE, dtype)
    array[2:4, 1:3, 2:5] = values.get("value", 1)
    return array


def dataset(folder: Path, description=DATASET, labels=None, ct=None, cases=("a", "b", "c")) -> Path:
    """Dataset003_Toy with the label image `labels` and the CT `ct` in its case b."""
    raw = folder / "raw" / "Dataset003_Toy"
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    (raw / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    for case in cases:
        for channel in range(2):
            volume = ct if ct is not None and (case, channel) == ("b", 0) else image(np.ones(SHAPE, np.float32))
            sitk.WriteImage(volume, str(raw / "imagesTr" / f"{case}_{channel:04d}.nii.gz"))
        volume = labels if labels is not None and case == "b" else image(lesions())
        sitk.WriteImage(volume, str(raw / "labelsTr" / f"{case}.nii.gz"))
    return raw


def check(raw: Path) -> None:
    description = read_dataset_json(raw / "dataset.json")
    check_studies(raw, list_raw_studies(raw, description), description, 1)


ORDER = {"regions_class_order": [1, 2]}
REVERSED = (1, 0, 0, 0, 1, 0, 0, 0, -1)


@pytest.mark.parametrize(
    "labels, description",
    [
        (None, {}),
        (image(lesions(np.float32)), {}),
        (image(lesions(np.float64)), {"labels": {"background": 0, "lesion": 1.0}}),
        (image(lesions(value=2)), {"labels": {"background": 0, "lesion": 1, "ignore": 2}}),
        (image(lesions(value=2)), {"labels": {"background": 0, "all": [1, 2], "core": [2]}, **ORDER}),
        (image(lesions(value=9)), {"labels": {"background": 0, "all": [1, 9], "core": [9]}, **ORDER}),
        (image(lesions(), origin=(-100.0002, -90.0, 700.0)), {}),  # written in another precision
        (image(lesions()[::-1], origin=(-100, -90, 718), direction=REVERSED), {}),  # turned round by the reader
        (None, {"modality": {"0": "CT", "1": "CT"}, "numTraining": 7}),
    ],
)
def test_right_datasets_stay_right(labels, description, tmp_path):
    check(dataset(tmp_path, DATASET | description, labels))


@pytest.mark.parametrize(
    "labels, says",
    [
        (lesions(value=7), 'has voxels of 7, and "labels" of dataset.json knows 0, 1; declare'),
        (lesions(np.int16, value=-1), "has voxels of -1"),
        (lesions(np.float32, value=0.4), "has values that are no whole numbers, such as 0.4; was it resampled"),
    ],
)
def test_values_of_labels_that_dataset_json_does_not_know_are_named(labels, says, tmp_path):
    with pytest.raises(UserError, match=says) as error:
        check(dataset(tmp_path, labels=image(labels)))
    assert "1 of 3 cases cannot be used. b: labelsTr/b.nii.gz" in str(error.value)


@pytest.mark.parametrize(
    "geometry, says",
    [
        ({"origin": (-100.0, -90.0, 702.0)}, "lies up to 2 mm off imagesTr/b_0000.nii.gz; bring it onto that grid"),
        ({"spacing": (4.0, 5.0, 4.0)}, "lies up to 6 mm off"),
        ({"direction": REVERSED}, "lies up to 18 mm off"),
        ({"direction": (0, 1, 0, 1, 0, 0, 0, 0, 1)}, "has 5x6x7 voxels, not 6x5x7 as imagesTr/b_0000"),
    ],
)
def test_a_label_on_another_grid_is_named(geometry, says, tmp_path):
    with pytest.raises(UserError, match=f"b: labelsTr/b.nii.gz {says}"):
        check(dataset(tmp_path, labels=image(lesions(), **geometry)))


@pytest.mark.parametrize("reader", ["NibabelIO", "NibabelIOWithReorient"])
def test_readers_by_nibabel_take_sheared_axes_and_grids_are_compared(reader, tmp_path):
    raw = dataset(tmp_path, DATASET | {"overwrite_image_reader_writer": reader})
    label = raw / "labelsTr" / "b.nii.gz"
    turned = image(lesions()[::-1], origin=(-100, -90, 718), direction=REVERSED)
    sitk.WriteImage(turned, str(label))
    if reader == "NibabelIO":  # which lays voxels upon voxels as they are stored
        with pytest.raises(UserError, match="b: labelsTr/b.nii.gz lies up to 18 mm off imagesTr/b_0000.nii.gz"):
            check(raw)
    else:
        check(raw)
    sitk.WriteImage(image(lesions()[1:]), str(label))
    with pytest.raises(UserError, match="b: labelsTr/b.nii.gz has 6x5x6 voxels, not 6x5x7 as imagesTr/b_0000.nii.gz"):
        check(raw)
    label.write_bytes(b"no image")
    with pytest.raises(UserError, match="b: labelsTr/b.nii.gz cannot be read as an image"):
        check(raw)
    sitk.WriteImage(image(lesions()), str(label))
    for path in raw.rglob("*.nii.gz"):
        stored = nibabel.load(path)
        affine = stored.affine.copy()
        affine[0, 1] = 0.7
        sheared = nibabel.Nifti1Image(np.asanyarray(stored.dataobj), None, stored.header)
        sheared.set_sform(affine, 1)
        sheared.set_qform(None, 0)
        nibabel.save(sheared, path)
    check(raw)
    (raw / "dataset.json").write_text(json.dumps(DATASET), encoding="utf-8")
    with pytest.raises(UserError, match="3 of 3 cases cannot be used"):  # ITK takes no sheared axes
        check(raw)


def test_a_ct_of_another_shape_or_no_image_at_all_is_named(tmp_path):
    with pytest.raises(UserError, match="b: imagesTr/b_0001.nii.gz has 6x5x7 voxels, not 6x5x6 as imagesTr/b_0000"):
        check(dataset(tmp_path / "shape", ct=image(np.ones((6, 5, 6), np.float32))))
    with pytest.raises(UserError, match="b: imagesTr/b_0000.nii.gz has the shape 6x5x7x2; each image must be one"):
        check(dataset(tmp_path / "time", ct=sitk.JoinSeries([image(np.ones(SHAPE, np.float32))] * 2)))
    raw = dataset(tmp_path / "cut")
    for case in "abc":
        (raw / "imagesTr" / f"{case}_0001.nii.gz").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"3 of 3 cases cannot be used. a: imagesTr/a_0001.nii.gz cannot be read"):
        check(raw)


def test_many_bad_cases_are_counted_and_the_first_named(tmp_path):
    raw = dataset(tmp_path, cases="abcdefgh")
    for case in "bdefh":
        sitk.WriteImage(image(lesions(value=3)), str(raw / "labelsTr" / f"{case}.nii.gz"))
    with pytest.raises(UserError, match=r"5 of 8 cases cannot be used\. b: .*; d: .*; e: .*; \.\.\.$"):
        check(raw)


def test_no_lesion_anywhere_is_nothing_to_learn(tmp_path):
    raw = dataset(tmp_path)
    for case in "abc":
        sitk.WriteImage(image(lesions(value=0)), str(raw / "labelsTr" / f"{case}.nii.gz"))
    with pytest.raises(UserError, match="in none of the 3 label files .* move the images to imagesPt"):
        check(raw)
    sitk.WriteImage(image(lesions()), str(raw / "labelsTr" / "c.nii.gz"))
    check(raw)  # healthy patients beside others are right


@pytest.mark.parametrize("case, says", [("b_seg", "_seg"), ("b.nii.gz", "ending"), ("b.b2nd", "ending")])
def test_names_that_nnunet_would_cut_are_refused(case, says, tmp_path):
    raw = dataset(tmp_path)
    for file in raw.glob("*/b*"):
        file.rename(file.with_name(case + file.name[1:]))
    with pytest.raises(UserError, match=f"case {case}.*{says}.* rename"):
        check(raw)


def test_names_with_dots_and_words_stay_right(tmp_path):
    check(dataset(tmp_path, cases=("a.1", "segment", "x_segmented", "CT.niiper")))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"labels": {"0": "background", "1": "lesion"}}, "is of nnU-Net's version 1 .* nnUNetv2_convert_old"),
        ({"labels": {"background": 0, "lesion": 2}}, "must be 0, 1, 2, ... without a gap, they are 0, 2"),
        ({"labels": {"lesion": 1}}, '"labels" must have "background": 0'),
        ({"labels": {"background": 1, "lesion": 2}}, '"labels" must have "background": 0'),
        ({"labels": {"background": 0}}, "only the background"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "one number to two names"),
        ({"labels": {"background": 0, "ignore": 1, "lesion": 2}}, '"ignore" must be the highest'),
        ({"labels": {"background": 0, "a": [1, 2], "b": 2}}, '"regions_class_order" must be a list of 2'),
        ({"labels": {"background": 0, "lesion": "x"}}, "version 1"),
        ({"labels": {"background": 0, "lesion": None}}, "lesion must be a whole number"),
        ({"labels": [0, 1]}, '"labels" must be'),
        ({"channel_names": {"a": "CT", "b": "PET"}}, '"channel_names" must be'),
        ({"channel_names": ["CT", "PET"]}, '"channel_names" must be'),
        ({"file_ending": "../x"}, '"file_ending" must be'),
        ({"file_ending": None}, '"file_ending" must be'),
        ({"numTraining": "three"}, '"numTraining" must be'),
        ({"fratmae": [1]}, '"fratmae" must be'),
        ({"fratmae": {"modalities": "CT"}}, '"modalities" must be'),
        ({"dataset": {"../x": {"images": ["a"], "label": "b"}}}, "is no name of a folder or file"),
        ({"dataset": {"x": ["a"]}}, '"dataset" must be'),
    ],
)
def test_dataset_json_is_read_with_care(changes, says):
    with pytest.raises(UserError, match=says) as error:
        check_dataset_json(DATASET | changes, "dataset.json", labelled=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", '{"labels": {"backgr', "[]", "3", "[" * 100_000])
def test_a_cut_dataset_json_is_one_line(text, tmp_path):
    (tmp_path / "dataset.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="dataset.json: ") as error:
        read_dataset_json(tmp_path / "dataset.json")
    assert "\n" not in str(error.value)


def test_an_ending_without_a_reader_is_named(tmp_path):
    description = {"file_ending": ".xyz", "channel_names": {"0": "CT"}}
    with pytest.raises(UserError, match='dataset.json: "file_ending": ".xyz": nnU-Net has no reader for that'):
        check_studies(tmp_path, {"a": (["a_0000.xyz"], None)}, description, 1)


# ---------------------------------------------------------------------------------------------------- folds and stores


@pytest.mark.parametrize("text", ["{}", "[]", '[{"train": ["a"]}]', '[{"train": "a", "val": []}]', '[{"train": ["a"'])
def test_folds_of_another_form_are_refused(text, tmp_path):
    (tmp_path / "splits_final.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="splits_final.json: "):
        read_splits(tmp_path / "splits_final.json")


def store(folder: Path, cases) -> Path:
    import blosc2

    folder.mkdir(parents=True)
    for case in cases:
        for name in (case, f"{case}_seg"):
            blosc2.asarray(np.ones((1, 3, 4, 5), np.float32), urlpath=str(folder / f"{name}.b2nd"), mode="w")
    return folder


def test_a_fold_of_cases_that_are_gone_or_too_few_ends_before_the_training(tmp_path):
    data, splits = store(tmp_path / "data", "abcd"), tmp_path / "splits_final.json"
    with pytest.raises(UserError, match="fold 0: .* has 4 labelled cases, too few for nnU-Net's 5 folds; .*fold all"):
        check_fold(tmp_path, data, 0)
    check_fold(tmp_path, data, "all")
    splits.write_text(
        json.dumps([{"train": ["a", "b"], "val": ["c"]}, {"train": ["a", "x"], "val": ["b"]}]), encoding="utf-8"
    )
    check_fold(tmp_path, data, 0)
    check_fold(tmp_path, data, 3)  # which nnU-Net draws by itself
    with pytest.raises(UserError, match="1 of its 3 cases are no preprocessed cases of .*: x; take them out"):
        check_fold(tmp_path, data, 1)
    with pytest.raises(UserError, match=r"1 of its 4 cases are no studies of here \(any more\): x"):
        check_split_cases(splits, set("abcd"), "studies of here")
    splits.write_text(json.dumps([{"train": ["a"], "val": []}]), encoding="utf-8")
    with pytest.raises(UserError, match="1 training and 0 validation cases; each side needs one"):
        check_fold(tmp_path, data, 0)
    with pytest.raises(UserError, match="no preprocessed cases there"):
        check_fold(tmp_path, tmp_path / "nowhere", 0)


@pytest.mark.parametrize("name", ["b.b2nd", "b_seg.b2nd"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_cut_case_is_named_before_the_training(name, share, tmp_path):
    file = store(tmp_path / "data", "abcde") / name
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(UserError, match=f"{name}: is damaged or cut off .*; preprocess the dataset again"):
        check_fold(tmp_path, tmp_path / "data", "all")


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = store(tmp_path / "data", "a")
    with pytest.raises(ValueError, match="stopped"), replaced(folder) as aside:
        (aside / "b.b2nd").write_bytes(b"")
        raise ValueError("stopped")
    assert {path.name for path in tmp_path.rglob("*.*")} == {"a.b2nd", "a_seg.b2nd"}
    (tmp_path / "data.partial").mkdir()
    (tmp_path / "data.partial" / "of_a_killed_one.b2nd").write_bytes(b"")
    with replaced(folder) as aside:
        (aside / "b.b2nd").write_bytes(b"")
        assert (folder / "a.b2nd").is_file()
    assert {path.name for path in tmp_path.rglob("*.*")} == {"b.b2nd"}


def test_what_is_no_store_is_never_replaced(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.docx").write_text("years", encoding="utf-8")
    (tmp_path / "link").symlink_to(other)
    (tmp_path / "file").write_text("", encoding="utf-8")
    for name, says in (("other", "1 other things .* thesis.docx"), ("link", "is a link"), ("file", "or a file")):
        with pytest.raises(UserError, match=says), replaced(tmp_path / name):
            pass
    assert (other / "thesis.docx").read_text(encoding="utf-8") == "years"
    check_replaceable(tmp_path / "nothing")


def _hold(folder: str, ready, done) -> None:
    with planning(Path(folder)):
        ready.set()
        done.wait(60)


def test_two_plannings_at_once_are_one_and_a_refusal(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    first = context.Process(target=_hold, args=(str(tmp_path / "Dataset003_Toy"), ready, done))
    first.start()
    assert ready.wait(120)
    with pytest.raises(UserError, match="is being written by another command"), \
            planning(tmp_path / "Dataset003_Toy"):  # fmt: skip
        pass
    done.set()
    first.join()
    with planning(tmp_path / "Dataset003_Toy"):
        pass


def test_a_preprocessed_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "preprocessed").write_text("", encoding="utf-8")
    folder = tmp_path / "preprocessed" / "Dataset003_Toy"
    with pytest.raises(UserError, match="Dataset003_Toy cannot be written to .Not a directory."), planning(folder):
        pass
    assert os.listdir(tmp_path) == ["preprocessed"]


def test_a_full_disk_is_one_line_whatever_blosc2_calls_it(tmp_path, monkeypatch):
    folder = store(tmp_path / "data", "a")
    monkeypatch.setattr("plans.preprocessed.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    full = "data cannot be written to .no space left.; what was there before is whole"
    with pytest.raises(UserError, match=full), replaced(folder):
        raise RuntimeError("Error while creating the NDArray")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="another fault"), replaced(folder):
        raise RuntimeError("another fault")
    assert (folder / "a.b2nd").is_file() and sorted(path.name for path in tmp_path.iterdir()) == ["data"]
