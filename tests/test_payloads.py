"""Files of weights that hold code: no command runs it, each ends in one line. The code would write a file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nnunet_fratmae import predict_stage
from nnunet_fratmae.artefact import load_encoders
from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.weights import is_torchscript, read_checkpoint
from nnunet_fratmae.networks.vit import dual_encoders
from plans.models import check_architecture, read_model_files
from plans.settings import PRESETS
from pretraining import checkpoint, retrieve
from pretraining.text import load_tower
from tests.test_plans import contract
from tests.test_text import TINY


class Payload:
    """A pickle that makes a folder where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


class Program(torch.nn.Module):
    """A module of TorchScript, whose loading runs what it was saved with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def pickled(path: Path, marker: Path) -> Path:
    """A checkpoint as torch.save writes it, with a payload among its weights."""
    torch.save({"network_weights": {"a": torch.zeros(1)}, "model": Payload(marker), "init_args": Payload(marker)}, path)
    return path


def bare_pickle(path: Path, marker: Path) -> Path:
    path.write_bytes(pickle.dumps(Payload(marker)))
    return path


def torchscript(path: Path, marker: Path) -> Path:
    torch.jit.save(torch.jit.script(Program()), str(path))
    return path


def bomb(path: Path, marker: Path) -> Path:
    """An archive that would unpack to far more than it is."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    return path


PAYLOADS = [pickled, bare_pickle, torchscript, bomb]


@pytest.fixture
def marker(tmp_path):
    """Where the payload would show; that it can is seen by unpickling it."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(path)))
    path.rmdir()
    yield path
    assert not path.exists(), "code in a file of weights was executed"


def one_line(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500 and message
    return message


@pytest.mark.parametrize("payload", PAYLOADS)
def test_readers_of_checkpoints_run_nothing(payload, tmp_path, marker):
    path = payload(tmp_path / "weights.pth", marker)
    for read in (read_checkpoint, checkpoint.load, checkpoint.load_run):
        assert str(path) in one_line(read, path)
    assert is_torchscript(path) == (payload is torchscript)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", ["checkpoint_latest.pth", "checkpoint_final.pth", "checkpoint_best.pth"])
def test_a_training_that_goes_on_runs_nothing(payload, name, tmp_path, marker, make_trainer):
    trainer = make_trainer(epochs=1)
    trainer.was_initialized = False  # as --c and --val find it
    path = payload(Path(trainer.output_folder) / name, marker)
    assert str(path) in one_line(trainer.load_checkpoint, str(path))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_text_weights_run_nothing(payload, tmp_path, marker):
    path = payload(tmp_path / "weights.pt", marker)
    assert str(path) in one_line(load_tower, "ViT-B-32-quickgelu", str(path))
    folder = tmp_path / "tower"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": TINY | {"quick_gelu": True}}), encoding="utf-8"
    )
    shutil.copy(path, folder / "open_clip_pytorch_model.bin")
    one_line(load_tower, str(folder), None)


@pytest.mark.parametrize(
    "where",
    ["tokenizer_kwargs", "text_cfg", "config.json", "tokenizer_config.json", "auto_map", "bert", "bert_tokenizer"],
)
def test_a_tower_that_brings_code_is_refused(where, tmp_path, marker):
    """Code of the hub's kind: a module beside the configuration, which transformers would import."""
    pytest.importorskip("transformers")
    folder = tmp_path / "tower"
    folder.mkdir()
    for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py"):
        (folder / name).write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n", encoding="utf-8")
    remote = {"auto_map": {"AutoModel": "modeling_evil.Evil", "AutoConfig": "configuration_evil.Evil",
                           "AutoTokenizer": ["tokenization_evil.Evil", None]}}  # fmt: skip
    text = {"hf_model_name": "org/evil", "hf_tokenizer_name": "org/evil", "hf_model_pretrained": False}
    text |= {"tokenizer_kwargs": {"trust_remote_code": True}} if where == "tokenizer_kwargs" else {}
    text |= {"trust_remote_code": True} if where == "text_cfg" else {}
    if not where.startswith("bert"):
        (folder / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": {"embed_dim": 24, "text_cfg": text}}), encoding="utf-8"
        )
        save_file({"text.a": torch.zeros(1)}, folder / "open_clip_model.safetensors")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = {"model_type": "bert", **sizes} | (remote if where in ("config.json", "auto_map", "bert") else {})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokens = {"tokenizer_class": "Evil"} | (remote if "tokenizer" in where else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens), encoding="utf-8")
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n", encoding="utf-8")
    message = one_line(load_tower, str(folder), None)
    assert "code" in message


