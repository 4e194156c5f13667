# SPDX-License-Identifier: Apache-2.0
"""Which rule wins which module: the first that matches, per module, depth first from the root.

As KTransformers does it: `name` by re.search on the dotted name, `class` by the module's class,
both given = both must hold; below a module whose winning rule says `recursive: False` nothing is
matched. A module has the names of every layout it comes in; one of them matching is enough.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace

from expertyard.rules.kt.file import Rule
from expertyard.rules.pins import Finding
from expertyard.rules.ranges import format_ids
from expertyard.spec import ModelSpec, Module
from expertyard.spec.tree import expert_names


@dataclass
class Matches:
    """Winners. `modules`: index in spec.tree -> rule; `experts`: layer -> expert -> rule."""

    modules: dict[int, Rule] = field(default_factory=dict)
    experts: dict[int, dict[int, Rule]] = field(default_factory=dict)
    stopped: dict[int, Rule] = field(default_factory=dict)  # not visited: below that rule's module


def matches(rule: Rule, names: tuple[str, ...], classes: tuple[str, ...]) -> bool:
    if rule.match_class and rule.match_class not in classes:
        return False
    return rule.pattern is None or any(rule.pattern.search(name) for name in names)


def match_all(rules: list[Rule], spec: ModelSpec) -> Matches:
    found = Matches()
    below, stopper = "", None
    for index, module in enumerate(spec.tree):
        if stopper is not None and module.name.startswith(below):
            found.stopped[index] = stopper
            continue
        stopper = None
        winner = next((r for r in rules if matches(r, module.names, module.classes)), None)
        if winner is not None:
            found.modules[index] = winner
            if not winner.recursive:
                below, stopper = module.name + ".", winner
        if module.part == "experts" and (winner is None or winner.recursive):
            _match_experts(rules, spec, module, found, winner is not None and winner.is_experts)
    return found


def _match_experts(
    rules: list[Rule], spec: ModelSpec, module: Module, found: Matches, wrapped: bool
) -> None:
    """Single experts and their three projections, in the layout where experts are modules.

    A rule that wraps all experts of a layer is about their computation, so with `wrapped` only
    rules that speak of single experts count: not those for every linear layer or every module.
    """
    assert module.layer is not None and spec.arch is not None
    rules = [rule for rule in rules if rule.device and not (wrapped and _is_broad(rule, module))]
    shape = spec.layers[module.layer].experts
    won: dict[int, Rule] = {}
    for expert in range(shape.num_experts if shape and rules else 0):
        names = expert_names(module, expert)
        for rule in rules:
            if matches(rule, names, EXPERT_CLASSES) or (
                matches(
                    rule,
                    tuple(f"{n}.{p}" for n in names for p in spec.arch.family.projections),
                    ("Linear",),
                )
            ):
                won[expert] = rule
                break
    if won:
        found.experts[module.layer] = won


def _is_broad(rule: Rule, experts: Module) -> bool:
    """Whether the rule's name, if it has one, says nothing that is below the experts' module."""
    return rule.pattern is None or any(rule.pattern.search(name) for name in experts.names)


def speaks_of_experts(rule: Rule) -> bool:
    """Whether the rule's name says experts, or the block that has them, other than to except them.

    A rule for every module of a layer, or for every linear one, does not.
    """
    if rule.pattern is None:
        return False
    said = _EXCEPT.sub("", rule.pattern.pattern)
    return any(word in said for word in _ABOUT_EXPERTS)


_EXCEPT = re.compile(r"\(\?<?!(?:[^()]|\([^()]*\))*\)")  # negative lookarounds, one group deep
_ABOUT_EXPERTS = ("expert", "mlp", "block_sparse_moe", "feed_forward")
EXPERT_CLASSES = ("MLP", "Module")


def idle_rules(rules: list[Rule], spec: ModelSpec, found: Matches) -> list[Finding]:
    """dead-rule: matches nothing in this model. shadowed-rule: earlier rules take all of it."""
    busy = {rule.number for rule in found.modules.values()}
    busy.update(rule.number for won in found.experts.values() for rule in won.values())
    findings: list[Finding] = []
    for rule in rules:
        if rule.number in busy:
            continue
        hits = [
            i for i, module in enumerate(spec.tree) if matches(rule, module.names, module.classes)
        ]
        if hits:
            findings.append(_shadowed(rule, hits, spec, found))
            continue
        blocked = _matches_stopped_experts(rule, spec, found)
        if blocked is not None:
            findings.append(
                _finding(
                    rule,
                    "shadowed-rule",
                    f"rule {blocked.number} ({blocked.where}) takes all experts of these layers "
                    "and stops there (recursive: False). Put this rule first.",
                )
            )
        else:
            dead = _finding(rule, "dead-rule", _why_dead(rule, spec))
            if rule.match_class and not spec.known_family:
                dead = replace(dead, severity="note")  # the classes of the model are not known
            findings.append(dead)
    return findings


def _finding(rule: Rule, code: str, why: str) -> Finding:
    message = f"rule {rule.number} ({rule.what}) never applies: {why}"
    return Finding("warning", code, message, rule.file, rule.line)


def _shadowed(rule: Rule, hits: list[int], spec: ModelSpec, found: Matches) -> Finding:
    takers: Counter[int] = Counter()
    by_number: dict[int, Rule] = {}
    for index in hits:
        taker = found.modules.get(index) or found.stopped.get(index)
        if taker is not None:
            takers[taker.number] += 1
            by_number[taker.number] = taker
    first = by_number[takers.most_common(1)[0][0]]
    stops = all(index in found.stopped for index in hits)
    layers = {m.layer for i, m in enumerate(spec.tree) if found.modules.get(i) is first} - {None}
    takes = f"layers {format_ids(n for n in layers if n is not None)}" if layers else "its modules"
    how = "and stops there (recursive: False)" if stops else "first"
    several = "" if len(takers) == 1 else f" and {len(takers) - 1} more"
    return _finding(
        rule,
        "shadowed-rule",
        f"rule {first.number} ({first.where}){several} already takes {takes} {how}. "
        f"Put rule {rule.number} before it.",
    )


def _matches_stopped_experts(rule: Rule, spec: ModelSpec, found: Matches) -> Rule | None:
    """The rule that hides single experts which `rule` would match, if any."""
    for index, module in enumerate(spec.tree):
        taker = found.modules.get(index)
        if module.part != "experts" or taker is None or taker.recursive or module.layer is None:
            continue
        shape = spec.layers[module.layer].experts
        for expert in range(shape.num_experts if shape else 0):
            if matches(rule, expert_names(module, expert), EXPERT_CLASSES):
                return taker
    return None


def _why_dead(rule: Rule, spec: ModelSpec) -> str:
    if rule.match_class and rule.pattern:
        names = [m for m in spec.tree if any(rule.pattern.search(name) for name in m.names)]
        if names:
            classes = sorted({module.classes[0] for module in names})[:4]
            return (
                f"the {len(names)} modules of that name in {spec.name} have other classes "
                f"({', '.join(classes)})."
            )
    if rule.match_class and not any(rule.match_class in m.classes for m in spec.tree):
        return f"{spec.name} has no module of class {rule.match_class}."
    return f"{spec.name} ({spec.num_layers} layers) has no module of that name."
