"""Text towers for ContextAlign (paper section 2.4: the text encoder of CLIP ViT-B).

Any of open_clip's, from a tag, a file, a folder or the Hugging Face hub, or a BERT-like model by its HFTextEncoder.

Only the text tower is ever built. The hub's cache is asked first; without network the answer is one line, at once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import get_session
from open_clip.hf_configs import arch_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.tokenizer import HFTokenizer
from safetensors import SafetensorError
from torch import Tensor, nn

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.jsons import read_object
from nnunet_fratmae.base.weights import check_finite, is_torchscript, read_checkpoint, read_safetensors

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
CONFIGS = ("open_clip_config.json", "config.json")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
NO_VISION = {"image_size": 1, "patch_size": 1, "width": 64, "layers": 0}  # open_clip builds no text tower alone
TOKENIZER_OPTIONS = ("clean", "strip_sep_token", "language", "use_fast")
"""What a configuration may tell a tokenizer; trust_remote_code, cache_dir and the like are the user's."""
CODE_KEYS = {"trust_remote_code", "auto_map", "hf_trust_remote_code", "custom_pipelines"}
"""Keys with which a configuration asks for code that lies beside it or on the hub."""
MOST_BYTES = 16 * 2**20  # of a configuration; that of a tokenizer lists added words
MOST_SIZES = {
    "embed_dim": 8192, "context_length": 8192, "vocab_size": 2**20, "width": 8192, "heads": 256, "layers": 200,
    "hidden_size": 8192, "num_hidden_layers": 200, "num_attention_heads": 256, "intermediate_size": 2**16,
    "max_position_embeddings": 2**16, "type_vocab_size": 2**16,
}  # fmt: skip
"""Of a text tower; open_clip's largest has 1,280 numbers, 32 layers and 256,300 words."""
ENCODERS = ("bert", "roberta", "xlm-roberta")
REACH_SECONDS = 3
UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile,
              pickle.UnpicklingError, SafetensorError)  # fmt: skip


class TextTower(nn.Module):
    """Prompts to embeddings. Always in evaluation mode: a tower that is trained has no dropout either, so that a step
    depends on nothing but weights and data.

    Attributes:
        name: of the tower and its weights, without the path of a file or folder.
        dim: length of an embedding.
    """

    def __init__(self, name: str, text: nn.Module, tokenizer: Callable[[list[str]], Tensor]) -> None:
        super().__init__()
        self.name = name
        self.text = text
        self.tokenizer = tokenizer
        self.eval()
        with torch.no_grad():
            self.dim = self.encode(["PET"]).shape[1]

    def train(self, mode: bool = True) -> TextTower:
        return super().train(False)

    def encode(self, prompts: list[str]) -> Tensor:
        """Embeddings (B, dim), not normalised, on the tower's device; with a graph unless torch.no_grad is on."""
        tokens = self.tokenizer(prompts).to(next(self.parameters()).device)
        embedding = self.text(tokens)
        return embedding[0] if isinstance(embedding, tuple) else embedding  # CoCa returns the tokens as well


def embed_prompts(tower: TextTower, prompts: Sequence[str]) -> dict[str, Tensor]:
    """The embedding (dim,) of each different prompt, on the CPU: all that is needed of a frozen tower."""
    unique = list(dict.fromkeys(prompts))
    embedded: dict[str, Tensor] = {}
    with torch.no_grad():
        for start in range(0, len(unique), 64):
            batch = unique[start : start + 64]
            embedded |= zip(batch, tower.encode(batch).float().cpu(), strict=True)
    return embedded


def load_tower(tower: str, weights: str | None = None) -> TextTower:
    """A pretrained text tower.

    Args:
        tower: a model of open_clip ("ViT-B-32-quickgelu"), a folder of open_clip or of a Hugging Face text model (also
            as "local-dir:/folder"), or a repository of either on the hub ("hf-hub:org/name" or "org/name").
        weights: for a model of open_clip a tag ("openai") or a file (.safetensors, .pt, .bin; also OpenAI's own
            archive); a folder and a repository have their own.

    Raises:
        UserError: unknown tower or tag, weights absent, damaged or of another network, the hub out of reach.
    """
    folder = Path(tower.removeprefix("local-dir:")).expanduser()
    repository = tower.removeprefix("hf-hub:")
    model = tower.replace("/", "-")
    if model in open_clip.list_models():
        return _built_in(model, weights)
    if weights is not None and (folder.is_dir() or repository != tower or tower.count("/") == 1):
        raise UserError(f"text tower {tower} has weights of its own; leave out {weights!r} (set the weights to null)")
    if folder.is_dir():
        return _from_folder(folder, tower, folder.resolve().name)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repository):
        with _hub(tower):
            found = _hub_folder(repository, CONFIGS)
            found = _hub_folder(repository, WEIGHTS if (found / CONFIGS[0]).is_file() else HF_WEIGHTS)
        return _from_folder(found, tower, f"hf-hub:{repository}")
    if "/" in tower or tower.startswith("local-dir:"):
        raise UserError(f"text tower {tower}: there is no such folder")
    near = ", ".join(get_close_matches(model, open_clip.list_models(), n=3, cutoff=0.5)) or "ViT-B-32-quickgelu"
    raise UserError(f"text tower {tower}: unknown; near it are {near}; a folder or hf-hub:org/name will do as well")


