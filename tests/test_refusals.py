"""Every code of a refusal stands in docs/refusals.md, and nothing else does."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("nnUNet_raw_conversion", "nnunet_fratmae", "plans", "pretraining")
CODE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")


def codes_of(source: str) -> set[str]:
    """What looks like a code in a raise, in a call of UserError, or in a value called code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            here = getattr(node.func, "id", getattr(node.func, "attr", "")).endswith("Error")
        elif isinstance(node, ast.Assign):
            names = [getattr(name, "id", "").lower() for target in node.targets for name in ast.walk(target)]
            here = any("code" in name for name in names)
        else:
            here = isinstance(node, (ast.Raise, ast.keyword)) and getattr(node, "arg", "code") == "code"
        for part in ast.walk(node) if here else ():
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and CODE.fullmatch(part.value):
                found.add(part.value)
    return found


def test_codes_are_found():
    source = ('raise UserError("x", "A_B")\ncode = "C_D" if x else "E_F"\nraise helper(1, "G_H")\n'
              'UserError("y", code="I_J")\nother = "K_L"\n')  # fmt: skip
    assert codes_of(source) == {"A_B", "C_D", "E_F", "G_H", "I_J"}


def test_every_code_is_documented_and_no_other():
    raised = set()
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            raised |= codes_of(file.read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "refusals.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Z0-9_]+)` \| (.+) \| (.+) \|$", text, re.M)
    documented = [code for code, *_ in rows]
    assert len(set(documented)) == len(documented) > 0
    assert sorted(raised - set(documented)) == [] == sorted(set(documented) - raised)