@pytest.mark.parametrize("payload", PAYLOADS)
def test_prediction_of_stages_runs_nothing(payload, tmp_path, marker):
    path = payload(tmp_path / "checkpoint_final.pth", marker)
    architecture = {"network_class_name": predict_stage.NETWORK, "arch_kwargs": {
        "patch_size": [8, 24, 32], "token_patch": [4, 8, 8], **PRESETS["vit_nano"].encoder, "classes": ["a", "b"]}}
    plans = {"configurations": {"wholebody": {"architecture": architecture}}}
    dataset_json = {"channel_names": {"0": "CT", "1": "PET"}}
    assert str(path) in one_line(predict_stage.load_network, plans, dataset_json, path)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_retrieval_and_export_run_nothing(payload, tmp_path, marker):
    path = payload(tmp_path / "checkpoint_latest.pth", marker)
    assert str(path) in one_line(retrieve.read_run, tmp_path, None)
    assert str(path) in one_line(checkpoint.load_run, path)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_encoders_run_nothing(payload, tmp_path, marker):
    encoders = dual_encoders((8, 16, 16), (4, 8, 8), **PRESETS["vit_tiny"].encoder)
    contract().save(tmp_path / "encoders.json")
    path = payload(tmp_path / "encoders.safetensors", marker)
    assert str(path) in one_line(load_encoders, tmp_path, encoders)


# ------------------------------------------------------------------------------------------ what a run or plans name


@pytest.mark.parametrize("inside", ["run/tower", "relative", "org/evil"])
def test_retrieval_takes_no_tower_that_a_run_brings_along(inside, tmp_path):
    run = tmp_path / "run"
    (run / "tower").mkdir(parents=True)
    named = {"run/tower": str(run / "tower"), "relative": "run/tower", "org/evil": "hf-hub:org/evil"}[inside]
    options = retrieve.Pretrain(text_tower=named, text_weights=None)
    message = one_line(retrieve._check_named, run, options, None, None)
    assert "--text_tower" in message and named in message
    retrieve._check_named(run, options, named, None)  # the user says it


@pytest.mark.parametrize("weights, is_fine", [("openai", True), ("weights.pt", False), ("run/weights.pt", False)])
def test_retrieval_takes_known_towers(weights, is_fine, tmp_path):
    options = retrieve.Pretrain(text_weights=weights if is_fine else str(tmp_path / weights))
    run = tmp_path if weights == "weights.pt" else tmp_path / "run"
    if is_fine:
        retrieve._check_named(run, options, None, None)
    else:
        assert "--text_weights" in one_line(retrieve._check_named, run, options, None, None)
    (tmp_path / "apart.pt").touch()
    retrieve._check_named(tmp_path / "run", retrieve.Pretrain(text_weights=str(tmp_path / "apart.pt")), None, None)


GOOD = {
    "network_class_name": predict_stage.NETWORK,
    "arch_kwargs": {"patch_size": [8, 24, 32], "token_patch": [4, 8, 8], **PRESETS["vit_nano"].encoder,
                    "classes": ["early", "advanced"], "dropout": 0.1, "modalities": ["CT", "PET"]},
    "_kw_requires_import": [],
}  # fmt: skip


