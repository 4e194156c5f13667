# SPDX-License-Identifier: Apache-2.0
"""KTransformers rules: YAML of `match` (name, class) and `replace` (class, kwargs); the first match
wins.

file.py reads the rules, match.py finds each module's rule, place.py turns the winners into pins.
"""

from __future__ import annotations

from typing import Any

from expertyard.rules.kt.file import read_rules
from expertyard.rules.kt.match import idle_rules, match_all
from expertyard.rules.kt.place import place
from expertyard.rules.pins import Pins
from expertyard.spec import ModelSpec
from expertyard.spec.families import FAMILIES, class_name

FLAG = "--rules"


def read(value: Any, spec: ModelSpec) -> Pins:
    """Pins of a rule file for this model. Raises RuleError with file, line and rule."""
    rules, findings = read_rules(value, _known_classes(spec))
    found = match_all(rules, spec)
    findings += idle_rules(rules, spec, found)
    return place(rules, spec, found, findings)


def _known_classes(spec: ModelSpec) -> set[str]:
    known = {name for module in spec.tree for name in module.classes}
    for family in FAMILIES:
        fields = (
            family.block_class, family.experts_class, family.router_class, family.mlp_class,
            family.attention_class, family.layer_class, family.model_class, family.norm_class,
            family.rotary_class, family.root_class,
        )  # fmt: skip
        known.update(class_name(family, field) for field in fields)
        known.update(name for others in family.old_classes.values() for name in others)
    return known
