"""Text towers for ContextAlign (paper section 2.4: the text encoder of CLIP ViT-B).

Any of open_clip's, from a tag, a file, a folder or the Hugging Face hub, or a BERT-like model by its HFTextEncoder.

Only the text tower is ever built. The hub's cache is asked first; without network the answer is one line, at once.
"""

from __future__ import annotations

import importlib.util
import json
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
from safetensors.torch import load_file
from torch import Tensor, nn

from nnunet_fratmae.base.command import UserError

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
CONFIGS = ("open_clip_config.json", "config.json")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
NO_VISION = {"image_size": 1, "patch_size": 1, "width": 64, "layers": 0}  # open_clip builds no text tower alone
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
        try:
            config = json.loads((folder / CONFIGS[0]).read_text(encoding="utf-8"))["model_cfg"]
        except UNREADABLE:
            raise UserError(f"{folder / CONFIGS[0]}: is not a configuration of open_clip (no model_cfg)") from None
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
    length = text_config.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    options = text_config.get("tokenizer_kwargs") or {}
    model, vocabulary = text_config.get("hf_model_name"), text_config.get("hf_tokenizer_name")
    with _hub(tower):
        if model:
            _need_transformers(tower)
            is_there = folder and _model_type(folder) in arch_dict
            source = folder if is_there else _hub_folder(model, CONFIGS[1:])
            text_config |= {"hf_model_name": str(source), "hf_model_pretrained": False}
        if vocabulary:
            _need_transformers(tower)
            is_there = folder and any((folder / file).is_file() for file in TOKENIZERS)
            vocabulary = str(folder if is_there else _hub_folder(vocabulary, TOKENIZERS))
    with _reading(f"text tower {tower}: its configuration"):
        clip = open_clip.CustomTextCLIP(
            config["embed_dim"], NO_VISION, text_config, quick_gelu=config.get("quick_gelu", False)
        )
        if vocabulary:
            mode = text_config.get("tokenizer_mode")
            tokenizer = HFTokenizer(vocabulary, context_length=length, tokenizer_mode=mode, **options)
        else:
            tokenizer = open_clip.SimpleTokenizer(context_length=length, **options)
    return clip.text, tokenizer


def _load_text(text: nn.Module, path: Path, tower: str, is_quick: bool) -> None:
    """Load the text weights of a CLIP checkpoint; every weight of the tower must be there, and no other."""
    with _reading(f"{path}"):
        if _is_archive(path):  # OpenAI's own files are TorchScript
            if not is_quick:
                _refuse_plain_gelu(tower, path.name)
            state = torch.jit.load(path, map_location="cpu").state_dict()
        elif path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
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
    text.load_state_dict(state)


def _is_archive(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.endswith("/constants.pkl") for name in file.namelist())


# ----------------------------------------------------------------------------------------------------- Hugging Face


def _hugging_face_text(folder: Path, tower: str) -> tuple[nn.Module, Callable]:
    """A BERT-like text model, the mean of its tokens as the embedding, and its tokenizer."""
    _need_transformers(tower)
    from open_clip.hf_model import HFTextEncoder

    if (kind := _model_type(folder)) not in ENCODERS:
        raise UserError(f"text tower {tower}: model_type {kind!r} cannot be used; it must be {', '.join(ENCODERS)}")
    if not any((folder / file).is_file() for file in TOKENIZERS):
        raise UserError(f"text tower {tower}: no tokenizer in the folder ({', '.join(TOKENIZERS)})")
    with _reading(f"text tower {tower}: the model"), _quiet_transformers():
        width = json.loads((folder / CONFIGS[1]).read_text(encoding="utf-8"))["hidden_size"]
        text = HFTextEncoder(str(folder), output_dim=width, pooler_type="mean_pooler", pretrained=False)
        text.transformer, found = type(text.transformer).from_pretrained(
            folder, add_pooling_layer=False, output_loading_info=True
        )
        tokenizer = HFTokenizer(str(folder))
    if found["missing_keys"]:
        raise UserError(f"text tower {tower}: the weights are of another model; {len(found['missing_keys'])} of "
                        f"{len(text.transformer.state_dict())} are missing")  # fmt: skip
    return text.float(), tokenizer


def _model_type(folder: Path) -> str | None:
    try:
        return json.loads((folder / CONFIGS[1]).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


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
