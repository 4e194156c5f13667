# SPDX-License-Identifier: Apache-2.0
"""Imports point one way, and what plans imports neither torch, nor numpy, nor transformers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "python/expertyard"

# A part imports what stands before it, never what stands after it. Parts of one line are at one
# height and do not import each other.
TORCH_FREE = [
    ["errors"],
    ["registration", "formats"],
    ["spec"],
    ["rules"],
    ["memory"],
    ["plan"],
    ["models"],  # but for models.perplexity, which is used by name
]
WITH_TORCH = [
    ["native"],
    ["virtual"],
    ["devices", "reference", "modes"],
    ["weights"],
    ["ops", "quantize"],
    ["packing"],
    ["linear"],
    ["loading"],
    ["dispatch"],
    ["testing"],
    ["bench"],
    ["hf"],
    ["cli"],
]
HEIGHT = {part: i for i, line in enumerate([*TORCH_FREE, *WITH_TORCH]) for part in line}
HEAVY = {"torch", "numpy", "transformers", "safetensors", "accelerate"}
# What is imported by a function that must not be imported with its module.
# transformers calls it when it runs a model.
LATE = {("registration", "hf")}

FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(file: Path) -> str:
    """The part of the package that a file belongs to: the name below `expertyard`."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(absolute name of what is imported, whether it is when the file itself is)."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = ["expertyard", *file.relative_to(PACKAGE).parts[:-1]]

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, at_import
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = [*base, *(child.module or "").split(".")]
                name = ".".join(filter(None, module))
                yield from ((f"{name}.{alias.name}", at_import) for alias in child.names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue  # types are no dependency
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, at_import and not function)

    yield from walk(tree, True)


def ours(name: str) -> str | None:
    """The part that an imported name belongs to; None for the root and for other packages."""
    parts = name.split(".")
    return parts[1] if parts[0] == "expertyard" and parts[1:2] and parts[1] in HEIGHT else None


def test_every_part_has_its_place_in_the_order() -> None:
    missing = {part_of(file) for file in FILES} - HEIGHT.keys() - {"__init__", "__main__"}
    assert not missing, f"put them into the order of this test: {sorted(missing)}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file: Path) -> None:
    part = part_of(file)
    if part in ("__init__", "__main__"):
        return
    wrong = [
        name
        for name, _ in imports(file)
        if (other := ours(name)) is not None
        and other != part
        and HEIGHT[other] >= HEIGHT[part]
        and (part, other) not in LATE
    ]
    assert not wrong, f"{file}: {part} stands before {wrong}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_late_imports_are_late(file: Path) -> None:
    part = part_of(file)
    wrong = [name for name, now in imports(file) if now and (part, ours(name)) in LATE]
    assert not wrong


def test_what_plans_imports_nothing_heavy() -> None:
    """As Python sees it, in a process of its own: nothing that is imported on the way counts."""
    parts = [part for line in TORCH_FREE for part in line]
    modules = [f"expertyard.{part}" for part in parts]
    modules += [
        "expertyard." + ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        for file in FILES
        if part_of(file) in parts and part_of(file) != "models" and file.name != "__init__.py"
    ]
    modules += ["expertyard.cli", "expertyard.cli.plan"]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(*sorted({HEAVY!r} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(PACKAGE.parent), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_a_plan_is_made_without_torch() -> None:
    """The command itself, in an interpreter where torch, numpy and transformers cannot be had."""
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({sorted(HEAVY)!r}))\n"
        "from expertyard.cli import main\n"
        "sys.exit(main(['plan', 'Mixtral-8x7B', '--memory', 'cuda:0=24GiB,cpu=128GiB']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(PACKAGE.parent), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "cuda:0" in done.stdout
