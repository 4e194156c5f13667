# SPDX-License-Identifier: Apache-2.0
"""`expertyard doctor`: what this machine and this installation can do, and why not more."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

EXAMPLES = """examples:
  expertyard doctor
  expertyard doctor --json
  EXPERTYARD_ISA=avx2 expertyard doctor
"""
# package -> (oldest version that works, newest that was tested)
SUPPORTED = {
    "torch": ((2, 11), (2, 15)),
    "transformers": ((5, 7), (5, 24)),
}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the `doctor` command to an argparse subparsers object."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="what this machine can run, and why not more",
        description="Says what this machine has, which kernels can run on it, and why the others "
        "cannot.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Asks and prints. 1 if something is wrong that Expertyard needs, else 0."""
    facts = examine()
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 120, markup=False)
        for part in render(facts):
            console.print(part, highlight=False)
    return 1 if facts["problems"] else 0


def examine() -> dict[str, Any]:
    """Everything that `doctor` says, as plain dicts and lists. Raises ExpertyardError."""
    import platform

    import torch

    import expertyard
    from expertyard import virtual
    from expertyard.devices import machine_memory
    from expertyard.native import _C

    packages = {name: package(name) for name in SUPPORTED}
    cuda = dict(_C.cuda_status())
    virtual_gpus = virtual.number()
    isa = _C.forced_isa()
    problem = isa_problem()
    problems = [about["problem"] for about in packages.values() if about["problem"]]
    team, team_problem = whose_threads()
    problems += [found for found in (problem, team_problem) if found]
    limits = dict(_C.thread_limits())
    return {
        "expertyard": expertyard.__version__,
        "build": dict(_C.build),
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {cpu_model()}",
        "cpu_features": dict(_C.cpu_features()),
        "threads": {
            **limits,
            "torch": torch.get_num_threads(),
            "used": min(torch.get_num_threads(), limits["usable"]),
            "team": team,
        },
        "numa": {"nodes": _C.num_nodes(), "may_place": _C.may_place()},
        "memory": machine_memory(),
        "kernels": [dict(kernel) for kernel in _C.kernels()],
        "chosen": {} if problem else chosen(),
        "forced_isa": isa,
        "cuda": cuda,
        "virtual_gpus": virtual_gpus,
        "packages": packages,
        "problems": problems,
    }


def isa_problem() -> str:
    """Why no kernel can be chosen with this EXPERTYARD_ISA; empty if it is fine or not set."""
    from expertyard.native import _C

    try:
        _C.kernel_name("bf16", "bfloat16")
    except ValueError as error:
        return str(error) if str(error).startswith("EXPERTYARD_ISA") else ""
    return ""


def whose_threads() -> tuple[str, str]:
    """`torch` or `own`: the threads that calls run on; and what is wrong with EXPERTYARD_TEAM."""
    from expertyard.native import _C

    try:
        return str(_C.team()), ""
    except ValueError as error:
        return "", str(error)


def chosen() -> dict[str, str]:
    """Format -> the kernel that serves it on this CPU, hidden states being of the same type."""
    from expertyard.native import _C

    found = {}
    for format, dtype in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")):
        try:
            found[format] = str(_C.kernel_name(format, dtype))
        except ValueError:  # the forced instruction set has none for this format
            continue
    return found


def package(name: str) -> dict[str, Any]:
    """A package's version, whether it is a supported one, and the sentence if it is not."""
    from importlib.metadata import PackageNotFoundError, version

    oldest, newest = (".".join(map(str, pair)) for pair in SUPPORTED[name])
    about: dict[str, Any] = {"version": None, "oldest": oldest, "newest_tested": newest}
    try:
        about["version"] = version(name)
    except PackageNotFoundError:
        return {**about, "problem": "", "note": f"not installed: pip install '{name}>={oldest}'"}
    found = tuple(int(part) for part in about["version"].split(".")[:2])
    if found < SUPPORTED[name][0]:
        problem = f"{name} {about['version']} is too old: expected {oldest} or newer."
        return {**about, "problem": problem, "note": problem}
    note = "" if found <= SUPPORTED[name][1] else f"newer than {newest}, the newest that was tested"
    return {**about, "problem": "", "note": note}


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    return value.strip()
    except OSError:
        pass
    return ""


def render(facts: dict[str, Any]) -> list[Any]:
    """The same for people: rich renderables."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    threads, build = facts["threads"], facts["build"]
    features = [name for name, there in facts["cpu_features"].items() if there]
    lacking = [name for name, there in facts["cpu_features"].items() if not there]
    table.add_row("expertyard", f"{facts['expertyard']}, built with {build['compiler']}")
    table.add_row("python", facts["python"])
    for name, about in facts["packages"].items():
        note = about["note"] or f"supported: {about['oldest']} to {about['newest_tested']}"
        table.add_row(name, f"{about['version'] or ''} ({note})".strip())
    table.add_row("machine", facts["machine"])
    table.add_row(
        "CPU features",
        f"{', '.join(features) or 'none'}{f'; not {chr(44).join(lacking)}' if lacking else ''}",
    )
    cgroup = threads["cgroup"] or "no limit"
    whose = {"torch": ", PyTorch's own", "own": ", workers of ours"}.get(threads["team"], "")
    table.add_row(
        "threads",
        f"{threads['used']} used{whose} (torch wants {threads['torch']}, affinity "
        f"{threads['affinity']}, cgroup {cgroup})",
    )
    numa = facts["numa"]
    if numa["nodes"] > 1:
        table.add_row(
            "NUMA",
            f"{numa['nodes']} nodes, "
            + (
                "each with its part of every packed expert"
                if numa["may_place"]
                else "but this process may not say where its memory lies (a container without "
                "set_mempolicy?): experts lie where they were first written"
            ),
        )
    memory = ", ".join(f"{name} {free / 2**30:.1f} GiB" for name, free in facts["memory"].items())
    table.add_row("free memory", memory)
    cuda = facts["cuda"]
    table.add_row("CUDA", "usable" if cuda["usable"] else cuda["why"])
    for index, device in enumerate(cuda["devices"]):
        table.add_row(
            f"  cuda:{index}",
            f"{device['name']}, capability {device['capability']}, "
            f"{device['total_bytes'] / 2**30:.1f} GiB"
            + ("" if device["usable"] else f": {device['why']}"),
        )
    if facts["virtual_gpus"]:
        table.add_row(
            "virtual GPUs",
            f"{facts['virtual_gpus']}: cuda:0 ... are parts of this machine's RAM, for tests "
            "(EXPERTYARD_VIRTUAL_GPUS); real GPUs are not used",
        )
    if facts["forced_isa"]:
        table.add_row("EXPERTYARD_ISA", facts["forced_isa"])

    kernels = Table(box=None, header_style="bold", pad_edge=False)
    kernels.add_column("CPU kernel", no_wrap=True)
    kernels.add_column("can run", no_wrap=True)
    kernels.add_column("")
    for kernel in facts["kernels"]:
        name = kernel["name"]
        if not kernel["runnable"]:
            why = f"this CPU has no {', '.join(kernel['missing'])}"
        elif facts["chosen"].get(kernel["format"]) == name:
            why = f"serves {kernel['format']} experts"
        else:
            why = "for bf16 hidden states only" if kernel["bf16_inputs"] else ""
        kernels.add_row(name, "yes" if kernel["runnable"] else "no", why)
    problems = [Text(problem, style="bold red") for problem in facts["problems"]]
    return [table, Text(""), kernels, *([Text(""), *problems] if problems else [])]
