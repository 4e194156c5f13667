# SPDX-License-Identifier: Apache-2.0
"""A real GPU: everything of gpu_check that needs one. Never imported where there is none."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import layers, probes
from .timing import graph_seconds

ROOT = Path(__file__).resolve().parents[2]


class Card:
    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(0)
        self.short_name = re.sub(r"[^a-z0-9]+", "-", self.properties.name.lower()).strip("-")
        self.capability = 10 * self.properties.major + self.properties.minor

    def facts(self) -> dict[str, Any]:
        p = self.properties
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        )
        return {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "commit": commit.stdout.strip() or "unknown",
        }

    def build(self, seconds: float) -> dict[str, Any]:
        p = self.properties
        suffix = "a" if p.major == 9 else ""
        architecture = f"{p.major}{p.minor}{suffix}-real"
        import os

        env = {**os.environ, "EXPERTYARD_CUDA": "ON", "EXPERTYARD_CUDA_ARCHS": architecture}
        run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], seconds, env)
        return {"architecture": architecture}

    def tests(self, seconds: float) -> dict[str, Any]:
        out = run([sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests"], seconds)
        return {"summary": out.strip().splitlines()[-1]}

    def sanitizer(self, seconds: float) -> dict[str, Any]:
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(tool).exists():
            return {"left_out": "compute-sanitizer is not installed"}
        results = {}
        for check in ("memcheck", "racecheck", "synccheck"):
            command = [
                tool,
                "--tool",
                check,
                "--error-exitcode",
                "9",
                sys.executable,
                "-m",
                "pytest",
            ]
            run([*command, "-q", "-m", "gpu", "-k", "small_call", "tests"], seconds / 3)
            results[check] = "clean"
        return results

    def ceilings(self) -> dict[str, Callable[[], float]]:
        return probes.ceilings(self.properties)

    def handoff(self) -> dict[str, Callable[[], float]]:
        from . import handoff

        return handoff.measurements()

    def write_crossovers(self, lines: list[str]) -> str:
        """The file, beside the JSON: what EXPERTYARD_CUDA_CROSSOVERS is to name."""
        path = ROOT / "bench" / "results" / f"gpu-{self.short_name}.crossovers"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))
        return str(path.relative_to(ROOT))

    def layer(self, shape_name: str, contender: str) -> layers.Layer | str | None:
        return layers.make(shape_name, contender, graph_seconds)


def run(command: list[str], seconds: float, env: dict[str, str] | None = None) -> str:
    """Its output. RuntimeError with the end of it if it fails or takes too long."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, timeout=max(seconds, 1), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command[:4])} ... took more than {seconds:.0f} s") from None
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:4])} ... failed:\n{done.stdout[-3000:]}")
    return done.stdout
