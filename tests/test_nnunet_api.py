"""What we assume of nnU-Net, one assumption a line; a failure names the release that was met and what is different.

`pytest tests/test_nnunet_api.py -v` shows the version in the names of the tests.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, preprocess_dataset
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.logging.nnunet_logger import WandbLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from nnunetv2.utilities.utils import (
    create_lists_from_splitted_dataset_folder,
    get_filenames_of_train_images_and_targets,
)

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.networks.unetr import FratMAEUNETR
from nnunet_fratmae.nnunet_api import OVERRIDDEN, TESTED, curves, take_resume
from nnunet_fratmae.staging_trainer import FratMAEStagingTrainer
from nnunet_fratmae.trainer import FratMAETrainer
from plans.planner import FratMAEPlanner
from plans.store import WholeBodyConfiguration
from tests.test_plans import DATASET_JSON
from tests.test_trainer import LABELS, batch

MET = f"nnunetv2 {version('nnunetv2')}"
OURS = [FratMAETrainer, FratMAEStagingTrainer]


@pytest.mark.parametrize("met", [MET])
def test_says_which_nnunet_it_met(met):
    """Releases from the one that has external trainers; another than the tested one is said in pytest's summary."""
    major, minor, *_ = (int(part) for part in version("nnunetv2").split(".")[:2])
    assert (2, 8) <= (major, minor) < (3, 0), f"{met}: setup.py allows 2.8 up to 3"
    if version("nnunetv2") != TESTED:
        warnings.warn(f"met {met}; nnunet_api.TESTED says {TESTED}", stacklevel=1)


# ------------------------------------------------------------------------------------------------ what we override


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("met", [MET])
@pytest.mark.parametrize("name", OVERRIDDEN)
def test_methods_that_our_trainers_override_are_there(name, met):
    assert callable(getattr(nnUNetTrainer, name, None)), f"{met}: nnUNetTrainer.{name} is gone, our override is dead"
    theirs = parameters(getattr(nnUNetTrainer, name))
    for ours in OURS:
        mine = parameters(getattr(ours, name))
        named = [parameter for parameter in mine if parameter not in ("args", "kwargs")]
        same = mine == theirs or (len(named) < len(mine) and named == theirs[: len(named)])
        assert same, f"{met}: nnUNetTrainer.{name} takes {theirs}, {ours.__name__}'s takes {mine}"


@pytest.mark.parametrize("ours, base", [*((trainer, nnUNetTrainer) for trainer in OURS)])
def test_the_list_of_overridden_methods_is_complete(ours, base):
    """What nnU-Net's trainer and ours both define must be in nnunet_api.OVERRIDDEN, which every training checks."""
    both = {name for name in vars(ours) if name in vars(base) and callable(getattr(ours, name))}
    missing = {n for n in both if n == "__init__" or not n.startswith("__")} - set(OVERRIDDEN)
    assert not missing, f"{MET}: add {missing} to nnunet_api.OVERRIDDEN"


@pytest.mark.parametrize("ours, base", [(FratMAEPlanner, ExperimentPlanner),
                                        (WholeBodyConfiguration, ConfigurationManager)])  # fmt: skip
def test_methods_of_planner_and_configuration_are_there(ours, base):
    """What these classes define is an override each: they have no method of their own."""
    for name in set(vars(ours)) - {"__init__", "__module__", "__doc__", "__firstlineno__", "__static_attributes__"}:
        assert hasattr(base, name), f"{MET}: {base.__name__}.{name} is gone, the override of {ours.__name__} is dead"


def test_a_renamed_method_stops_the_training_in_one_line(make_trainer, monkeypatch):
    """The name has a typo that somebody may mend; head would then be mirrored to feet without a word."""
    monkeypatch.delattr(nnUNetTrainer, "configure_rotation_dummyDA_mirroring_and_inital_patch_size")
    with pytest.raises(UserError, match="configure_rotation_dummyDA_mirroring_and_inital_patch_size") as error:
        make_trainer()
    assert version("nnunetv2") in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ what we rely on

ATTRIBUTES = (
    "is_ddp", "local_rank", "device", "plans_manager", "configuration_manager", "configuration_name", "dataset_json",
    "fold", "preprocessed_dataset_folder_base", "preprocessed_dataset_folder", "output_folder_base", "output_folder",
    "initial_lr", "weight_decay", "oversample_foreground_percent", "num_iterations_per_epoch",
    "num_val_iterations_per_epoch", "num_epochs", "current_epoch", "enable_deep_supervision", "label_manager",
    "network", "optimizer", "lr_scheduler", "grad_scaler", "loss", "logger", "_best_ema", "was_initialized",
    "inference_allowed_mirroring_axes", "my_init_kwargs", "save_every", "disable_checkpointing", "dataloader_train",
    "dataloader_val",
)  # fmt: skip


