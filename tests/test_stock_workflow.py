"""The way of an nnU-Net user through the stock commands: cross-validation, ensemble, postprocessing, sharing a model.

Every command is typed as in a shell (tests/helpers/commands.py); what is done in Python, or by two processes, runs in
processes forked from one that has imported torch and nnU-Net.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import find_free_network_port, run_ddp
from torch.distributed import init_process_group
from torch.nn.parallel import DistributedDataParallel

from nnunet_fratmae.trainer import PRETRAINED_VARIABLE, FratMAETrainer
from tests.conftest import SETTINGS, Workspace
from tests.helpers import commands

MODEL = "-tr FratMAETrainer -p FratMAEPlans"
TRAIN = f"nnUNetv2_train 7 3d_fullres 0 {MODEL} -device cpu"
PREDICT = f"nnUNetv2_predict -d 7 -c 3d_fullres -f 0 {MODEL} -device cpu -npp 1 -nps 1"
STAGING = "-tr FratMAEStagingTrainer -p TracerPlans"
OUR_MACHINE = ("nnUNet_raw", "nnUNet_preprocessed", PRETRAINED_VARIABLE)
IMPORTED = ["nnunetv2.evaluation.find_best_configuration", "nnunet_fratmae.ext_trainers.fratmae_trainers",
            "pretraining.pretrain", "plans.plan_and_preprocess", __name__]  # fmt: skip
SERVER = multiprocessing.get_context("forkserver")


def in_new_process(log: Path, environment: dict[str, str], function: Callable, *arguments) -> None:
    """What `function` does, with its output in `log`, ended as Python ends a program; empty variables are unset."""
    os.environ.update(environment)
    for name in [name for name, value in environment.items() if not value]:
        del os.environ[name]
    log.write_text("", encoding="utf-8")
    commands.end_with(lambda: function(*arguments), [log, log])


class Desk(Workspace):
    """Where the user sits."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.pretraining, self.unseen = folder / "pretraining", self.raw / "Dataset008_Phantom" / "imagesTr"
        self.model = self.results / "Dataset007_Phantom" / "FratMAETrainer__FratMAEPlans__3d_fullres"

    def start(self, log: str, variables: dict[str, str], function: Callable, *arguments) -> multiprocessing.Process:
        single = {"OMP_NUM_THREADS": "1", **self.variables, PRETRAINED_VARIABLE: ""}
        with mock.patch.dict(os.environ, single):  # the server keeps the variables that it is started with
            SERVER.set_forkserver_preload(IMPORTED)
            arguments = (self.folder / log, {**single, **variables}, function, *arguments)
            process = SERVER.Process(target=in_new_process, args=arguments)
            process.start()
        return process


def segmentation(path: Path) -> np.ndarray:
    """With the axes that the probabilities have, those of nnU-Net's reader."""
    return SimpleITKIOWithReorient().read_seg(str(path))[0][0]


def segmentations(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: segmentation(path) for path in sorted(folder.glob("*.nii.gz"))}


def same_segmentations(one: Path, other: Path) -> bool:
    ones, others = segmentations(one), segmentations(other)
    return ones.keys() == others.keys() and len(ones) > 0 and all(np.array_equal(ones[k], others[k]) for k in ones)