# -------------------------------------------------------------------------------------------------------- open_clip


def _built_in(model: str, weights: str | None) -> TextTower:
    """A model that open_clip has the configuration of, with the weights of a tag or file."""
    config = open_clip.get_model_config(model)
    tags = open_clip.list_pretrained_tags_by_model(model)
    near = get_close_matches(weights or "openai", tags, n=4, cutoff=0) or ["none"]
    known = f"{model} has the tags {', '.join(near)}{', ...' if len(tags) > 4 else ''}, or give the path of a file"
    if weights is None:
        raise UserError(f"text tower {model}: no weights given; {known}")
    tag = open_clip.get_pretrained_cfg(model, weights)
    path = Path(weights).expanduser()
    if tag:
        if "hf_model_name" not in config["text_cfg"] and tag.get("quick_gelu") and not config.get("quick_gelu"):
            _refuse_plain_gelu(model, weights)
        repository, filename = tag["hf_hub"].rsplit("/", 1)
        with _hub(f"{model} {weights}"):
            files = (str(Path(filename).with_suffix(".safetensors")), filename) if filename else WEIGHTS
            folder = _hub_folder(repository, files)
        path = next(folder / name for name in files if (folder / name).is_file())
    elif not path.is_file():
        what = "there is no such file" if path.suffix or "/" in weights else "unknown tag"
        raise UserError(f"weights {weights} of the text tower: {what}; {known}")
    text, tokenizer = _clip_text(config, None, model)
    _load_text(text, path, model, bool(config.get("quick_gelu")))
    return TextTower(f"{model}:{weights if tag else path.name}", text, tokenizer)


def _refuse_plain_gelu(model: str, weights: str) -> None:
    raise UserError(f"text tower {model} with weights {weights}: these were trained with QuickGELU; say "
                    f"{model}-quickgelu")  # fmt: skip


def _from_folder(folder: Path, tower: str, name: str) -> TextTower:
    """A folder of open_clip (open_clip_config.json) or of a Hugging Face text model (config.json)."""
    if (folder / CONFIGS[0]).is_file():
        config = _read_config(folder / CONFIGS[0]).get("model_cfg")
        if not isinstance(config, dict) or not isinstance(config.get("text_cfg"), dict):
            raise UserError(f"{folder / CONFIGS[0]}: is not a configuration of open_clip (no model_cfg)")
        path = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
        if path is None:
            raise UserError(f"text tower {tower}: no weights in the folder ({' or '.join(WEIGHTS)})")
        text, tokenizer = _clip_text(config, folder, tower)
        _load_text(text, path, tower, bool(config.get("quick_gelu")))
        return TextTower(name, text, tokenizer)
    if (folder / CONFIGS[1]).is_file():
        return TextTower(name, *_hugging_face_text(folder, tower))
    raise UserError(f"text tower {tower}: neither {' nor '.join(CONFIGS)} in the folder")


