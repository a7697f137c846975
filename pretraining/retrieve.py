"""fratmae_retrieve: tracer and diagnosis of studies by the text that their PET is nearest to (zero-shot)."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from nnUNet_raw_conversion.clinical import ClinicalRecord, prompt, read_clinical
from nnUNet_raw_conversion.command import UserError, check_device, find_dataset, renamed, run_command
from plans.preprocessed import load_plans
from plans.settings import Settings
from pretraining.checkpoint import LATEST, load
from pretraining.export import ALIGN_NAME

FIELDS = ("tracer", "diagnosis")


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(prog="fratmae_retrieve", description=__doc__)
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="dataset whose studies are looked at")
    parser.add_argument("-m", type=Path, required=True, metavar="FOLDER", help="output folder of fratmae_pretrain")
    parser.add_argument("-o", type=Path, required=True, metavar="FILE", help="table to write (csv)")
    parser.add_argument("-device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
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


def _run(args: argparse.Namespace) -> None:
    path = args.m / LATEST
    if not path.is_file():
        raise UserError(f"-m {args.m}: there is no {LATEST}; give the output folder of fratmae_pretrain")
    state = load(path)
    settings = Settings.from_json(state["identity"]["settings"])
    if not settings.pretrain.has_text:
        raise UserError(f"-m {args.m}: was pretrained without text (-m {settings.pretrain.method}); {ALIGN_NAME} is "
                        "made by the arms fratmae and mae_text")  # fmt: skip
    check_device(args.device)
    from pretraining.data import list_cases
    from pretraining.evaluation import middle_patch

    preprocessed = find_dataset("nnUNet_preprocessed", args.d)
    plans, dataset_json = load_plans(preprocessed)
    table = preprocessed / "clinical.csv"
    if not table.is_file():
        raise UserError(f"{table}: is not there; the tracers and diagnoses to choose from are taken from it")
    records = read_clinical(table, {"case_id": "case_id"})
    cases = list_cases(preprocessed, plans, dataset_json)
    held_out = set(state["identity"]["held_out"])
    encoder, align, tower = _networks(state, settings, args.text_weights)
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
    rows = _rows([c.path.stem for c in cases], [c.name in held_out for c in cases], records, columns)
    _write(args.o, rows)
    _summary(rows, columns)
    print(f"table: {args.o}")


def _networks(state: dict, settings: Settings, weights: str | None) -> tuple:
    """The PET encoder, ContextAlign and the text tower of a run."""
    from nnunet_fratmae.networks.vit import ViTEncoder
    from pretraining.context_align import ContextAlign
    from pretraining.text import load_tower

    def part(start: str) -> dict[str, Tensor]:
        return {k.removeprefix(start): v for k, v in state["model"].items() if k.startswith(start)}

    encoder = ViTEncoder(settings.wholebody.patch, settings.token_patch, **settings.sizes.encoder).eval()
    encoder.load_state_dict(part("fratmae.encoders.PET."))
    tower = load_tower(settings.pretrain.text_tower, weights or settings.pretrain.text_weights)
    if not settings.pretrain.text_frozen:
        tower.load_state_dict(part("text_tower."))
    align = ContextAlign(settings.sizes.embed_dim, tower.dim)
    align.load_state_dict(part("context_align."))
    return encoder, align.eval(), tower


def _rows(names: list[str], held_out: list[bool], records: dict, columns: dict) -> list[dict[str, str]]:
    rows = []
    for i, (name, is_held_out) in enumerate(zip(names, held_out, strict=True)):
        row = {"case_id": name, "held_out": "yes" if is_held_out else "no"}
        for field, (values, _) in columns.items():
            truth = getattr(records[name], field) if name in records else None
            row |= {field: truth or "", f"{field}_retrieved": values[i]}
        rows.append(row)
    return rows


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    try:
        with renamed(path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"-o {path}: cannot be written ({error.strerror})") from None


def _summary(rows: list[dict[str, str]], columns: dict) -> None:
    """Accuracy on held-out and on seen cases, plain and balanced over the values, beside the commonest value."""
    for field, (_, similarity) in columns.items():
        for is_held_out, what in (("yes", "held out"), ("no", "not held out")):
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
