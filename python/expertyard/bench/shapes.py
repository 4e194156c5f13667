# SPDX-License-Identifier: Apache-2.0
"""The MoE layers that are measured: shapes of models that people run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One MoE layer. note: what differs from the model, e.g. fewer experts, to fit in RAM.

    hidden_size is a multiple of 32 and intermediate_size of 16 (layer.py moves whole blocks).
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    activation: str = "silu"
    bias: bool = False
    note: str = ""

    @property
    def expert_params(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden_size * self.intermediate_size

    def flops(self, num_tokens: int) -> int:
        """Operations of one call, a multiply-add counted as two."""
        return 2 * self.expert_params * self.top_k * num_tokens


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("Qwen3-30B-A3B", 2048, 768, 128, 8),
        Shape("Mixtral-8x7B", 4096, 14336, 8, 2),
        Shape("DeepSeek-V3", 7168, 2048, 64, 8, note="64 of 256 experts"),
        Shape("gpt-oss-120b", 2880, 2880, 32, 4, "swigluoai", True, note="32 of 128 experts"),
        Shape("small", 256, 128, 8, 2, note="for trying the benchmark itself"),
    )
}
