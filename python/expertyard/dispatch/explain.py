# SPDX-License-Identifier: Apache-2.0
"""What runs where, and why, in sentences: `expertyard run --explain`."""

from collections.abc import Mapping

from .layer import LayerExperts, Part

__all__ = ["explain"]


def explain(layers: Mapping[int, LayerExperts]) -> list[str]:
    """One line for each run of equal layers and each of their parts."""
    lines: list[str] = []
    runs: list[tuple[list[int], list[str]]] = []
    for number, layer in sorted(layers.items()):
        said = [f"home {layer.home}: {_part(layer, part)}" for part in layer.parts]
        if runs and runs[-1][1] == said:
            runs[-1][0].append(number)
        else:
            runs.append(([number], said))
    for numbers, said in runs:
        name = f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]}-{numbers[-1]}"
        lines.extend(f"{name}, {text}" for text in said)
    return lines


def _part(layer: LayerExperts, part: Part) -> str:
    here = part.packed.here()
    kernel = "plain PyTorch" if part.op == "torch" else part.packed.kernel_name()
    text = f"{len(here)} of {layer.num_experts} experts on {part.device} by {kernel} ({part.why})"
    if part.prefill is None:
        return f"{text}, for any number of tokens"
    if part.stream_from is None:
        return f"{text}, for any number of tokens ({part.prefill.why})"
    op = "plain PyTorch" if part.prefill.op == "torch" else part.prefill.op
    return (
        f"{text}; from {part.stream_from} tokens a call their weights are brought to "
        f"{part.prefill.device} and run by {op} ({part.prefill.why})"
    )