@pytest.mark.parametrize(
    "changes, kwargs, says",
    [
        ({"network_class_name": "os.system"}, {}, "none of FratMAE's"),
        ({"network_class_name": None}, {}, "none of FratMAE's"),
        ({"network_class_name": ["a"]}, {}, "none of FratMAE's"),
        ({"_kw_requires_import": ["classes"]}, {}, "_kw_requires_import"),
        ({"arch_kwargs": None}, {}, "arch_kwargs must be"),
        ({}, {"patch_size": [10**6, 10**6, 10**6]}, "patch_size"),
        ({}, {"patch_size": [4096, 4096, 4096]}, "patch_size"),
        ({}, {"token_patch": [0, 8, 8]}, "token_patch"),
        ({}, {"embed_dim": 10**6}, "no preset"),
        ({}, {"classes": "ab" * 50}, "classes"),
        ({}, {"dropout": float("nan")}, "dropout"),
        ({}, {"evil": 1}, "evil"),
    ],
)
def test_networks_of_foreign_plans_are_ours_and_of_a_size(changes, kwargs, says):
    check_architecture(GOOD, "plans.json")
    block = GOOD | {"arch_kwargs": GOOD["arch_kwargs"] | kwargs} | changes
    assert says in one_line(check_architecture, block, "plans.json")


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 10**5, b'{"a": 1, "a": 2}', b"[]", b"{", b""])
def test_plans_that_cannot_be_read_are_one_line(content, tmp_path):
    (tmp_path / "plans.json").write_bytes(content)
    (tmp_path / "dataset.json").write_text('{"file_ending": ".nii.gz"}', encoding="utf-8")
    assert "plans.json" in one_line(read_model_files, tmp_path, "...")


# ------------------------------------------------------------------------------------------------------ not finite


@pytest.mark.parametrize("kind", [torch.int8, torch.complex64, torch.bool])
def test_weights_of_other_numbers_than_the_networks_are_refused(kind, tmp_path, make_trainer):
    """torch would load them, without what they lost."""
    encoders = dual_encoders((8, 16, 16), (4, 8, 8), **PRESETS["vit_tiny"].encoder)
    weights = encoders.state_dict()
    contract().save(tmp_path / "encoders.json")
    save_file(weights | {"PET.norm.bias": weights["PET.norm.bias"].half()}, tmp_path / "encoders.safetensors")
    load_encoders(tmp_path, encoders)
    save_file(weights | {"PET.norm.bias": weights["PET.norm.bias"].to(kind)}, tmp_path / "encoders.safetensors")
    assert f"PET.norm.bias is of {kind}" in one_line(load_encoders, tmp_path, encoders)
    trainer = make_trainer()
    path = f"{trainer.output_folder}/checkpoint_final.pth"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=False)
    saved["network_weights"]["encoders.CT.norm.weight"] = saved["network_weights"]["encoders.CT.norm.weight"].to(kind)
    torch.save(saved, path)
    assert f"encoders.CT.norm.weight is of {kind}" in one_line(trainer.load_checkpoint, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_the_name_of_the_tensor(value, tmp_path, make_trainer):
    encoders = dual_encoders((8, 16, 16), (4, 8, 8), **PRESETS["vit_tiny"].encoder)
    weights = encoders.state_dict()
    contract().save(tmp_path / "encoders.json")
    save_file(weights, tmp_path / "encoders.safetensors")
    load_encoders(tmp_path, encoders)
    weights = load_file(tmp_path / "encoders.safetensors")
    weights["PET.norm.bias"][3] = value
    save_file(weights, tmp_path / "encoders.safetensors")
    assert "'PET.norm.bias' has NaN or infinite values" in one_line(load_encoders, tmp_path, encoders)

    trainer = make_trainer()
    path = f"{trainer.output_folder}/checkpoint_final.pth"
    trainer.save_checkpoint(path)
    trainer.load_checkpoint(path)
    with torch.no_grad():
        trainer.network.encoders["CT"].norm.weight[0] = value
    trainer.save_checkpoint(path)
    assert "'encoders.CT.norm.weight' has NaN" in one_line(trainer.load_checkpoint, path)
