# SPDX-License-Identifier: Apache-2.0
"""The results file, which is also what a later run resumes from.

  {"machine": {...}, "parts": {NAME: {"status": "done" | "stopped" | "failed", "seconds": 1.5,
                                      "results": {...}, "error": "..."}}}
A part may keep results while it runs; what it has kept it does not measure again.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class State:
    path: Path
    machine: dict[str, Any]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, machine: dict[str, Any]) -> "State":
        """What is in the file, or nothing. ValueError if it is of another machine or not ours."""
        if not path.exists():
            return cls(path, machine)
        try:
            data = json.loads(path.read_text())
            before, parts = data["machine"], data["parts"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a results file of gpu_check ({error})") from None
        differ = sorted(
            k for k in machine.keys() | before.keys() if machine.get(k) != before.get(k)
        )
        if differ:
            raise ValueError(
                f"{path}: measured with another {', '.join(differ)}; move it away, or give --out"
            )
        return cls(path, machine, parts)

    def status(self, part: str) -> str | None:
        entry = self.parts.get(part)
        return None if entry is None else entry["status"]

    def results(self, part: str) -> dict[str, Any]:
        """The part's results, to be added to."""
        entry = self.parts.setdefault(part, {"status": "stopped", "seconds": 0.0, "results": {}})
        results: dict[str, Any] = entry["results"]
        return results

    def forget(self, part: str) -> None:
        self.parts.pop(part, None)

    def finish(self, part: str, status: str, seconds: float, error: str | None = None) -> None:
        self.results(part)
        entry = self.parts[part]
        entry["status"] = status
        entry["seconds"] = round(entry["seconds"] + seconds, 1)
        entry.pop("error", None)
        if error:
            entry["error"] = error
        self.save()

    def save(self) -> None:
        """All or nothing: a run that is killed leaves the file of before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        text = json.dumps({"machine": self.machine, "parts": self.parts}, indent=1, sort_keys=True)
        beside.write_text(text + "\n")
        os.replace(beside, self.path)
