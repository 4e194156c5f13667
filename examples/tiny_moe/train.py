# SPDX-License-Identifier: Apache-2.0
"""Train the small mixture-of-experts language model that Expertyard carries with it.

    python examples/tiny_moe/train.py --out build/tiny_moe

takes about 20 minutes on two cores and writes a Hugging Face folder (config, bf16 safetensors,
tokenizer, facts.json). Needs transformers, rich, and Expertyard installed or PYTHONPATH=python.
An interrupted run goes on where its last checkpoint was with --resume.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import corpus
import export
import tiny
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import Qwen3MoeForCausalLM

CHECKPOINT = "checkpoint.pt"  # in the folder of the model, until the run is over


def arguments(argv: list[str] | None) -> argparse.Namespace:
    shape = tiny.Shape()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, default=Path("build/tiny_moe"), help="folder of the model")
    p.add_argument("--source", choices=corpus.SOURCES, default="auto", help="where text comes from")
    p.add_argument("--pods", type=Path, help="folder of .pod files (default: perl-doc's)")
    p.add_argument("--steps", type=int, default=1800)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--seq-len", type=int, default=512)
    p.add_argument("--lr", type=float, default=2.5e-3, help="peak learning rate")
    p.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up")
    p.add_argument("--weight-decay", type=float, default=0.1)
    p.add_argument("--aux", type=float, default=0.01, help="weight of the balance loss")
    p.add_argument("--precision", choices=("autocast", "fp32"), default="autocast")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, help="default: torch's own choice")
    p.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    p.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    p.add_argument("--no-facts", action="store_true", help="skip the held-out measurements")
    for name in shape.__dataclass_fields__:
        flag = "--" + name.replace("_", "-")
        p.add_argument(flag, type=int, default=getattr(shape, name), help="of the model")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    console = Console()
    _keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        train_documents, held_out, source = corpus.load(args.source, args.pods)
        state = _load_checkpoint(args) if args.resume else None
    except (corpus.CorpusError, ResumeError) as error:
        console.print(f"[red]error:[/] {error}", soft_wrap=True)
        return 2
    tokens = tiny.encode(train_documents)
    shape = tiny.Shape(**{name: getattr(args, name) for name in tiny.Shape.__dataclass_fields__})
    torch.manual_seed(args.seed)
    model = Qwen3MoeForCausalLM._from_config(
        tiny.model_config(shape), experts_implementation="grouped_mm"
    )
    num_parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{num_parameters / 1e6:.2f} M parameters, {shape.num_experts} experts, top-{shape.top_k}; "
        f"{source}: {len(train_documents)} files, {tokens.numel() / 1e6:.2f} MB to learn, "
        f"{len(held_out)} files held out; {args.steps} steps of "
        f"{args.batch_size} x {args.seq_len} bytes on {torch.get_num_threads()} threads"
    )
    outcome = train(model, tokens, args, state, console)
    args.out.mkdir(parents=True, exist_ok=True)
    export.save(model, args.out, shape)
    run = {
        "corpus": source,
        "train_files": len(train_documents),
        "train_bytes": sum(len(d.text.encode()) for d in train_documents),
        "held_out_files": [d.name for d in held_out],
        "steps": args.steps,
        "bytes_seen": args.steps * args.batch_size * args.seq_len,
        "seconds": round(outcome.seconds),
        "last_loss": round(outcome.last_loss, 4),
        "threads": torch.get_num_threads(),
        "options": {k: v for k, v in vars(args).items() if k not in {"out", "pods", "resume"}},
    }
    export.write_facts(args.out, {"parameters": num_parameters, "training": run})
    if not args.no_facts:
        sample = corpus.sample(held_out, export.SAMPLE_BYTES)
        with console.status("measuring the held-out perplexity"):
            facts = export.measure(args.out, sample)
        figures = facts["held_out"]["sample"]["hf_bf16_eager"]
        console.print(
            f"held-out: perplexity {figures['perplexity']:.4f} per byte, "
            f"{figures['bits_per_byte']:.4f} bits per byte (bf16, {len(sample.encode())} bytes)"
        )
        console.print(export.usage_table(facts))
        console.print(facts["samples"][0]["text"], markup=False, highlight=False)
    (args.out / CHECKPOINT).unlink(missing_ok=True)
    console.print(f"written: {args.out}")
    return 0


class Outcome(NamedTuple):
    seconds: float  # in all runs, if this one was resumed
    last_loss: float  # nats a byte, smoothed over some 20 steps


def train(
    model: Qwen3MoeForCausalLM,
    tokens: torch.Tensor,
    args: argparse.Namespace,
    state: dict[str, object] | None,
    console: Console,
) -> Outcome:
    """Train model in place on tokens [num_tokens]."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # norms: not decayed
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors}],
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    first, before = 0, 0.0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, before = state["step"], state["seconds"]
    start = time.monotonic()
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    model.train()
    smooth = math.nan
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=args.steps, completed=first)
        for step in range(first, args.steps):
            lr = tiny.learning_rate(step, args.steps, args.lr, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            ids = tiny.batch(tokens, step, args.batch_size, args.seq_len, args.seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "autocast"):
                loss, balance = tiny.losses(model, ids)
            (loss + args.aux * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            smooth = loss.item() if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss.item()
            speed = (step + 1 - first) * ids[:, 1:].numel() / (time.monotonic() - start)
            note = f"loss {smooth:.3f} nats/byte  balance {balance:.2f}  {speed:.0f} bytes/s"
            progress.update(task, advance=1, description=note)
            if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
                seconds = before + time.monotonic() - start
                _save_checkpoint(args, model, optimizer, step + 1, seconds)
                progress.console.print(f"step {step + 1}: {note}")
    model.eval()
    return Outcome(before + time.monotonic() - start, smooth)


class ResumeError(RuntimeError):
    """There is nothing to resume, or it belongs to another run."""


def _save_checkpoint(
    args: argparse.Namespace,
    model: Qwen3MoeForCausalLM,
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": seconds,
        "options": _identity(args),
    }
    partial = args.out / f"{CHECKPOINT}.part"
    torch.save(state, partial)
    partial.replace(args.out / CHECKPOINT)


def _load_checkpoint(args: argparse.Namespace) -> dict[str, object]:
    path = args.out / CHECKPOINT
    if not path.is_file():
        raise ResumeError(f"{path}: no checkpoint there to resume; leave --resume away")
    state: dict[str, object] = torch.load(path, weights_only=True)
    saved, asked = state["options"], _identity(args)
    differing = [name for name in asked if saved.get(name) != asked[name]]
    if differing:
        pairs = ", ".join(f"{n}: {saved.get(n)} there, {asked[n]} here" for n in differing)
        raise ResumeError(f"{path} belongs to a run with other options ({pairs})")
    return state


def _identity(args: argparse.Namespace) -> dict[str, object]:
    """The options that decide what is learnt."""
    other = {"out", "pods", "resume", "threads", "save_every", "no_facts"}
    return {name: value for name, value in vars(args).items() if name not in other}


def _keep_freed_memory() -> None:
    """Tell glibc to keep big freed blocks: page faults on them cost a tenth of a step."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt:
            for parameter, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
                mallopt(parameter, value)


if __name__ == "__main__":
    sys.exit(main())