def test_attributes_that_we_read_or_set_are_nnunets(make_trainer):
    """One that was renamed would be set and never read."""
    source = inspect.getsource(nnUNetTrainer)
    gone = [name for name in ATTRIBUTES if f"self.{name}" not in source]
    assert not gone, f"{MET}: nnUNetTrainer no longer has {gone}"
    trainer = make_trainer()
    assert not [name for name in ATTRIBUTES if not hasattr(trainer, name)]
    assert len(nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(trainer)) == 4


@pytest.mark.parametrize(
    "method, passage, why",
    [
        ("train_step", "autocast(self.device.type, enabled=True)", "autocast names a type: FratMAETrainer.precision "
         "no longer makes it bfloat16"),
        ("train_step", "if self.grad_scaler is not None", "a training without gradient scaler (bfloat16) is gone"),
        ("on_train_epoch_start", "lr_scheduler.step(self.current_epoch)", "CosineSchedule.step takes the epoch"),
        ("on_train_end", "checkpoint_final.pth", "check_other_folds and fratmae_predict_stage look for it"),
        ("on_epoch_end", "checkpoint_best.pth", "the staging trainer goes back to it"),
        ("save_checkpoint", "'init_args'", "load_checkpoint takes the plans from it"),
        ("save_checkpoint", "'network_weights'", "the staging trainer and fratmae_predict_stage read it"),
        ("save_checkpoint", "'inference_allowed_mirroring_axes'", "prediction mirrors as the training did"),
    ],
)  # fmt: skip
def test_inner_workings_that_we_rely_on(method, passage, why):
    source = inspect.getsource(getattr(nnUNetTrainer, method)).replace('"', "'")
    assert passage in source, f"{MET}: nnUNetTrainer.{method} has no `{passage}` any more; {why}"


def test_the_planner_reads_what_we_set():
    source = inspect.getsource(ExperimentPlanner)
    for name in ("dataset", "dataset_json", "dataset_fingerprint", "lowres_creation_threshold"):
        assert f"self.{name}" in source, f"{MET}: ExperimentPlanner has no {name} any more"
    assert all(f"'{name}'" in source for name in ("spacings", "shapes_after_crop"))


CALLS = [
    (get_network_from_plans, ("class", {}, [], 2, 2), {"deep_supervision": False}),
    (load_pretrained_weights, ("network", "file.pth"), {"verbose": True}),
    (recursive_find_trainer_class_by_name, ("FratMAETrainer",), {}),
    (get_patch_size, ((8, 8, 8), (0, 1), (0, 1), (0, 1), (0.85, 1.25)), {}),
    (extract_fingerprint_dataset, (7,), {"num_processes": 1, "verbose": False}),
    (preprocess_dataset, (7, "plans", ("3d_fullres",)), {"num_processes": (1,)}),
    (determine_reader_writer_from_dataset_json, ({}, "example.nii.gz"), {"verbose": False}),
    (DefaultPreprocessor, (), {"verbose": False}),
    (DefaultPreprocessor.run_case, ("self", [], None, "plans", "configuration", {}), {}),
    (nnUNetDatasetBlosc2, ("folder",), {}),
    (nnUNetDatasetBlosc2.load_case, ("self", "case"), {}),
    (nnUNetDatasetBlosc2.save_case, ("data", "seg", {}, "path"), {"chunks": (1,), "blocks": (1,)}),
    (generate_crossval_split, ([],), {"seed": 12345, "n_splits": 5}),
    (get_allowed_n_proc_DA, (), {}),
    (WandbLogger, ("folder",), {"resume": False}),
    (ExperimentPlanner, ("Dataset007_T",), {"plans_name": "FratMAEPlans"}),
    (PlansManager, ({},), {}),
    (PlansManager.get_configuration, ("self", "3d_fullres"), {}),
    (PlansManager.get_label_manager, ("self", {}), {}),
    (LabelManager, ({}, None), {}),
    (create_lists_from_splitted_dataset_folder, ("folder", ".nii.gz"), {}),
    (get_filenames_of_train_images_and_targets, ("folder", {}), {}),
    (SimpleITKIOWithReorient.read_images, ("self", []), {}),
    (ComposeTransforms, ([],), {}),
    (RandomTransform, ("transform", 0.1), {}),
    (BasicTransform, (), {}),
    (ImageOnlyTransform, (), {}),
]


@pytest.mark.parametrize("function, args, kwargs", CALLS, ids=lambda value: getattr(value, "__qualname__", ""))
def test_functions_take_what_we_give_them(function, args, kwargs):
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        pytest.fail(f"{MET}: {function.__qualname__}{inspect.signature(function)}: {error}")


