"""Timings of a run, in llama.cpp's format."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_started = time.perf_counter()


def mark_start() -> None:
    """Records when the process started: as the system says, else now."""
    global _started
    try:
        # The 22nd field is ticks from the machine's start to the process's; the second one may hold spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        age = up - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        age = 0.0
    _started = time.perf_counter() - age


def since_start() -> float:
    """Seconds since the process started."""
    return time.perf_counter() - _started


def start_lines(
    opened: float, load: Mapping[str, float], compile_ms: float, found: bool, prompt_ms: float, first: float
) -> list[str]:
    """Lines about what the time up to the first token was spent on.

    Args:
      opened: seconds from the start of the process until the model's file was opened.
      load: seconds of the parts of loading.
      compile_ms: milliseconds of compiling or loading programs.
      found: True if the programs were on disk.
      prompt_ms: milliseconds of the prefill.
      first: seconds from the start of the process to the first token.
    """
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in load.items())
    how = "found on disk" if found else "compiled"
    known = opened + sum(load.values()) + (compile_ms + prompt_ms) / 1e3
    return [
        f"{'start':>16} = {first:10.2f} s to the first token",
        f"{'imports':>16} = {opened:10.2f} s",
        f"{'load':>16} = {sum(load.values()):10.2f} s: {parts}",
        f"{'programs':>16} = {compile_ms / 1e3:10.2f} s: {how}",
        f"{'first step':>16} = {prompt_ms / 1e3:10.2f} s",
        f"{'the rest':>16} = {max(first - known, 0):10.2f} s: tokenizing, the cache, arguments",
    ]


@dataclass
class Timings:
    """Milliseconds and tokens of one run, or sums of several."""

    load_ms: float = 0.0
    compile_ms: float = 0.0
    """Compiling before the run; 0 with --no-warmup."""
    prompt_n: int = 0
    prompt_ms: float = 0.0
    """From the start of prefill to the first token."""
    predicted_n: int = 0
    predicted_ms: float = 0.0
    """From the first token to the last."""

    def add(self, other: Timings) -> None:
        """Adds the numbers of another run."""
        self.load_ms += other.load_ms
        self.compile_ms += other.compile_ms
        self.prompt_n += other.prompt_n
        self.prompt_ms += other.prompt_ms
        self.predicted_n += other.predicted_n
        self.predicted_ms += other.predicted_ms

    def as_dict(self) -> dict[str, float]:
        """The fields of llama.cpp's ``timings``."""
        return {
            "prompt_n": self.prompt_n,
            "prompt_ms": round(self.prompt_ms, 3),
            "prompt_per_second": round(_per_second(self.prompt_n, self.prompt_ms), 3),
            "predicted_n": self.predicted_n,
            "predicted_ms": round(self.predicted_ms, 3),
            "predicted_per_second": round(_per_second(self.predicted_n, self.predicted_ms), 3),
        }

    def lines(self) -> list[str]:
        """The lines that llama.cpp ends a run with."""
        total = self.prompt_ms + self.predicted_ms
        lines = [_time("load time", self.load_ms)]
        if self.compile_ms:
            lines.append(_time("compile time", self.compile_ms))
        return [
            *lines,
            _rate("prompt eval time", self.prompt_ms, self.prompt_n),
            _rate("eval time", self.predicted_ms, self.predicted_n),
            f"{_time('total time', total)} / {self.prompt_n + self.predicted_n:5d} tokens",
        ]


def _per_second(count: int, milliseconds: float) -> float:
    return 1e3 * count / milliseconds if milliseconds > 0 else 0.0


def _time(name: str, milliseconds: float) -> str:
    return f"{name:>16} = {milliseconds:10.2f} ms"


def _rate(name: str, milliseconds: float, count: int) -> str:
    each = milliseconds / count if count else 0.0
    return (
        f"{_time(name, milliseconds)} / {count:5d} tokens "
        f"({each:8.2f} ms per token, {_per_second(count, milliseconds):8.2f} tokens per second)"
    )
