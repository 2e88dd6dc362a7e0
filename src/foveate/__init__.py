"""foveate: vision-language models read with a fraction of their visual tokens, training-free, on stock transformers."""

from __future__ import annotations

from foveate.core import Chain, Evidence, Method, PromptMethod, Selection

__version__ = "0.1.0"

__all__ = ["Chain", "Evidence", "Method", "PromptMethod", "Selection"]
