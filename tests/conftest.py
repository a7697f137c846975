"""Fixtures shared by the tests: a preprocessed phantom dataset and the nnU-Net folders it lives in."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.helpers import commands

SETTINGS = [
    "token_patch=[8,16,16]", "finetune.patch=[16,32,48]", "finetune.batch_size=2", "finetune.epochs=1",
    "finetune.iterations=2", "finetune.val_iterations=1", "wholebody.grid=[32,48,64]", "pretrain.epochs=2",
    "pretrain.batch_size=2", "pretrain.workers=0", "pretrain.patches_per_case=1",
]  # fmt: skip


LONGEST = ("test_stock_workflow.py", "test_stock_commands.py", "test_pretrain_runs.py", "test_discovery.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that two processes end at about the same time."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


class Workspace:
    """nnU-Net's three folders below one folder, and commands run in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw, self.preprocessed, self.results = (folder / name for name in ("raw", "preprocessed", "results"))
        for path in (self.raw, self.preprocessed, self.results):
            path.mkdir(parents=True, exist_ok=True)
        self.variables = {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "1",
        }

    def run(self, command: str, expect: int = 0, **variables: str) -> str:
        """Run a command line of this environment as a user does; its output (stdout and stderr). Empty variables are
        unset."""
        environment = os.environ | {"FRATMAE_PRETRAINED": ""} | self.variables | variables
        code, output = commands.run(command.split(), {name: value for name, value in environment.items() if value})
        assert (code == 0) == (expect == 0), output[-4000:]
        return output


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    """A folder for nnUNet_raw; the other two variables are not set."""
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    return tmp_path / "raw"


@pytest.fixture
def preprocessed_toy(tmp_path, monkeypatch) -> None:
    """nnU-Net's three folders with as much of Dataset007_T as a trainer on the CPU looks at before it trains."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.delenv("FRATMAE_PRETRAINED", raising=False)
    data = tmp_path / "preprocessed" / "Dataset007_T" / "data"
    data.mkdir(parents=True)
    (data / "case.b2nd").write_bytes(b"")


@pytest.fixture
def make_trainer(preprocessed_toy):
    """A trainer of a tiny network on the CPU, from plans as stock nnU-Net writes them, ready to train."""
    import torch

    from nnunet_fratmae.trainer import FratMAETrainer
    from tests.test_plans import DATASET_JSON, stock_plans

    def make(transpose=(0, 1, 2), dataset_json=DATASET_JSON, modalities=None, **finetune) -> FratMAETrainer:
        plans = stock_plans((48, 16, 32), transpose) | {"dataset_name": "Dataset007_T", "label_manager": "LabelManager"}
        plans["configurations"]["3d_fullres"] |= {
            "data_identifier": "data", "spacing": [(6.0, 4.0, 5.0)[axis] for axis in transpose], "batch_dice": True,
            "use_mask_for_norm": [False, False],
        }  # fmt: skip
        plans["fratmae"] = {"preset": "vit_nano", "token_patch": [8, 16, 16], "modalities": modalities,
                            "finetune": {"batch_size": 2, **finetune}}  # fmt: skip
        labels = {"background": 0, "lesion": 1}
        dataset_json = dataset_json | {"labels": labels, "file_ending": ".nii.gz", "numTraining": 5}
        trainer = FratMAETrainer(plans, "3d_fullres", 0, dataset_json, torch.device("cpu"))
        trainer.initialize()
        return trainer

    return make


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Workspace:
    """Six coarse phantoms (ID 7) planned with a tiny network, and two more (ID 8) that nobody trains on."""
    workspace = Workspace(tmp_path_factory.mktemp("phantoms"))
    workspace.run("fratmae_phantom -d 7 -n 6 --seed 1 --spacing 10 11 12")
    workspace.run("fratmae_phantom -d 8 -n 2 --seed 2 --spacing 10 11 12")
    workspace.run(f"fratmae_plan_and_preprocess -d 7 -preset vit_nano -np 1 --set {' '.join(SETTINGS)}")
    return workspace


@pytest.fixture(scope="session")
def text_tower(tmp_path_factory) -> Path:
    """Folder of a tiny CLIP of open_clip's with random weights."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    parts = {
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1},
        "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    folder = tmp_path_factory.mktemp("tower")
    config = {"model_cfg": {"embed_dim": 24, **parts}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    vision, text = open_clip.CLIPVisionCfg(**parts["vision_cfg"]), open_clip.CLIPTextCfg(**parts["text_cfg"])
    weights = open_clip.CLIP(24, vision, text).state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def pretraining(phantoms: Workspace) -> Path:
    """The artefact of two epochs on the phantoms."""
    folder = phantoms.folder / "pretraining"
    phantoms.run(f"fratmae_pretrain -d 7 -m fratmae_notext -device cpu -o {folder}")
    return folder
