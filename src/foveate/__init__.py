"""foveate: vision-language models read with a fraction of their visual tokens, training-free, on stock transformers.

``import foveate`` imports torch and no transformers; the engines come with the first call of `compress` or `verify`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foveate.core import Chain, Evidence, Method, PromptMethod, Selection
from foveate.errors import (
    BudgetError,
    ContractError,
    FoveateError,
    MissingDependency,
    MissingEvidence,
    NothingCompressed,
    UnknownMethod,
    UnsupportedCall,
    UnsupportedMethod,
    UnsupportedModel,
)
from foveate.methods import AdaV, EvoCut, Grid, Pool, Random, ToDRE, V2Drop
from foveate.registry import from_spec, register, to_spec
from foveate.report import Report

if TYPE_CHECKING:
    from foveate.engines.base import Handle, compress
    from foveate.engines.verify import verify

__version__ = "0.1.0"

__all__ = [
    "AdaV",
    "BudgetError",
    "Chain",
    "ContractError",
    "EvoCut",
    "Evidence",
    "FoveateError",
    "Grid",
    "Handle",
    "Method",
    "MissingDependency",
    "MissingEvidence",
    "NothingCompressed",
    "Pool",
    "PromptMethod",
    "Random",
    "Report",
    "Selection",
    "ToDRE",
    "UnknownMethod",
    "UnsupportedCall",
    "UnsupportedMethod",
    "UnsupportedModel",
    "V2Drop",
    "compress",
    "from_spec",
    "register",
    "to_spec",
    "verify",
]

_LAZY = {"Handle": "base", "compress": "base", "verify": "verify"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'foveate' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"foveate.engines.{_LAZY[name]}"), name)