def scores(folder: Path) -> list[list[int]]:
    """Voxels of each case that were found, invented, missed and rightly left out."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return [[case["metrics"]["1"][name] for name in ("TP", "FP", "FN", "TN")] for case in summary["metric_per_case"]]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Desk:
    """Phantoms and an artefact; folds 0 and 1 of FratMAETrainer are trained on our plans."""
    desk = Desk(tmp_path_factory.mktemp("desk"))
    desk.run("fratmae_phantom -d 7 -n 5 --seed 1 --spacing 12 12 12")
    desk.run("fratmae_phantom -d 8 -n 1 --seed 2 --spacing 12 12 12")
    desk.run(f"fratmae_plan_and_preprocess -d 7 -preset vit_nano -np 1 --set {' '.join(SETTINGS)}")
    desk.run(f"fratmae_pretrain -d 7 -m fratmae_notext -device cpu -o {desk.pretraining}")
    for command in (TRAIN, TRAIN.replace(" 0 ", " 1 ")):
        desk.run(f"{command} --npz", FRATMAE_PRETRAINED=str(desk.pretraining))
    return desk


@pytest.fixture(scope="module")
def predicted(desk) -> Path:
    """A study that nobody trained on, with probabilities."""
    desk.run(f"{PREDICT} -i {desk.unseen} -o {desk.folder}/predicted --save_probabilities --disable_tta")
    return desk.folder / "predicted"


@pytest.fixture(scope="module", params=["ScratchPlans", pytest.param("nnUNetPlans", marks=pytest.mark.slow)])
def other_plans(desk, request) -> str:
    """Plans on which the same folds are trained too: ours without pretraining, or nnU-Net's own with other axes."""
    folder = desk.preprocessed / "Dataset007_Phantom"
    path = folder / f"{request.param}.json"
    if request.param == "nnUNetPlans":
        desk.run("nnUNetv2_plan_experiment -d 7")
        desk.run("nnUNetv2_preprocess -d 7 -c 3d_fullres -np 1")
        finetune = {"epochs": 1, "iterations": 2, "val_iterations": 1, "batch_size": 2, "patch": [16, 32, 48]}
        plans = json.loads(path.read_text(encoding="utf-8")) | {"fratmae": {"finetune": finetune}}
    else:
        plans = json.loads((folder / "FratMAEPlans.json").read_text(encoding="utf-8")) | {"plans_name": request.param}
        plans["fratmae"]["finetune"]["from_scratch"] = True
    path.write_text(json.dumps(plans), encoding="utf-8")
    for fold in " 0 ", " 1 ":
        desk.run(TRAIN.replace("FratMAEPlans", request.param).replace(" 0 ", fold) + " --npz",
                 FRATMAE_PRETRAINED=str(desk.pretraining))  # fmt: skip
    return request.param


# ------------------------------------------------------------------------------------------------ training, validation


def test_npz_has_the_probabilities_of_the_segmentation(desk):
    validation = desk.model / "fold_0" / "validation"
    assert len(segmentations(validation)) == 1
    for name, labels in segmentations(validation).items():
        probabilities = np.load(validation / name.replace(".nii.gz", ".npz"))["probabilities"]
        assert probabilities.shape == (2, *labels.shape)
        np.testing.assert_allclose(probabilities.sum(0), 1, atol=2e-3)  # they are kept in half precision
        assert (probabilities.argmax(0) == labels).mean() > 0.9999


def test_validating_again_finds_what_the_training_found(desk):
    """--val is the end of the training once more, and --val_best the same with the best weights, until --val again."""
    validation = desk.model / "fold_0" / "validation"
    found = scores(validation)
    (validation / "summary.json").unlink()
    desk.run(f"{TRAIN} --val")
    assert scores(validation) == found
    best = desk.model / "fold_0" / "checkpoint_best.pth"
    checkpoint = torch.load(best, weights_only=False)
    last = [name for name in checkpoint["network_weights"] if ".seg_layers." in name]
    for name in last:  # a network that sees lesions everywhere
        checkpoint["network_weights"][name] = torch.zeros_like(checkpoint["network_weights"][name])
        if name.endswith("bias"):
            checkpoint["network_weights"][name][-1] = 1
    assert last
    torch.save(checkpoint, best)
    desk.run(f"{TRAIN} --val --val_best")
    assert all(missed == left_out == 0 for _, _, missed, left_out in scores(validation))
    desk.run(f"{TRAIN} --val")
    assert scores(validation) == found


def test_pretrained_weights_by_nnunets_own_flag_and_fold_all(desk):
    """encoders_nnunet.pth where the plans match; fold all trains on all cases and validates on them."""
    output = desk.run(f"{TRAIN.replace(' 0 ', ' all ')} -pretrained_weights {desk.pretraining}/encoders_nnunet.pth")
    assert "Loading pretrained weights from file" in output
    folder = desk.model / "fold_all"
    trained = torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    start = torch.load(desk.pretraining / "encoders_nnunet.pth", weights_only=False)["network_weights"]
    shared = [name for name in trained if ".seg_layers." not in name and trained[name].ndim > 1]
    assert len(shared) == 36  # matrices of two encoders of four layers
    for name in shared:  # two steps of 1e-4 from where it began, and from scratch it would be far from it
        torch.testing.assert_close(trained[name], start[name], rtol=0, atol=5e-4)
    assert len(segmentations(folder / "validation")) == 5


# --------------------------------------------------------------------------------------------------------- prediction


