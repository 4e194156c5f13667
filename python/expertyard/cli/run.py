# SPDX-License-Identifier: Apache-2.0
"""`expertyard run`: loads a model by its plan, proves that its experts run on our kernels, writes.

The order is that of the work: what can be refused from the files alone is refused before PyTorch is
imported, what the plan refuses before a weight is read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expertyard.cli.doctor import isa_problem
from expertyard.cli.plan import add_request_arguments, print_rich
from expertyard.errors import ConfigError, LoadError, PlanError

EXAMPLES = """examples:
  expertyard run
  expertyard run --compare
  expertyard run ./Qwen3-30B-A3B --prompt "The capital of France is" --temperature 0
  expertyard run ./Mixtral-8x7B --rules rules.yaml --max-new-tokens 500
  EXPERTYARD_ISA=avx2 expertyard run
  EXPERTYARD_VIRTUAL_GPUS=2 expertyard run -n "0:2;1:2" --gpu-experts 8 --explain --trace t.json
"""
PROMPT = "If you want to"
RUNNING = ("policy", "out_of_memory", "timeout", "prefill_tokens", "defer")
QUIET_BYTES = 1 << 30  # transformers' own progress bars are worth seeing above this


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the `run` command to an argparse subparsers object."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help="load a model by its plan, and generate text",
        description="Loads a mixture-of-experts model by its plan, prints the plan, checks that "
        "every expert runs on Expertyard's kernels, generates text and says how fast.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "path",
        metavar="PATH",
        nargs="?",
        help="a model's folder, or the name of one in Hugging Face's cache (default: the small "
        "model that comes with Expertyard)",
    )
    text = parser.add_argument_group("text")
    add = text.add_argument
    add("--prompt", metavar="TEXT", default=PROMPT, help=f"default: {PROMPT!r}")
    add("--chat", action="store_true", help="put the prompt into the model's chat template")
    add("--max-new-tokens", type=int, metavar="N", default=200, help="default: 200")
    add("--temperature", type=float, metavar="T", default=0.45, help="0: greedy (default: 0.45)")
    add("--seed", type=int, metavar="N", default=4, help="of the sampling (default: 4)")
    request = parser.add_argument_group("what goes where: the same as of `expertyard plan`")
    add_request_arguments(request)
    running = parser.add_argument_group("how the plan is run: keywords of ExpertsConfig")
    add = running.add_argument
    add("--policy", metavar="NAME", help="static, or GPU slots for experts: lru, frequency")
    add("--out-of-memory", metavar="WHAT", help="error, or cpu: experts without room go there")
    add("--timeout", type=float, metavar="SECONDS", help="of a device's part of a layer (60)")
    add("--prefill-tokens", type=int, metavar="N", help="of a call that rules call prefill (32)")
    add(
        "--defer",
        type=int,
        metavar="N",
        help="experts of a token on the CPU that may finish a layer later; changes results, and "
        "says by how much",
    )
    watching = parser.add_argument_group("what it did")
    add = watching.add_argument
    add("--explain", action="store_true", help="say what runs where for how many tokens, and why")
    add("--measure", action="store_true", help="measure from where prefill pays on a GPU; kept")
    add("--trace", metavar="FILE", help="write a timeline for chrome://tracing or Perfetto")
    add("--record", metavar="FILE", help="write the experts that were chosen, for plan --profile")
    other = parser.add_argument_group("other")
    add = other.add_argument
    add("--threads", type=int, metavar="N", help="on the CPU (default: what PyTorch uses)")
    add("--compare", action="store_true", help="run transformers' own experts beside ours")
    add("--verbose", action="store_true", help="show what PyTorch and transformers have to say")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Loads, prints the plan, verifies, generates. Raises ExpertyardError."""
    check_numbers(args)
    folder = find_folder(args.path)
    check_files(folder)
    request = request_keywords(args)
    spin_briefly()
    with starting():
        import_hf(args.verbose)
        import torch

        from expertyard.hf import ExpertsConfig, deferral_error, verify
        from expertyard.hf.state import promise_of

    if args.threads:
        torch.set_num_threads(args.threads)
    if problem := isa_problem():
        raise ConfigError(problem)
    tokenizer = load_tokenizer(folder)
    prompt_ids = encode(tokenizer, args.prompt, args.chat)
    try:
        model = load_model(folder, args.verbose, quantization_config=ExpertsConfig(**request))
        check_length(model, prompt_ids.shape[1], args.max_new_tokens)
        promise = promise_of(model)
        if promise is not None and promise.plan is not None:
            print_rich(promise.plan.table())
            print()
        for line in summary(verify(model)):
            print(line)
        look_closer(model, args)
        print()
        with watched(model, args):
            generate_and_report(model, tokenizer, prompt_ids, args)
        if args.defer:
            print(deferral_error(model, prompt_ids))
        if args.compare:
            compare(model, folder, prompt_ids, args)
    except torch.OutOfMemoryError as error:
        first = str(error).partition("\n")[0]
        raise PlanError(
            f"A GPU ran out of memory: {first} Leave it more room with --memory cuda:0=SIZE,... or "
            "--mb-resrv-per-gpu, or shorten --context."
        ) from None
    return 0


