"""What is known of a model that vLLM runs before it runs: its family, which methods it allows, how many tokens stay."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from foveate import registry
from foveate.core import DECODER_EVIDENCE, ENCODER_EVIDENCE, Method
from foveate.errors import UnsupportedMethod, UnsupportedModel
from foveate.families import Picture, family_of
from foveate.families.base import BEFORE_THE_LLM

#: Vision encoders whose inside is understood as vLLM runs them.
TOWERS = ("clip_vision_model", "siglip_vision_model", "qwen2_5_vl_vision", "qwen2_5_vl")

#: What a family wants to know of a picture besides its rows, by the names that vLLM and transformers share.
TOLD = ("image_sizes", "image_grid_thw")

_SOME = 576  # tokens of a picture, to ask a method whether it knows how many stay


class View:
    """A family's knowledge of a model, read off a transformers model without weights.

    Args:
        config: Of the model.
        split: Whether the ranks of a tensor-parallel group encode different pictures.
    """

    def __init__(self, config: Any, *, split: bool = False) -> None:
        with torch.device("meta"):
            self.model = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
        self.family, self._split = family_of(self.model), split
        tower = self.family.tower_type(self.model)
        if tower not in TOWERS:
            raise UnsupportedModel(
                f"{self.family.name} with a {tower} tower is not served in vLLM; towers served: {', '.join(TOWERS)}",
                "use foveate.compress on the transformers model",
            )
        self.depth = len(self.family.layers(self.model))
        self.token = self.family.token_id(self.model, "image")
        self.accept = lru_cache(64)(self._accept)

    @property
    def positions(self) -> str:
        """What the LLM can know of places: vLLM numbers tokens as they come, unless a model counts in three axes."""
        return "packed" if "packed" in self.family.positions else "original"

    def _accept(self, spec: str) -> Method:
        """Return the method of a spec.

        Raises:
            UnknownMethod, BudgetError: If the spec is wrong.
            UnsupportedMethod: If the method cannot run in vLLM, or not on this model.
        """
        method = registry.from_spec(spec)
        for part in method.parts:
            self._check(method, part)
        return method

    def _check(self, method: Method, part: Method) -> None:
        inner = [site for site in part.sites(self.depth) if site]
        if inner or part.scope == "prompt":
            raise UnsupportedMethod(
                f"`{part.name}` drops inside the LLM, before layer {', '.join(map(str, inner)) or 0}, where vLLM has "
                "no place for it: one table of blocks serves all layers of a request, attention gives no weights away, "
                "and prefill comes in chunks",
                BEFORE_THE_LLM,
            )
        if part.expected(_SOME, _SOME, 0, self.depth) is None:
            raise UnsupportedMethod(
                f"how many tokens `{part.name}` keeps depends on the picture, and vLLM reserves their places before "
                "the encoder runs",
                "give it a fixed budget: keep=64 without the option that makes it adaptive",
            )
        provided = self.family.provides(self.model) - DECODER_EVIDENCE
        if self._split and part.needs & ENCODER_EVIDENCE:
            raise UnsupportedMethod(
                f"`{part.name}` looks into the encoder, of which a rank sees only its own share of the pictures",
                "serve with --mm-encoder-tp-mode weights, or use divprune, cdpruner or grid",
            )
        if missing := part.needs - provided:
            raise UnsupportedMethod(
                f"`{part.name}` needs {', '.join(sorted(missing))}, which {self.family.name} with a "
                f"{self.family.tower_type(self.model)} tower does not provide before the LLM",
                "type `foveate methods` to see what each method needs",
            )
        paper = part.paper_positions if part.paper_positions in self.family.positions else self.family.positions[0]
        chosen = part.positions if method.positions == "paper" else method.positions
        if (paper if chosen == "paper" else chosen) != self.positions:
            raise UnsupportedMethod(
                f"vLLM knows only {self.positions} positions in {self.family.name}, got {chosen!r}",
                f'choose positions="{self.positions}"',
            )

    def pictures(self, rows: Sequence[Tensor], told: Mapping[str, Any]) -> list[Picture]:
        """What the family knows of pictures, given what the LLM reads of each and the tensors in `TOLD`."""
        told = {"vision_aspect_ratio": "anyres_max_9", **told}  # vLLM reads no other from the config
        return self.family.pictures(self.model, "image", SimpleNamespace(pooler_output=rows), told)

    def places(self, rows: int, told: Mapping[str, Any], method: Method) -> int:
        """How many of the places that a picture takes in the prompt it still takes when a method has shortened it."""
        (picture,) = self.pictures([torch.empty(rows, 0)], told)
        n = len(picture.features)
        kept = method.expected(n, n, 0, self.depth)
        assert kept is not None
        return kept + len(picture.fixed)
