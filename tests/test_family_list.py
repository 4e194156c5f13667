# SPDX-License-Identifier: Apache-2.0
"""No family of the installed transformers is forgotten: whoever has experts is in one of the lists
of test_family_matrix."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import test_family_matrix as matrix

EXPERTS = re.compile(
    r"@use_experts_implementation|"
    r"class \w*(?:Experts|MoE|NaiveMoe)\(nn\.(?:Module|ModuleList|ModuleDict)\)"
)


ROOT = Path(__file__).parents[1]


def folders() -> set[str]:
    """Folders of transformers' models whose code has a class of experts."""
    spec = importlib.util.find_spec("transformers.models")
    assert spec is not None and spec.submodule_search_locations
    (root,) = spec.submodule_search_locations
    return {
        path.parent.name
        for path in Path(root).glob("*/modeling_*.py")
        if EXPERTS.search(path.read_text(encoding="utf-8"))
    }


def test_every_family_with_experts_is_in_a_list():
    listed = (
        *matrix.COMPUTED, *matrix.REFUSED, *matrix.REFUSED_CHECKPOINTS, *matrix.NO_LANGUAGE_MODELS,
    )  # fmt: skip
    names = {re.sub("_(text|thinker)$", "", name) for name in listed}
    assert folders() - names == set()
    assert folders()


def test_readme_and_docs_say_how_many_families_are_computed():
    families = {re.sub("_(text|thinker)$", "", name) for name in matrix.COMPUTED}
    for page in ("README.md", "docs/huggingface.md"):
        found = re.findall(r"(\d+) families", (ROOT / page).read_text(encoding="utf-8"))
        assert found == [str(len(families))], page