def _clip_text(config: dict[str, Any], folder: Path | None, tower: str) -> tuple[nn.Module, Callable]:
    """The text tower of an open_clip configuration, with random weights, and its tokenizer.

    Where the configuration names a Hugging Face model, its config.json and tokenizer are taken from `folder` if they
    are there, else from the hub.
    """
    text_config = dict(config["text_cfg"])
    _check_sizes(text_config | {"embed_dim": config.get("embed_dim")}, tower)
    length = text_config.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    options = text_config.get("tokenizer_kwargs") or {}
    if strange := sorted(set(options) - set(TOKENIZER_OPTIONS)) if isinstance(options, dict) else ["no options"]:
        raise UserError(f"text tower {tower}: its configuration gives the tokenizer {', '.join(strange)[:80]}; only "
                        f"{', '.join(TOKENIZER_OPTIONS)} are taken, since others could run code")  # fmt: skip
    model, vocabulary = text_config.get("hf_model_name"), text_config.get("hf_tokenizer_name")
    with _hub(tower):
        if model:
            _need_transformers(tower)
            is_there = folder and _model_type(folder) in arch_dict
            source = folder if is_there else _hub_folder(model, CONFIGS[1:])
            _check_folder(source)
            text_config |= {"hf_model_name": str(source), "hf_model_pretrained": False}
        if vocabulary:
            _need_transformers(tower)
            is_there = folder and any((folder / file).is_file() for file in TOKENIZERS)
            vocabulary = folder if is_there else _hub_folder(vocabulary, TOKENIZERS)
            _check_folder(vocabulary)
    with _reading(f"text tower {tower}: its configuration"):
        clip = open_clip.CustomTextCLIP(
            config["embed_dim"], NO_VISION, text_config, quick_gelu=config.get("quick_gelu", False)
        )
        if vocabulary:
            mode = text_config.get("tokenizer_mode")
            tokenizer = HFTokenizer(
                str(vocabulary), context_length=length, tokenizer_mode=mode, trust_remote_code=False, **options
            )
        else:
            tokenizer = open_clip.SimpleTokenizer(context_length=length, **options)
    return clip.text, tokenizer


