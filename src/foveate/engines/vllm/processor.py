"""The side of vLLM that reads requests: how many places a picture takes, and what it is called in caches.

These classes are mixed in front of vLLM's own (`models.shortened` does it); all of them run where requests come in, so
that what cannot be served is refused there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from foveate.engines.vllm.asked import ASKED, FIELDS, METHOD, QUESTION, Asked, ask, without
from foveate.engines.vllm.view import TOLD, View
from foveate.errors import BudgetError, UnsupportedCall

_ALL = "grid:keep=1.0"

# What a mixin calls by `super()` is vLLM's.
_Upstream: Any = Any if TYPE_CHECKING else object


class Context(_Upstream):
    """Mixed into ``InputProcessingContext``: hides our options from processors of transformers, which know none."""

    def get_merged_mm_kwargs(self, kwargs: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        return without(super().get_merged_mm_kwargs(kwargs, **options))

    def ours(self, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return method and question: what the request says, else what the server does."""
        merged = super().get_merged_mm_kwargs(
            without(kwargs) | {k: kwargs[k] for k in (METHOD, QUESTION) if k in kwargs}
        )
        return merged.get(METHOD), merged.get(QUESTION)


class Info(_Upstream):
    """Mixed into ``ProcessingInfo``: pictures only, as videos are not shortened in vLLM."""

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        return {"image": super().get_supported_mm_limits()["image"]}


class Processor(_Upstream):
    """Mixed into a family's processor."""

    @cached_property
    def view(self) -> View:
        return View(self.info.get_hf_config(), split=self.info.ctx.get_mm_config().mm_encoder_tp_mode == "data")

    # -- what is asked

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        asked = self._asked(inputs)
        kwargs = without(inputs.hf_processor_mm_kwargs) | {ASKED: asked}
        return super().apply(dataclasses.replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)

    def _asked(self, inputs: Any) -> list[Asked]:
        from vllm.multimodal.parse import EmbeddingItems

        pictures = inputs.mm_data_items.get("image", ())
        if not len(pictures):
            return []
        if isinstance(pictures, EmbeddingItems):
            raise UnsupportedCall(
                "ready-made image embeddings were passed, which show nothing of the encoder",
                "pass the pictures, or serve embeddings with vLLM's own architecture",
            )
        spec, question = self.info.ctx.ours(inputs.hf_processor_mm_kwargs)
        words = None if question is None else self.info.get_tokenizer().encode(question, add_special_tokens=False)
        method = self.view.accept(self._spec(spec))
        if self.view.positions == "original" and list(inputs.prompt[-1:]) == [self.view.token]:
            raise UnsupportedCall(
                "the prompt ends with a picture, from which no position counts on", "end it with text"
            )
        return ask(method, inputs.prompt, self.view.token, len(pictures), words)

    def _spec(self, spec: Any) -> str:
        if spec is None:
            raise UnsupportedCall(
                "neither the server nor the request names a method",
                f'serve with --mm-processor-kwargs \'{{"{METHOD}": "evocut:keep=64"}}\'',
            )
        if not isinstance(spec, str):
            raise BudgetError(f"a method is written as a spec, got {spec!r}", f'{{"{METHOD}": "evocut:keep=64"}}')
        return spec

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """What vLLM measures its memory with: pictures of which all tokens stay, as a request may ask for that."""
        spec, _ = self.info.ctx.ours({})
        if spec is not None:
            self.view.accept(self._spec(spec))  # refused when the server starts
        inputs = super().get_dummy_inputs(*args, **kwargs)
        return dataclasses.replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, METHOD: _ALL})

    # -- what a picture is called: the same pixels under another question are another picture

    def _get_mm_hashes(self, inputs: Any) -> Any:
        from vllm.multimodal.hasher import MultiModalHasher

        asked = inputs.hf_processor_mm_kwargs[ASKED]
        bare = dataclasses.replace(inputs, hf_processor_mm_kwargs=without(inputs.hf_processor_mm_kwargs))
        hashes = dict(super()._get_mm_hashes(bare))
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        if asked:
            pairs = zip(hashes["image"], asked, strict=True)
            hashes["image"] = [MultiModalHasher.hash_kwargs(algorithm, image=h, asked=repr(a)) for h, a in pairs]
        return hashes

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Mapping[str, Sequence[bool]]) -> Any:
        kwargs = dict(super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached))
        pairs = zip(kwargs[ASKED], mm_is_cached.get("image", ()), strict=True)
        return kwargs | {ASKED: [asked for asked, cached in pairs if not cached]}

    # -- what travels with it

    def _postprocess_hf_mm_data(self, mm_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any], processed: Any) -> Any:
        processed = super()._postprocess_hf_mm_data(mm_inputs, hf_processor_mm_kwargs, processed)
        if asked := hf_processor_mm_kwargs[ASKED]:
            spec, text, seed = zip(*(each.tensors() for each in asked), strict=True)
            processed.update(zip(FIELDS, (list(spec), list(text), torch.stack(seed)), strict=True))
        return processed

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        from vllm.multimodal.inputs import MultiModalFieldConfig

        ours = {name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in FIELDS}
        return {**super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs), **ours}

    # -- how many places it takes

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> list[Any]:
        updates = super()._get_prompt_updates(
            mm_items=mm_items, hf_processor_mm_kwargs=hf_processor_mm_kwargs, out_mm_kwargs=out_mm_kwargs
        )
        asked = hf_processor_mm_kwargs[ASKED]

        def shorter(full: Any) -> Any:
            def places(number: int) -> list[int]:
                ids, item = full(number), out_mm_kwargs["image"][number]
                told = {name: item[name].data[None] for name in TOLD if name in item}
                return list(ids[: self.view.places(len(ids), told, self.view.accept(asked[number].method))])

            return places

        pictures = [update for update in updates if update.modality == "image"]
        return [dataclasses.replace(update, replacement=shorter(update.replacement)) for update in pictures]
