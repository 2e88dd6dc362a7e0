"""Where and with what something was measured: the columns that every row of results carries."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

import foveate


def environment(device: torch.device | None = None) -> dict[str, str]:
    """Return commit, versions and hardware; with a device, its name as well."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "foveate": foveate.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        **({} if device is None else {"device": device_name(device)}),
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or what kind of device it is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def commit() -> str:
    """Return the commit of the source tree, with ``+dirty`` if it has changes, or ``unknown`` outside a checkout."""

    def git(*arguments: str) -> str:
        where = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", "--no-optional-locks", "-C", str(where), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/src", ":/demo-models/src")
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name() -> str:
    """Return the name of the processor and the vector extensions that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    entries = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = set(entries.get("flags", "").split())
    wanted = (("avx512f", "AVX-512"), ("avx512_bf16", "AVX512-BF16"), ("amx_bf16", "AMX-BF16"))
    return " ".join([entries.get("model name", platform.machine()), *(name for flag, name in wanted if flag in flags)])


def load() -> str:
    """Return the load average of the last minute."""
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