@pytest.mark.parametrize(
    "owner, names",
    [
        (ConfigurationManager, ["patch_size", "batch_size", "spacing", "network_arch_class_name",
                                "network_arch_init_kwargs", "resampling_fn_data", "resampling_fn_seg"]),
        (PlansManager, ["plans_name", "dataset_name", "transpose_forward"]),
        (LabelManager, ["num_segmentation_heads", "has_regions", "ignore_label"]),
        (SimpleITKIOWithReorient, ["supported_file_endings", "read_images"]),
        (nnUNetTrainer, ["print_to_log_file", "print_plans", "on_epoch_start", "build_network_architecture"]),
    ],
)  # fmt: skip
def test_members_that_we_read_are_there(owner, names):
    missing = [name for name in names if not hasattr(owner, name)]
    assert not missing, f"{MET}: {owner.__name__} has no {missing}"


def test_stock_pretrained_weights_still_skip_what_is_called_seg_layers(tmp_path):
    """Our decoder bears that name so that an export with the encoders alone is enough."""
    network = FratMAEUNETR(2, 2, (8, 16, 16), (4, 8, 8), 24, 4, 2, features=4)
    weights = {name: value + 1 for name, value in network.encoders.state_dict(prefix="encoders.").items()}
    torch.save({"network_weights": weights}, tmp_path / "weights.pth")
    load_pretrained_weights(network, tmp_path / "weights.pth")
    assert all(torch.equal(network.state_dict()[name], value) for name, value in weights.items())


# ------------------------------------------------------------------------------- what has changed, or is changing


@pytest.mark.parametrize("given", [None, False, True])
def test_resuming_is_taken_from_the_plans_and_given_back(given, make_trainer, monkeypatch):
    """From 2.7 on nnU-Net wants "continue_training" in the plans; a trainer made from Python has none."""
    plans = {"a": 1} | ({} if given is None else {"continue_training": given})
    assert take_resume(plans) == {"continue_training": bool(given)} and plans == {"a": 1}
    handed, stock = [], nnUNetTrainer.__init__

    def as_nnunet(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):  # noqa: B008
        handed.append(plans.get("continue_training"))
        stock(self, plans, configuration, fold, dataset_json, device)

    monkeypatch.setattr(nnUNetTrainer, "__init__", as_nnunet)
    trainer = make_trainer()
    assert handed == [False] and "continue_training" not in trainer.plans_manager.plans


def old_signature(arch_class_name, arch_init_kwargs, arch_init_kwargs_req_import, num_input_channels,
                  num_output_channels, enable_deep_supervision=True):  # fmt: skip
    return get_network_from_plans(arch_class_name, arch_init_kwargs, arch_init_kwargs_req_import, num_input_channels,
                                  num_output_channels, deep_supervision=enable_deep_supervision)  # fmt: skip


@pytest.mark.parametrize("signature", ["as it is", "before 2.8"])
def test_the_network_is_built_by_nnunet_whatever_its_signature(signature, make_trainer, monkeypatch):
    """FratMAETrainer does not define build_network_architecture, so training and prediction call nnU-Net's own."""
    assert "build_network_architecture" not in vars(FratMAETrainer)
    if signature == "before 2.8":
        monkeypatch.setattr(nnUNetTrainer, "build_network_architecture", staticmethod(old_signature))
    trainer = make_trainer()
    assert isinstance(trainer.network, FratMAEUNETR) and float(trainer.train_step(batch(trainer))["loss"]) > -2
    if signature == "as it is":
        managers = trainer.plans_manager, trainer.configuration_manager
        again = FratMAETrainer.build_network_architecture(*managers, 2, 3, False)
        assert again.decoder["seg_layers"].head.out_channels == 3


def test_curves_are_those_that_the_logger_keeps(make_trainer):
    trainer = make_trainer()
    curves(trainer)["of_ours"] = []
    trainer.logger.log("of_ours", 1.5, 0)
    assert trainer.logger.get_value("of_ours", step=-1) == 1.5, f"{MET}: the logger keeps its values elsewhere"
    assert trainer.logger.get_checkpoint()["of_ours"] == [1.5]


def test_settings_in_the_plans_do_not_disturb_nnunet(make_trainer):
    """The top-level blocks "fratmae" and "fratmae_chosen" pass through nnU-Net's managers, a configuration as it is."""
    plans = make_trainer().plans_manager.plans
    managed = PlansManager({**plans, "fratmae_chosen": {"token_patch": [8, 16, 16]}})
    labels = managed.get_label_manager(DATASET_JSON | {"labels": LABELS})
    assert labels.num_segmentation_heads == 2 and "fratmae" in managed.plans
    config = plans["configurations"]["3d_fullres"]
    assert managed.get_configuration("3d_fullres").configuration == config
