"""foveate: vision-language models read with a fraction of their visual tokens, training-free, on stock transformers.

Every name is imported when it is first used, so that ``import foveate`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.core import Chain, Evidence, LayerMethod, Method, PromptMethod, Selection
    from foveate.engines.base import Handle, compress
    from foveate.engines.verify import Verification, verify
    from foveate.errors import (
        BudgetError,
        ContractError,
        FoveateError,
        MissingDependency,
        MissingEvidence,
        NothingCompressed,
        TaskError,
        UnknownMethod,
        UnsupportedCall,
        UnsupportedMethod,
        UnsupportedModel,
    )
    from foveate.methods import (
        DART,
        AdaV,
        CDPruner,
        DivPrune,
        EvoCut,
        FastV,
        Grid,
        HoloV,
        Pool,
        PruMerge,
        PruMergePlus,
        PyramidDrop,
        Random,
        SparseVLM,
        ToDRE,
        V2Drop,
        VisionZip,
        VisPruner,
        VScan,
    )
    from foveate.registry import from_spec, register, to_spec
    from foveate.report import Report

__version__ = "0.1.0"

__all__ = [
    "AdaV",
    "BudgetError",
    "CDPruner",
    "Chain",
    "ContractError",
    "DART",
    "DivPrune",
    "Evidence",
    "EvoCut",
    "FastV",
    "FoveateError",
    "Grid",
    "Handle",
    "HoloV",
    "LayerMethod",
    "Method",
    "MissingDependency",
    "MissingEvidence",
    "NothingCompressed",
    "Pool",
    "PromptMethod",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "Random",
    "Report",
    "Selection",
    "SparseVLM",
    "TaskError",
    "ToDRE",
    "UnknownMethod",
    "UnsupportedCall",
    "UnsupportedMethod",
    "UnsupportedModel",
    "V2Drop",
    "Verification",
    "VisionZip",
    "VisPruner",
    "VScan",
    "compress",
    "from_spec",
    "register",
    "to_spec",
    "verify",
]

_HOME = {
    "core": ("Chain", "Evidence", "LayerMethod", "Method", "PromptMethod", "Selection"),
    "engines.base": ("Handle", "compress"),
    "engines.verify": ("Verification", "verify"),
    "methods": (
        "AdaV",
        "CDPruner",
        "DART",
        "DivPrune",
        "EvoCut",
        "FastV",
        "Grid",
        "HoloV",
        "Pool",
        "PruMerge",
        "PruMergePlus",
        "PyramidDrop",
        "Random",
        "SparseVLM",
        "ToDRE",
        "V2Drop",
        "VisionZip",
        "VisPruner",
        "VScan",
    ),
    "registry": ("from_spec", "register", "to_spec"),
    "report": ("Report",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'foveate' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"foveate.{_MODULE.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
