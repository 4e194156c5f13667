# SPDX-License-Identifier: Apache-2.0
"""`expertyard run --compare`: our experts and transformers' own, in one process, by turns.

By turns, because a machine's speed changes from minute to minute. Only the experts differ: the
attention, the sampling and the seed are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.table import Table
from torch import Tensor

from expertyard.cli.generation import Generation, generate

__all__ = ["MAX_TOKENS", "Row", "measure", "to_table"]

ROUNDS = 3
MAX_TOKENS = 64  # of a round: enough for a speed, and the wait stays short
PEERS = ("eager", "grouped_mm")  # values of experts_implementation


@dataclass(frozen=True)
class Row:
    """What one implementation did. Speeds in tokens/s: medians over the rounds."""

    name: str
    prefill_speed: float
    decode_speed: float
    tokens: tuple[int, ...]
    problem: str = ""  # why it could not run


def measure(
    ours: Any,
    theirs: Any,
    prompt_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    rounds: int = ROUNDS,
) -> list[Row]:
    """Our row first. Shows a progress bar on stderr.

    ours    a model whose experts run on Expertyard
    theirs  the same model, loaded without
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    contenders = [("expertyard", ours), *((f"transformers {name}", theirs) for name in PEERS)]
    done: dict[str, list[Generation]] = {name: [] for name, _ in contenders}
    problems: dict[str, str] = {}
    columns = (TextColumn("Comparing: {task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(contenders) * (rounds + 1))
        for turn in range(rounds + 1):  # the first one warms up
            for name, model in contenders:
                progress.update(task, description=name)
                if name not in problems:
                    if model is theirs:
                        model.set_experts_implementation(name.removeprefix("transformers "))
                    try:
                        made = generate(
                            model,
                            prompt_ids,
                            max_new_tokens=max_new_tokens if turn else min(max_new_tokens, 8),
                            temperature=temperature,
                            seed=seed,
                            stop_early=False,
                        )
                    except (RuntimeError, ValueError, NotImplementedError) as error:
                        if model is ours:
                            raise
                        problems[name] = str(error).partition("\n")[0]
                    else:
                        done[name] += [made] if turn else []
                progress.advance(task)
    return [_row(name, done[name], problems.get(name, "")) for name, _ in contenders]


def _row(name: str, made: list[Generation], problem: str) -> Row:
    if problem:
        return Row(name, 0.0, 0.0, (), problem)
    return Row(
        name,
        median(one.prefill_speed for one in made),
        median(one.decode_speed for one in made),
        made[0].tokens,
    )


def to_table(rows: list[Row]) -> Table:
    """Speeds, how many times as fast we are, and how many tokens are the same as ours."""
    ours = rows[0]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("experts by")
    for heading in ("prefill tokens/s", "ours is", "decode tokens/s", "ours is"):
        table.add_column(heading, justify="right")
    table.add_column("same tokens")
    for row in rows:
        if row.problem:
            table.add_row(row.name, "", "", "", "", f"cannot run here: {row.problem}")
            continue
        own = row is ours
        table.add_row(
            row.name,
            f"{row.prefill_speed:.0f}",
            "" if own else _ratio(ours.prefill_speed, row.prefill_speed),
            f"{row.decode_speed:.1f}",
            "" if own else _ratio(ours.decode_speed, row.decode_speed),
            "" if own else _agreement(ours.tokens, row.tokens),
        )
    return table


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}x" if theirs else ""


def _agreement(ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    if ours == theirs:
        return f"all {len(ours)}"
    same = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    return f"the first {same} of {len(ours)}"