def look_closer(model: Any, args: argparse.Namespace) -> None:
    """--measure and --explain."""
    from expertyard.dispatch import explain, measure
    from expertyard.hf import layers_of

    layers = layers_of(model)
    if args.measure:
        seen: set[str] = set()
        for layer in layers.values():
            for part, found in measure(layer):
                tokens = "never" if found.tokens is None else f"from {found.tokens} tokens"
                what = f"{len(part.packed.here())} {part.packed.format} experts"
                seen.add(f"measured: {what} on the CPU are brought to {layer.home} {tokens}")
        none = "measured: nothing, as no layer on a GPU has experts on the CPU that no rule is for"
        for line in sorted(seen) or [none]:
            print(line)
    if args.explain:
        for line in explain(layers):
            print(line)


@contextmanager
def watched(model: Any, args: argparse.Namespace) -> Iterator[None]:
    """--trace and --record, around what generates."""
    from contextlib import ExitStack

    from expertyard.dispatch import tracing
    from expertyard.hf import recording

    for flag in ("trace", "record"):
        path = getattr(args, flag)
        if path and not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"--{flag} {path}: there is no such folder.")
    with ExitStack() as stack:
        record = stack.enter_context(recording(model)) if args.record else None
        tracer = stack.enter_context(tracing()) if args.trace else None
        yield
    if tracer is not None:
        tracer.save(args.trace)
        share = tracer.together()
        both = "" if share is None else f", CPU and GPUs together for {share:.0%} of the shorter"
        print(f"trace: {args.trace} ({len(tracer.to_json()['traceEvents'])} events{both})")
    if record is not None:
        record.save(args.record)
        print(f"record: {args.record} ({len(record.tokens())} tokens)")


def check_numbers(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens: expected 1 or more, got {args.max_new_tokens}.")
    if not 0 <= args.temperature < float("inf"):
        raise ConfigError(f"--temperature: expected 0 or more, got {args.temperature}.")
    if args.threads is not None and args.threads < 1:
        raise ConfigError(f"--threads: expected 1 or more, got {args.threads}.")
    if not args.prompt:
        raise ConfigError("--prompt: expected some text, got none.")


def find_folder(path: str | None) -> Path:
    """The folder that PATH names. Downloads nothing."""
    if path is None:
        from expertyard.models import tiny_moe

        return tiny_moe()
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise LoadError(f"{path}: is a file; expected the folder that holds config.json.")
    cached = find_cached(path)
    if cached is None:
        hint = f" To download it: hf download {path}" if is_hub_name(path) else ""
        raise LoadError(f"{path}: no such folder.{hint}")
    return cached


def is_hub_name(path: str) -> bool:
    """Whether PATH looks like ORGANISATION/MODEL."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith("/")


def find_cached(name: str) -> Path | None:
    """The folder of ORGANISATION/MODEL in Hugging Face's cache, if it is there."""
    if not is_hub_name(name):
        return None
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return None
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no name that the hub would take
        return None


def check_files(folder: Path) -> None:
    """Raises SpecError or LoadError if the folder holds no MoE model in safetensors."""
    from expertyard.spec import ModelSpec

    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder}: not a model's folder: there is no config.json in it.")
    if not any(folder.glob("*.safetensors")):
        raise LoadError(f"{folder}: has no *.safetensors files; expected the model's weights.")
    ModelSpec.from_folder(folder)


def request_keywords(args: argparse.Namespace) -> dict[str, Any]:
    """The placement flags that were given, as ExpertsConfig takes them; checked."""
    from dataclasses import fields

    from expertyard.plan import Request

    given = {f.name: getattr(args, f.name, None) for f in fields(Request)}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("memory") == "machine":
        del given["memory"]  # what loading does by itself
    Request.from_dict(given)
    running = {name: getattr(args, name) for name in RUNNING}
    return {**given, **{name: value for name, value in running.items() if value is not None}}


@contextmanager
def starting() -> Iterator[None]:
    """A sign of life while PyTorch and transformers are imported, which takes seconds."""
    from rich.console import Console

    with Console(stderr=True).status("Starting PyTorch and transformers ..."):
        yield


def import_hf(verbose: bool) -> None:
    """Imports PyTorch, transformers and our part of it, quietly.

    Raises ModuleNotFoundError if one is missing, ConfigError if transformers is too old.
    """
    import warnings

    if not verbose:
        warnings.simplefilter("ignore")
    import torch  # noqa: F401
    import transformers  # noqa: F401

    try:
        import expertyard.hf  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"expertyard run: {error}.") from None
    if not verbose:
        from transformers.utils import logging

        logging.set_verbosity(logging.CRITICAL)


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise LoadError(f"{folder}: its tokenizer cannot be loaded: {first_line(error)}") from None