def predict_in_python(model: Path, images: Path, out: Path) -> None:
    """nnUNetPredictor with and without mirroring, from files and from an array: `out`/{0,1}_{files,array}.npz."""
    files = [str(images / f"phantom_000_{channel:04d}.nii.gz") for channel in range(2)]
    for mirroring in range(2):
        predictor = nnUNetPredictor(use_mirroring=bool(mirroring), device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), use_folds=(0,))
        ((labels, probabilities),) = predictor.predict_from_files([files], None, True, True, 1, 1)
        np.savez(out / f"{mirroring}_files.npz", labels=labels, probabilities=probabilities)
        array, properties = predictor.plans_manager.image_reader_writer_class().read_images(files)
        labels, probabilities = predictor.predict_single_npy_array(array, properties, None, None, True)
        np.savez(out / f"{mirroring}_array.npz", labels=labels, probabilities=probabilities)


def test_python_predicts_as_the_command_with_and_without_mirroring(desk, predicted, tmp_path):
    desk.run(f"{PREDICT} -i {desk.unseen} -o {tmp_path}/mirrored --save_probabilities")
    process = desk.start("python.log", {}, predict_in_python, desk.model, desk.unseen, tmp_path)
    process.join()
    assert process.exitcode == 0, (desk.folder / "python.log").read_text(encoding="utf-8")[-4000:]
    for mirroring, folder in enumerate((predicted, tmp_path / "mirrored")):
        by_command = np.load(folder / "phantom_000.npz")["probabilities"]
        for how in "files", "array":
            by_python = np.load(tmp_path / f"{mirroring}_{how}.npz")
            np.testing.assert_allclose(by_python["probabilities"], by_command, atol=2e-3)
            assert (by_python["labels"] == by_command.argmax(0)).mean() > 0.999
    plain, mirrored = (np.load(tmp_path / f"{mirroring}_files.npz")["probabilities"] for mirroring in range(2))
    assert np.abs(plain - mirrored).max() > 1e-3


