"""What every test runs under: shapes checked, no network, few threads, and small models from `tests.models`."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("COLUMNS", "120")

import jaxtyping

import tests.typecheck  # noqa: F401 - jaxtyping asks for it by name

# Every shape annotation of foveate is checked at run time, so the hook has to come before its first import.
assert not any(name == "foveate" or name.startswith("foveate.") for name in sys.modules)
jaxtyping.install_import_hook("foveate", "tests.typecheck.checked")

import pytest
import torch
from hypothesis import HealthCheck, settings

# The models are tiny: a second thread waits longer than it works, the more so on a busy machine.
torch.set_num_threads(1)

# Torch makes the first example slow, and shared machines make any example slow: no deadline.
settings.register_profile(
    "foveate", deadline=None, max_examples=50, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("foveate")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)
