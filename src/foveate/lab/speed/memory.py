"""Peak memory of an arm, in a process of its own: on a CPU what is resident, on CUDA what tensors take."""

from __future__ import annotations

import gc
import json
import resource
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

_MIB = 2**20


def peak(device: torch.device, run: Callable[[], object]) -> dict[str, float]:
    """Return the MiB in use before something runs, and the peak while it runs."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) / _MIB
        run()
        return {"before": before, "peak": torch.cuda.max_memory_allocated(device) / _MIB}
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
        before = _high_water()
    except OSError:
        before = 0.0
    run()
    return {"before": before, "peak": _high_water()}


def _high_water() -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(command: Sequence[str]) -> dict[str, float] | str:
    """Run a command that prints what `peak` returns; return that, or the last line it wrote when it failed."""
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        lines = child.stderr.strip().splitlines()
        return next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "killed")
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return found