def test_a_case_without_its_pet_ends_in_one_line(desk, tmp_path):
    ct = next(desk.unseen.glob("*_0000.nii.gz"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / ct.name).symlink_to(ct)
    output = desk.run(f"{PREDICT} -i {tmp_path}/in -o {tmp_path}/out", expect=1)
    last = output.strip().splitlines()[-1]
    assert "1 channels" in last and "fratmae_fill_missing" in last and "Traceback" not in output
    assert not list(tmp_path.glob("out/*.nii.gz"))


def test_a_model_travels_in_a_zip(desk, predicted, tmp_path):
    """Another machine has nnUNet_results alone, none of our variables, and predicts the same."""
    archive = tmp_path / "model.zip"
    desk.run(f"nnUNetv2_export_model_to_zip -d 7 -o {archive} -c 3d_fullres -f 0 1 {MODEL}")
    there = dict.fromkeys(OUR_MACHINE, "") | {"nnUNet_results": str(tmp_path / "there")}
    desk.run(f"nnUNetv2_install_pretrained_model_from_zip {archive}", **there)
    predict = PREDICT.replace("-d 7", "-d Dataset007_Phantom")
    desk.run(f"{predict} -i {desk.unseen} -o {tmp_path}/out --disable_tta", **there)
    assert same_segmentations(tmp_path / "out", predicted)
    model = next((tmp_path / "there").glob("*/FratMAETrainer__*"))
    desk.run(f"nnUNetv2_predict_from_modelfolder -i {desk.unseen} -o {tmp_path}/both -m {model} -f 0 1 -device cpu "
             "--disable_tta -npp 1 -nps 1", **dict.fromkeys(OUR_MACHINE, "") | {"nnUNet_results": ""})  # fmt: skip
    assert segmentations(tmp_path / "both").keys() == segmentations(predicted).keys()


# ------------------------------------------------------------------------------------- cross-validation and its results


def test_results_of_the_folds_are_put_together_and_evaluated(desk, tmp_path):
    desk.run(f"nnUNetv2_accumulate_crossval_results 7 -c 3d_fullres -o {tmp_path}/all -f 0 1 {MODEL}")
    cases = {name for fold in (0, 1) for name in segmentations(desk.model / f"fold_{fold}" / "validation")}
    assert segmentations(tmp_path / "all").keys() == cases and len(cases) == len(scores(tmp_path / "all")) == 2
    labels = desk.raw / "Dataset007_Phantom" / "labelsTr"
    desk.run(f"nnUNetv2_evaluate_folder {labels} {tmp_path}/all -djfile {desk.model}/dataset.json "
             f"-pfile {desk.model}/plans.json -o {tmp_path}/again.json -np 1 --chill")  # fmt: skip
    again = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
    for case in again["metric_per_case"]:
        name = Path(case["prediction_file"]).name
        truth, found = segmentation(labels / name) == 1, segmentation(tmp_path / "all" / name) == 1
        assert case["metrics"]["1"]["TP"] == (truth & found).sum()
        dice = 2 * (truth & found).sum() / max(truth.sum() + found.sum(), 1)
        assert case["metrics"]["1"]["Dice"] == pytest.approx(dice, nan_ok=True)


def test_the_best_configuration_is_found_and_its_instructions_work(desk, other_plans, predicted, tmp_path):
    """Two models and their ensemble; what nnU-Net tells the user to type is typed."""
    output = desk.run("nnUNetv2_find_best_configuration 7 -c 3d_fullres -tr FratMAETrainer "
                      f"-p FratMAEPlans {other_plans} -f 0 1 -np 1")  # fmt: skip
    assert "*Best*" in output
    dataset = desk.model.parent
    (ensemble,) = (dataset / "ensembles").glob(f"*{other_plans}*")
    assert len(scores(ensemble)) == 2
    instructions = (dataset / "inference_instructions.txt").read_text(encoding="utf-8")
    commands = [line for line in instructions.splitlines() if line.startswith("nnUNetv2_")]
    assert commands[-1].startswith("nnUNetv2_apply_postprocessing")
    for command in commands:
        typed = command.replace("INPUT_FOLDER", str(desk.unseen)).replace("OUTPUT_FOLDER", f"{tmp_path}/out")
        desk.run(typed + (" -device cpu --disable_tta -npp 1 -nps 1" if "nnUNetv2_predict" in typed else ""))
    assert segmentations(tmp_path / "out_PP").keys() == segmentations(predicted).keys()


def test_an_ensemble_is_the_mean_of_the_probabilities(desk, other_plans, predicted, tmp_path):
    other = PREDICT.replace("FratMAEPlans", other_plans)
    desk.run(f"{other} -i {desk.unseen} -o {tmp_path}/other --save_probabilities --disable_tta")
    desk.run(f"nnUNetv2_ensemble -i {predicted} {tmp_path}/other -o {tmp_path}/mean -np 1")
    assert segmentations(tmp_path / "mean").keys() == segmentations(predicted).keys()
    for name, labels in segmentations(tmp_path / "mean").items():
        both = [np.load(folder / name.replace(".nii.gz", ".npz"))["probabilities"].astype(np.float32)
                for folder in (predicted, tmp_path / "other")]  # fmt: skip
        assert not np.array_equal(*both)
        np.testing.assert_array_equal(np.mean(both, 0).argmax(0), labels)


# ------------------------------------------------------------------------------------------------------- several GPUs


@contextlib.contextmanager
def without_a_gpu():
    """nnU-Net's way over several GPUs, on the CPU: gloo for NCCL, no device of its own for each process."""
    stock = FratMAETrainer.__init__

    @functools.wraps(stock)  # nnU-Net looks at the signature
    def on_the_cpu(self, *arguments, **keywords):
        stock(self, *arguments, **keywords)
        self.device, self.grad_scaler = torch.device("cpu"), None

    run, trainer = "nnunetv2.run.run_training", "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
    with (
        mock.patch(f"{run}.setup_ddp", lambda rank, size: init_process_group("gloo", rank=rank, world_size=size)),
        mock.patch(f"{trainer}.DDP", lambda network, device_ids: DistributedDataParallel(network)),
        mock.patch("torch.cuda.set_device"),
        mock.patch(f"{trainer}.GradScaler", lambda device: None),
        mock.patch.object(FratMAETrainer, "__init__", on_the_cpu),
    ):
        yield


def train_one_of_two(rank: int, folder: Path) -> None:
    """What the process `rank` of nnUNetv2_train -num_gpus 2 does; gradients of its first step go to `folder`."""
    step, steps = FratMAETrainer.train_step, []

    def kept(self: FratMAETrainer, batch: dict) -> dict:
        start = {name: value.clone() for name, value in self.bare_network().state_dict().items()}
        output = step(self, batch)
        if not steps:
            gradients = {name: p.grad.clone() for name, p in self.bare_network().named_parameters()}
            torch.save({"start": start, "batch": batch, "gradients": gradients}, folder / f"step_{rank}.pth")
        steps.append(output)
        return output

    with without_a_gpu(), mock.patch.object(FratMAETrainer, "train_step", kept):
        plans = ("7", "3d_fullres", 2, "FratMAETrainer", "FratMAEPlans")
        run_ddp(rank, *plans, False, False, False, None, True, False, 2)


def test_two_processes_train_as_one_with_the_joint_batch(desk, tmp_path):
    """-num_gpus 2 from its start to its validation, over gloo on the CPU: nnU-Net itself has it for CUDA only."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port()),
                 PRETRAINED_VARIABLE: str(desk.pretraining)}  # fmt: skip
    processes = [desk.start(f"{rank}.log", variables, train_one_of_two, rank, tmp_path) for rank in range(2)]
    for rank, process in enumerate(processes):
        process.join()
        assert process.exitcode == 0, (desk.folder / f"{rank}.log").read_text(encoding="utf-8")[-4000:]
    fold = desk.model / "fold_2"
    assert len(scores(fold / "validation")) == len(list((fold / "validation").glob("*.npz"))) == 1
    saved = torch.load(fold / "checkpoint_final.pth", weights_only=False)["network_weights"]
    parts = [torch.load(tmp_path / f"step_{rank}.pth", weights_only=False) for rank in range(2)]
    assert saved.keys() == parts[0]["start"].keys(), "no prefix of DDP"
    joint = {key: torch.cat([part["batch"][key] for part in parts]) for key in ("data", "target")}
    reference = one_process(desk, parts[0]["start"], joint)
    for name, expected in reference.items():
        assert expected.abs().sum() > 0, name
        for part in parts:
            torch.testing.assert_close(part["gradients"][name], expected, rtol=1e-3, atol=1e-5)


def one_process(desk: Desk, weights: dict, batch: dict) -> dict[str, torch.Tensor]:
    """Gradients, clipped as nnU-Net clips them, of a step of stock training on `batch`."""
    folder = desk.preprocessed / "Dataset007_Phantom"
    plans, dataset_json = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("FratMAEPlans.json", "dataset.json")
    )
    plans["fratmae"]["finetune"]["from_scratch"] = True
    with mock.patch.dict(os.environ, desk.variables | {"nnUNet_results": str(desk.folder / "one")}):
        trainer = FratMAETrainer(plans, "3d_fullres", 2, dataset_json, torch.device("cpu"))
        trainer.initialize()
    trainer.network.load_state_dict(weights)
    trainer.network.train()
    trainer.train_step(batch)
    return {name: p.grad for name, p in trainer.network.named_parameters()}


# ------------------------------------------------------------------------------------------------------------ staging


@pytest.fixture(scope="module")
def staged(desk) -> Path:
    folder = desk.preprocessed / "Dataset007_Phantom"
    plans = json.loads((folder / "FratMAEPlans.json").read_text(encoding="utf-8"))
    plans["plans_name"] = "TracerPlans"
    plans["fratmae"]["staging"] |= {"target": "tracer", "epochs": 2, "workers": 0}
    (folder / "TracerPlans.json").write_text(json.dumps(plans), encoding="utf-8")
    desk.run(f"nnUNetv2_train 7 wholebody 0 {STAGING} -device cpu")
    return desk.results / "Dataset007_Phantom" / "FratMAEStagingTrainer__TracerPlans__wholebody"


def test_a_staging_model_does_not_segment_and_says_so(staged, desk, tmp_path):
    for command in (f"nnUNetv2_predict -d 7 -c wholebody {STAGING}", f"nnUNetv2_predict_from_modelfolder -m {staged}"):
        output = desk.run(f"{command} -f 0 -i {desk.unseen} -o {tmp_path}/out -device cpu", expect=1)
        assert "fratmae_predict_stage" in output.strip().splitlines()[-1] and "Traceback" not in output
    assert not list(tmp_path.glob("out/*"))


def test_a_staging_model_travels_in_a_zip(staged, desk, tmp_path):
    desk.run(f"nnUNetv2_export_model_to_zip -d 7 -o {tmp_path}/stage.zip -c wholebody -f 0 {STAGING}")
    there = dict.fromkeys(OUR_MACHINE, "") | {"nnUNet_results": str(tmp_path / "there")}
    desk.run(f"nnUNetv2_install_pretrained_model_from_zip {tmp_path}/stage.zip", **there)
    tables = []
    for number, model in enumerate((staged, tmp_path / "there" / staged.relative_to(desk.results))):
        desk.run(f"fratmae_predict_stage -i {desk.unseen} -o {tmp_path}/{number} -m {model} -device cpu --no_pictures",
                 **there)  # fmt: skip
        tables.append((tmp_path / str(number) / "stages.csv").read_text(encoding="utf-8"))
    assert tables[0] == tables[1] and len(tables[0].splitlines()) == 2