def load_model(folder: Path, verbose: bool, **how: Any) -> Any:
    """The model in the checkpoint's own dtype. Raises LoadError with transformers' reason."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not verbose and checkpoint_bytes(folder) < QUIET_BYTES:
        logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=False, **how
        ).eval()
    except (OSError, ValueError, KeyError) as error:
        if type(error).__module__.startswith("expertyard."):
            raise
        raise LoadError(f"{folder}: cannot be loaded: {first_line(error)}") from None


def checkpoint_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def first_line(error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    return text.partition("\n")[0] or type(error).__name__


def encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """Token ids [1, T]. Raises ConfigError if there is no chat template, or no token."""
    import torch

    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("--chat: this model's tokenizer has no chat template.")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise ConfigError("--prompt: the tokenizer makes no token of it.")
    return torch.tensor([ids])


def check_length(model: Any, num_prompt: int, num_new: int) -> None:
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit and num_prompt + num_new > limit:
        raise ConfigError(
            f"--max-new-tokens: the prompt's {num_prompt} tokens and {num_new} new ones are more "
            f"than the {limit} positions of this model; at most {max(limit - num_prompt, 0)} fit."
        )


def summary(report: Any) -> Iterator[str]:
    """One line per kernel and device of verify()'s report."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for row in report.layers:
        groups.setdefault((row.kernel, row.device), []).append(row)
    for (kernel, device), rows in groups.items():
        experts, size = sum(row.num_experts for row in rows), sum(row.nbytes for row in rows)
        layers = "layer" if len(rows) == 1 else "layers"
        yield (
            f"verified: {kernel} on {device} runs {experts} experts of {len(rows)} {layers} "
            f"({size / 2**30:.3g} GiB)"
        )
    for other in report.others:
        yield (
            f"verified: {other.kernel} on {other.device} runs {other.num_layers} quantised layers "
            f"that are no experts ({other.nbytes / 2**30:.3g} GiB)"
        )


def generate_and_report(model: Any, tokenizer: Any, prompt_ids: Any, args: Any) -> None:
    """Streams the text to stdout, then says how fast it came."""
    from rich.console import Console

    from expertyard.cli.generation import generate

    console = Console(highlight=False, markup=False)
    console.print(args.prompt, style="bold", end="", soft_wrap=True)
    if args.chat:
        console.print()
    generate(model, prompt_ids[:, :1], max_new_tokens=1)  # what is made once, is made here
    made = generate(
        model,
        prompt_ids,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        tokenizer=tokenizer,
    )
    sys.stdout.flush()
    print(
        f"\nprefill {made.num_prompt} tokens at {made.prefill_speed:.0f} tokens/s, "
        f"decode {made.num_new} tokens at {made.decode_speed:.1f} tokens/s "
        f"({model_threads()} threads)"
    )


def spin_briefly() -> None:
    """Tells OpenMP, unless the user has, to let PyTorch's threads sleep 0.1 ms after their work.

    They spin for milliseconds else, and where another process wants their CPU each operation waits
    for a thread that is not running: docs/cpu.md, "Beside torch's OpenMP".
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def model_threads() -> int:
    import torch

    from expertyard.native import _C

    return min(torch.get_num_threads(), int(_C.thread_limits()["usable"]))


def compare(model: Any, folder: Path, prompt_ids: Any, args: Any) -> None:
    """Loads the model once more without Expertyard, and prints both beside each other."""
    from rich.console import Console

    from expertyard.cli.comparison import MAX_TOKENS, measure, to_table
    from expertyard.devices import machine_memory

    size, free = checkpoint_bytes(folder), machine_memory()["cpu"]
    if size > free:
        raise ConfigError(
            f"--compare: the model without Expertyard needs {size / 2**30:.1f} GiB of RAM; "
            f"{free / 2**30:.1f} GiB are free."
        )
    theirs = load_model(folder, args.verbose, experts_implementation="eager")
    where, why = their_device(model, size)
    if where != "cpu":
        theirs.to(where)
    rows = measure(
        model,
        theirs,
        prompt_ids,
        max_new_tokens=min(args.max_new_tokens, MAX_TOKENS),
        temperature=args.temperature,
        seed=args.seed,
    )
    print()
    Console(width=None if sys.stdout.isatty() else 120).print(to_table(rows), highlight=False)
    if why:
        print(why)


def their_device(model: Any, size: int) -> tuple[str, str]:
    """(where transformers' model of `size` bytes is to run, what is unequal about that if anything)

    One GPU if all of ours is there and there is room for both, else the CPU.
    """
    import torch

    from expertyard import virtual
    from expertyard.hf import layers_of
    from expertyard.hf.state import promise_of

    promise = promise_of(model)
    layers = layers_of(model).values()
    homes = [] if promise is None or promise.plan is None else promise.plan.layers
    devices = {layer.device for layer in homes} | {p.device for x in layers for p in x.parts}
    ours = ", ".join(sorted(devices))
    if devices == {"cpu"} or not devices:
        return "cpu", ""
    why = "it is not spread over devices"
    if len(devices) == 1 and virtual.gpu(ours) is None:
        if torch.cuda.mem_get_info(ours)[0] > size + (1 << 30):
            return ours, ""
        why = f"{ours} has no room for it beside ours"
    return "cpu", (
        f"Not like with like: transformers' model ran on the CPU alone ({why}), ours on {ours}."
    )