def _load_text(text: nn.Module, path: Path, tower: str, is_quick: bool) -> None:
    """Load the text weights of a CLIP checkpoint; every weight of the tower must be there, and no other."""
    if is_torchscript(path):
        state = _of_openai(path, tower, is_quick)
    elif path.suffix == ".safetensors":
        state = read_safetensors(path)
    else:
        state = read_checkpoint(path)
    with _reading(f"{path}"):
        state = state.get("state_dict", state)  # of a training run
        state = {name.removeprefix("module."): value for name, value in state.items()}
        if "positional_embedding" in state:
            state = convert_to_custom_text_state_dict(state)
        state = {name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")}
        state.pop("transformer.embeddings.position_ids", None)  # written by transformers before 4.31, a constant
        wanted = text.state_dict()
        fitting = sum(name in state and state[name].shape == value.shape for name, value in wanted.items())
    if fitting < len(wanted) or len(state) > len(wanted):
        raise UserError(f"{path}: is not a checkpoint of {tower}; {fitting} of the {len(wanted)} weights of its text "
                        f"tower fit, and the file has {len(state)}")  # fmt: skip
    check_finite(state, path)
    text.load_state_dict(state)


def _of_openai(path: Path, tower: str, is_quick: bool) -> dict[str, Tensor]:
    """The weights of a TorchScript archive, if it is, byte for byte, one that OpenAI gave out.

    Such an archive is a program, which torch.jit.load runs: it may write and overwrite files. OpenAI's are known by
    their SHA-256, which open_clip has in their addresses.

    Raises:
        UserError: it is another, or the tower has no QuickGELU.
    """
    if not is_quick:
        _refuse_plain_gelu(tower, path.name)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    addresses = [tags.get("openai", {}).get("url", "") for tags in open_clip.pretrained._PRETRAINED.values()]
    if not any(f"/{digest}/" in address for address in addresses):
        raise UserError(f"{path}: is a TorchScript archive, which is a program, and was not run; save its weights as "
                        ".safetensors where you trust it, or for OpenAI's say pretrain.text_weights=openai")
    with _reading(f"{path}"):
        return torch.jit.load(path, map_location="cpu").state_dict()


# ----------------------------------------------------------------------------------------------------- Hugging Face


def _hugging_face_text(folder: Path, tower: str) -> tuple[nn.Module, Callable]:
    """A BERT-like text model, the mean of its tokens as the embedding, and its tokenizer."""
    _need_transformers(tower)
    from open_clip.hf_model import HFTextEncoder

    if (kind := _model_type(folder)) not in ENCODERS:
        raise UserError(f"text tower {tower}: model_type {kind!r} cannot be used; it must be {', '.join(ENCODERS)}")
    if not any((folder / file).is_file() for file in TOKENIZERS):
        raise UserError(f"text tower {tower}: no tokenizer in the folder ({', '.join(TOKENIZERS)})")
    _check_folder(folder)
    with _reading(f"text tower {tower}: the model"), _quiet_transformers():
        width = _read_config(folder / CONFIGS[1])["hidden_size"]
        text = HFTextEncoder(str(folder), output_dim=width, pooler_type="mean_pooler", pretrained=False)
        text.transformer, found = type(text.transformer).from_pretrained(
            folder, add_pooling_layer=False, output_loading_info=True, trust_remote_code=False
        )
        tokenizer = HFTokenizer(str(folder), trust_remote_code=False)
    if found["missing_keys"]:
        raise UserError(f"text tower {tower}: the weights are of another model; {len(found['missing_keys'])} of "
                        f"{len(text.transformer.state_dict())} are missing")  # fmt: skip
    check_finite(text.state_dict(), folder)
    return text.float(), tokenizer


def _model_type(folder: Path) -> str | None:
    return _read_config(folder / CONFIGS[1]).get("model_type") if (folder / CONFIGS[1]).is_file() else None


def _read_config(path: Path) -> dict[str, Any]:
    """A configuration that comes with weights.

    Raises:
        UserError: it is none, or wants to run code of its own.
    """
    config = read_object(path, "copy the text tower again, or take another", MOST_BYTES)
    if wanted := sorted(_keys(config) & CODE_KEYS):
        raise UserError(f"{path}: asks for code from elsewhere ({', '.join(wanted)}), which is never run here; take a "
                        "text tower without")  # fmt: skip
    return config


def _keys(value: Any) -> set[str]:
    """All keys of JSON that have a value, on every level."""
    if isinstance(value, dict):
        return {key for key in value if value[key]}.union(*map(_keys, value.values()))
    return set().union(*map(_keys, value)) if isinstance(value, list) else set()


def _check_folder(folder: Path) -> None:
    """Raises UserError where a configuration of transformers in the folder wants to run code, or is of no size."""
    for name in (CONFIGS[1], "tokenizer_config.json"):
        if (folder / name).is_file():
            config = _read_config(folder / name)
            if name == CONFIGS[1]:
                _check_sizes(config, str(folder))


def _check_sizes(config: dict[str, Any], tower: str) -> None:
    """Raises UserError where a configuration would build a network larger than any text tower's."""
    for name, most in MOST_SIZES.items():
        if name in config and not (type(config[name]) is int and 0 < config[name] <= most):
            raise UserError(f"text tower {tower}: its configuration has {name} {str(config[name])[:20]}, it must be a "
                            f"whole number from 1 to {most}")  # fmt: skip


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without progress bar and table of the weights that are left out (the pooler's)."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def _need_transformers(tower: str) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f"text tower {tower}: needs the package transformers; `pip install transformers`")


def _hub_folder(repository: str, files: Sequence[str]) -> Path:
    """The cached folder of a repository with one of `files`, the best first, fetched if it is not there yet.

    Configurations and tokenizers, which are small, are fetched along. What is in the cache is taken as it is.
    """
    for file in files:
        if isinstance(path := try_to_load_from_cache(repository, file), str):
            return Path(path).parent
    _reach_hub()
    there = HfApi().list_repo_files(repository)
    chosen = next((file for file in files if file in there), None)
    if chosen is None:
        raise UserError(f"hub repository {repository}: has no {' or '.join(files)}; take another")
    patterns = ["*.json", "*.txt", "*.model", chosen]
    return Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=["*/*"]))


def _reach_hub() -> None:
    """Raises ConnectionError unless the hub answers soon. Its own library would try for the better part of a minute."""
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    answers: list[object] = []

    def ask() -> None:
        with suppress(Exception):  # of whichever HTTP library the hub's own uses
            answers.append(get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS))

    # In a thread, because looking up the name of the host knows no time limit
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    if not answers:
        raise ConnectionError("the Hugging Face hub does not answer")


@contextmanager
def _hub(tower: str) -> Iterator[None]:
    """What goes wrong between us and the hub, in one line."""
    way_out = "give the weights as a file or the tower as a folder"
    try:
        yield
    except UserError:
        raise
    except ConnectionError as error:
        raise UserError(f"text tower {tower}: is not in the cache and cannot be fetched ({error}); {way_out}, copied "
                        "from a machine with network") from None  # fmt: skip
    except Exception as error:  # HTTP errors of whichever library: the repository is absent, private, not for all
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise UserError(f"text tower {tower}: cannot be fetched from the hub ({reason}); {way_out}") from error


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        reason = f"({type(error).__name__}); it is damaged, cut off or of another kind"
        raise UserError(f"{what} cannot be read {reason}") from error
