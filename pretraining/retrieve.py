"""fratmae_retrieve: tracer and diagnosis of studies by the text that their PET is nearest to (zero-shot)."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from nnunet_fratmae.base.command import UserError, check_device, find_dataset, run_command
from nnunet_fratmae.base.files import renamed
from nnunet_fratmae.base.tables import csv_text
from nnunet_fratmae.base.weights import check_finite, read_safetensors
from nnUNet_raw_conversion.clinical import ClinicalRecord, prompt, read_clinical
from plans.contract import CONTRACT_NAME, WEIGHTS_NAME
from plans.reader import load_plans
from plans.settings import Pretrain, Settings, WholeBody
from pretraining.checkpoint import LATEST, load_run
from pretraining.export import ALIGN_NAME
from pretraining.pretrain import check_plans

FIELDS = ("tracer", "diagnosis")


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(prog="fratmae_retrieve", description=__doc__)
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="dataset whose studies are looked at")
    parser.add_argument("-m", type=Path, required=True, metavar="FOLDER",
                        help="output folder of fratmae_pretrain or of fratmae_export")  # fmt: skip
    parser.add_argument("-chk", metavar="FILE", help=f"which checkpoint (default: {LATEST}, where there is one)")
    parser.add_argument("-o", type=Path, required=True, metavar="FILE", help="table to write (csv)")
    parser.add_argument("-device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--text_tower", metavar="NAME", help="the text tower, if its folder has moved")
    parser.add_argument("--text_weights", metavar="FILE", help="weights of the text tower, if they have moved")
    run_command(parser, _run)


def candidates(records: Iterable[ClinicalRecord], field: str) -> dict[str, list[str]]:
    """The prompts of all records by their value of `field` ("tracer" or "diagnosis"), each prompt once."""
    found: dict[str, set[str]] = {}
    for record in records:
        value = getattr(record, field)
        if value is not None:
            found.setdefault(value, set()).add(prompt(record))
    return {value: sorted(prompts) for value, prompts in sorted(found.items())}


def classify(pets: Tensor, texts: dict[str, Tensor]) -> tuple[list[str], Tensor]:
    """The value of each PET and its similarity to every value.

    A value is the mean direction of all prompts that have it (CLIP's prompt ensembling), so that age and sex average
    out.

    Args:
        pets: (N, dim) unit vectors. texts: by value, (prompts, dim) unit vectors.

    Returns:
        Values (N,) and cosines (N, number of values).
    """
    centres = torch.stack([normalize(embedded.mean(0), dim=0) for embedded in texts.values()])
    similarity = pets @ centres.T
    return [list(texts)[i] for i in similarity.argmax(1).tolist()], similarity


@dataclass(frozen=True)
class Run:
    """A pretraining: its weights by name, its settings and, where they are known, the names of its cases."""

    weights: dict[str, Tensor]
    settings: Settings
    trained: set[str] | None
    held_out: set[str]

    def part(self, start: str) -> dict[str, Tensor]:
        """The weights whose names begin so, without that beginning."""
        return {k.removeprefix(start): v for k, v in self.weights.items() if k.startswith(start)}

    def saw(self, name: str) -> str:
        """Whether a case was held out: "yes", "no" if it was trained on, "new" if neither, "" if that is not known."""
        if self.trained is None:
            return ""
        return "yes" if name in self.held_out else "no" if name in self.trained else "new"


def read_run(folder: Path, checkpoint: str | None) -> Run:
    """A run of fratmae_pretrain, or without a checkpoint an artefact of fratmae_export.

    Raises:
        UserError: it is neither, or cannot be read.
    """
    from nnunet_fratmae.artefact import check_artefact

    path = folder / (checkpoint or LATEST)
    if path.is_file():
        state = load_run(path)
        identity = state["identity"]
        try:
            settings = Settings.from_json(identity["settings"])
            return Run(state["model"], settings, set(identity["train"]), set(identity["held_out"]))
        except (UserError, KeyError, TypeError) as error:
            raise UserError(f"{path}: its settings are not those of a pretraining ({error})") from None
    if checkpoint or not (folder / CONTRACT_NAME).is_file():
        raise UserError(f"-m {folder}: there is no {path.name}; give the output folder of fratmae_pretrain")
    contract = check_artefact(folder)
    tower, tag = contract.text_tower or Pretrain.text_tower, Pretrain.text_weights
    if not tower.startswith("hf-hub:") and ":" in tower:  # a model of open_clip with its tag
        tower, tag = tower.split(":", 1)
    pretrain = Pretrain(method=contract.method, text_tower=tower, text_weights=tag)
    whole = WholeBody(grid=contract.grid, patch=contract.patch, k=contract.k, stack=contract.stack)
    settings = Settings(preset=contract.preset, token_patch=contract.token_patch, wholebody=whole, pretrain=pretrain)
    weights = {f"fratmae.encoders.{name}": value for name, value in read_safetensors(folder / WEIGHTS_NAME).items()}
    aligned = folder / ALIGN_NAME
    weights |= read_safetensors(aligned) if aligned.is_file() else {}
    check_finite(weights, folder)
    return Run(weights, settings, None, set())


def _run(args: argparse.Namespace) -> None:
    run = read_run(args.m, args.chk)
    settings = run.settings
    if not settings.pretrain.has_text:
        raise UserError(f"-m {args.m}: was pretrained without text (-m {settings.pretrain.method}); {ALIGN_NAME} is "
                        "made by the arms fratmae and mae_text")  # fmt: skip
    check_device(args.device)
    from pretraining.data import list_cases
    from pretraining.evaluation import middle_patch

    preprocessed = find_dataset("nnUNet_preprocessed", args.d)
    plans, dataset_json = load_plans(preprocessed)
    check_plans([preprocessed], [(plans, dataset_json)], settings)
    table = preprocessed / "clinical.csv"
    if not table.is_file():
        raise UserError(f"{table}: is not there; the tracers and diagnoses to choose from are taken from it")
    records = read_clinical(table, {"case_id": "case_id"})
    cases = list_cases(preprocessed, plans, dataset_json)
    _check_named(args.m, settings.pretrain, args.text_tower, args.text_weights)
    encoder, align, tower = _networks(run, args.text_tower, args.text_weights)
    encoder.to(args.device)
    with torch.no_grad():
        patches = (middle_patch(case, settings)[None, 1:].to(args.device) for case in tqdm(cases, "studies"))
        cls = torch.cat([encoder(patch)[:, 0].cpu() for patch in patches])
        pets = align.embed_pet(cls)
        columns = {}
        for field in FIELDS:
            prompts = candidates(records.values(), field)
            if len(prompts) > 1:
                columns[field] = classify(pets, {v: align.embed_text(tower.encode(p)) for v, p in prompts.items()})
    if not columns:
        raise UserError(f"{table}: has fewer than two tracers and fewer than two diagnoses; there is nothing to choose")
    rows = _rows([c.path.stem for c in cases], [run.saw(c.name) for c in cases], records, columns)
    _write(args.o, rows)
    _summary(rows, columns)
    print(f"table: {args.o}")


def _check_named(folder: Path, run: Pretrain, tower: str | None, weights: str | None) -> None:
    """See that a run, which may have been downloaded, names a text tower that open_clip knows, or one that was put on
    this machine apart from it.

    Raises:
        UserError: it names a folder or file of its own, one by a path that depends on where the command runs, or a
            repository on the hub.
    """
    import open_clip

    is_known = run.text_tower.replace("/", "-") in open_clip.list_models()
    named = [] if tower else [("--text_tower", run.text_tower, is_known)]
    if not weights and not tower and run.text_weights is not None:
        tags = open_clip.list_pretrained_tags_by_model(run.text_tower.replace("/", "-")) if is_known else ()
        named.append(("--text_weights", run.text_weights, run.text_weights in tags))
    for option, value, is_fine in named:
        path = Path(value.removeprefix("local-dir:"))
        is_apart = path.is_absolute() and folder.resolve() not in (path.resolve(), *path.resolve().parents)
        if not is_fine and not is_apart:
            raise UserError(f"text tower {value[:100]!r}: so the run -m {folder} names it, which may have brought it "
                            f"along or would fetch it from the network; if you trust it, say {option} with its path or "
                            "name")  # fmt: skip


def _networks(run: Run, tower_name: str | None, weights: str | None) -> tuple:
    """The PET encoder, ContextAlign and the text tower of a run.

    Raises:
        UserError: the tower cannot be loaded or is not that of the run.
    """
    from nnunet_fratmae.artefact import compare
    from nnunet_fratmae.networks.vit import ViTEncoder
    from pretraining.context_align import ContextAlign
    from pretraining.text import load_tower

    settings = run.settings
    encoder = ViTEncoder(settings.wholebody.patch, settings.token_patch, **settings.sizes.encoder).eval()
    name, folder_has_its_own = tower_name or settings.pretrain.text_tower, tower_name and Path(tower_name).is_dir()
    tower = load_tower(name, weights or (None if folder_has_its_own else settings.pretrain.text_weights))
    align = ContextAlign(settings.sizes.embed_dim, tower.dim)
    aligned, trained = run.part("context_align."), run.part("text_tower.")
    if "text_projection.weight" not in aligned:
        raise UserError(f"-m: the run has no projection of texts; {ALIGN_NAME} of fratmae_export is missing or damaged")
    if aligned["text_projection.weight"].shape != align.text_projection.weight.shape:
        raise UserError(f"text tower {name}: its embeddings have {tower.dim} numbers, the run's had "
                        f"{aligned['text_projection.weight'].shape[1]}; give that tower with --text_tower")  # fmt: skip
    for network, part in ((encoder, run.part("fratmae.encoders.PET.")), (align, aligned), (tower, trained)):
        problems = compare(network.state_dict(), part) if part or network is not tower else []
        if problems:
            raise UserError(f"-m: the run's weights do not fit its settings ({'; '.join(problems[:3])[:200]}); copy it "
                            "again")  # fmt: skip
        if part:
            network.load_state_dict(part)
    return encoder, align.eval(), tower


def _rows(names: list[str], held_out: list[str], records: dict, columns: dict) -> list[dict[str, str]]:
    rows = []
    for i, (name, was_held_out) in enumerate(zip(names, held_out, strict=True)):
        row = {"case_id": name, "held_out": was_held_out}
        for field, (values, _) in columns.items():
            truth = getattr(records[name], field) if name in records else None
            row |= {field: truth or "", f"{field}_retrieved": values[i]}
        rows.append(row)
    return rows


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with renamed(path) as partial:
        partial.write_text(csv_text(list(rows[0]), rows), encoding="utf-8")


def _summary(rows: list[dict[str, str]], columns: dict) -> None:
    """Accuracy on held-out, new and trained cases, plain and balanced over the values, beside the commonest value."""
    kinds = {"yes": "held out", "new": "never seen", "no": "trained on", "": "(trained on or not, that is not known)"}
    for field, (_, similarity) in columns.items():
        for is_held_out, what in kinds.items():
            known = [row for row in rows if row[field] and row["held_out"] == is_held_out]
            if not known:
                continue
            plain, balanced, commonest = scores([(row[field], row[f"{field}_retrieved"]) for row in known])
            print(f"{field}, {len(known)} cases {what}: {plain:.3f} right (always the commonest: {commonest:.3f}); "
                  f"balanced over values {balanced:.3f} (guessing: {1 / similarity.shape[1]:.3f})")  # fmt: skip


def scores(pairs: list[tuple[str, str]]) -> tuple[float, float, float]:
    """Accuracy, mean recall of the values, accuracy of always the commonest value.

    Args:
        pairs: (true, retrieved) values.
    """
    truths = [truth for truth, _ in pairs]
    values = sorted(set(truths))
    recalls = [sum(t == f == value for t, f in pairs) / truths.count(value) for value in values]
    plain = sum(truth == found for truth, found in pairs) / len(pairs)
    return plain, sum(recalls) / len(values), max(map(truths.count, values)) / len(pairs)
