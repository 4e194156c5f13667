# SPDX-License-Identifier: Apache-2.0
"""The small model's parts: its configuration, its tokens, its batches, its losses.

Pure functions of their arguments: batch number n of a run is the same whether or not the run was
interrupted, because it is computed from (seed, n) and not drawn from a running generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from corpus import Document
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

END_OF_TEXT = 256  # token ids 0 .. 255 are the bytes; this one stands before every document
VOCAB_SIZE = 257


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, under the names of the field."""

    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    num_experts: int = 16
    top_k: int = 2
    intermediate_size: int = 128  # of one expert
    max_context: int = 1024


def model_config(shape: Shape) -> Qwen3MoeConfig:
    """shape as a Qwen3-MoE configuration: every layer sparse, tied embeddings, normalised top-k."""
    return Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.top_k * shape.intermediate_size,  # of a dense layer: there is none
        moe_intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=shape.max_context,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
    )


def encode(documents: list[Document]) -> Tensor:
    """All documents in one row, each after an END_OF_TEXT: [num_tokens] int16."""
    parts = []
    for document in documents:
        parts.append(torch.tensor([END_OF_TEXT], dtype=torch.int16))
        text = bytearray(document.text.encode())
        parts.append(torch.frombuffer(text, dtype=torch.uint8).to(torch.int16))
    return torch.cat(parts)


def batch(tokens: Tensor, number: int, batch_size: int, seq_len: int, seed: int) -> Tensor:
    """Batch `number` of a run: [batch_size, seq_len + 1] int64.

    An epoch cuts the tokens into windows from a random offset and takes them in random order, so
    every byte is seen about once an epoch.
    """
    num_windows = (tokens.numel() - seq_len) // (seq_len + 1)
    per_epoch = num_windows // batch_size
    if per_epoch < 1:
        raise ValueError(
            f"the corpus has {tokens.numel()} tokens, too few for one batch of "
            f"{batch_size} x {seq_len + 1}: take a smaller --batch-size or --seq-len"
        )
    epoch, position = divmod(number, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    offset = int(torch.randint(seq_len, (1,), generator=generator))
    order = torch.randperm(num_windows, generator=generator)
    chosen = order[position * batch_size : (position + 1) * batch_size]
    starts = offset + chosen * (seq_len + 1)
    return tokens[starts[:, None] + torch.arange(seq_len + 1)].long()


def losses(model: Qwen3MoeForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy in nats a token, balance loss) of tokens [batch_size, seq_len + 1]."""
    out = model.model(input_ids=tokens[:, :-1], use_cache=False, output_router_logits=True)
    logits = model.lm_head(out.last_hidden_state).float()
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return loss, balance_loss(out.router_logits, model.config.num_experts_per_tok)


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Mean over layers of num_experts * sum_e(share of choices of e * mean probability of e).

    router_logits: one [num_tokens, num_experts] a layer. 1.0 = perfectly even, num_experts / top_k
    at worst. Equations 4 to 6 of Switch Transformer (arXiv 2101.03961), layer by layer:
    transformers' own load_balancing_loss_func pools the layers, so that one layer's favourite may
    hide behind another's.
    """
    total = torch.zeros(())
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = probabilities.topk(top_k, -1).indices.flatten()
        num_experts = probabilities.shape[-1]
        share = torch.bincount(chosen, minlength=num_experts) / chosen.numel()
        total = total + num_experts * (share * probabilities.mean(0)).sum()
    return total / len(router_logits)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then a cosine from peak down to peak / 50."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def expert_usage(model: Qwen3MoeForCausalLM, tokens: Tensor, window: int = 512) -> Tensor:
    """How often each expert is chosen for tokens [num_tokens]: [num_layers, num_experts] int64."""
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.int64)
    with torch.no_grad():
        for start in range(0, tokens.numel(), window):
            ids = tokens[start : start + window].long()[None]
            out = model.model(input_ids=ids, use_cache=False, output_router_logits=True)
            for layer, logits in enumerate(out.router_logits):
                chosen = logits.float().topk(config.num_experts_per_tok, -1).indices.flatten()
                counts[layer] += torch.bincount(chosen, minlength=config.num_experts)
    return counts
