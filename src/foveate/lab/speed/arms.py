"""The arms of the speed lab: ways of answering the same prompts with the same model, timed alike.

Every arm goes through the stock ``generate`` (the one cut by hand for its answer only); a streamer stamps each token,
so that one call gives the time to the first token and the time of each decode step.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

import foveate
from foveate.engines.base import Handle
from foveate.errors import UnsupportedMethod
from foveate.families import CrossFamily
from foveate.lab.speed.watch import Stamps, Watch, clock
from foveate.lab.speed.work import Work, encoded


@dataclass(frozen=True)
class Sample:
    """One run of one arm, in milliseconds.

    Args:
        first: From the call to the first token: encode, select, prefill.
        cpu: CPU time of the process until then, all threads.
        total: From the call to the last token.
        steps: Each decode step after the first token.
        steps_cpu: CPU time of the same.
        encode: The encoder and projector, with what a method reads from them.
        prefill: The decoder over the prompt, with what a method does between its layers.
        select: The method's choice, all sites, by the report's clock.
        evidence: What the method does besides, while the encoder and the decoder run.
        answer: The first token of each prompt.
    """

    first: float
    cpu: float
    total: float
    steps: tuple[float, ...]
    steps_cpu: tuple[float, ...]
    encode: float | None
    prefill: float | None
    select: float
    evidence: float
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Ready:
    """A call as the stock ``generate`` gets it when tokens have left, recorded once.

    Args:
        arguments: Prompt, mask, positions.
        keeps: Which visual tokens of each picture are left.
    """

    arguments: Mapping[str, Any]
    keeps: tuple[Tensor, ...]


class Arms:
    """Runs the arms.

    Args:
        work: What is asked.
        steps: Decode steps after the first token.
    """

    def __init__(self, work: Work, steps: int) -> None:
        self.work, self.steps = work, steps
        self._now = clock(work.model.device)
        self._inputs: dict[int, dict[str, Any]] = {}
        self._ready: dict[tuple[int, int], Ready] = {}

    def inputs(self, batch: int) -> dict[str, Any]:
        """Return the inputs of a batch, made once."""
        if batch not in self._inputs:
            self._inputs[batch] = self.work.batch(batch)
        return self._inputs[batch]

    def full(self, batch: int) -> Sample:
        """The uncompressed model."""
        inputs, watch = self.inputs(batch), Watch(self.work.model, self.work.family)
        with watch.over(nullcontext):
            start = self._start()
            return self._answer(watch, start, inputs)

    def ideal(self, keep: int, batch: int) -> Sample:
        """The stock model, handed the features of ``keep`` tokens that somebody chose at no cost.

        The encoder runs, rows are taken by indices known beforehand, and the stock ``generate`` gets the shorter prompt
        that was recorded beforehand: no evidence, no choice, and nothing of the engine.
        """
        inputs, ready = self.inputs(batch), self.ready(keep, batch)
        work, watch = self.work, Watch(self.work.model, self.work.family)
        with watch.over(nullcontext), torch.no_grad():
            start = self._start()
            output, pictures = encoded(work.model, work.family, inputs)
            kept = [p.kept(keep, p.features[keep]) for p, keep in zip(pictures, ready.keeps, strict=True)]
            rows = work.family.with_rows(output, [rows for rows, _ in kept], [levels for _, levels in kept])
            del output, pictures, kept
            return self._answer(watch, start, {**ready.arguments, "mm_encoder_outputs": {"image": rows}})

    def method(self, spec: str, batch: int) -> tuple[Sample, Handle, tuple[int, ...]]:
        """The model compressed by a method; attaching is done once and is not in the time.

        Returns:
            The sample, the handle (taken off), and the decoder layers to whose attention the method listened.
        """
        inputs, watch = self.inputs(batch), Watch(self.work.model, self.work.family)
        with watch.over(functools.partial(foveate.compress, self.work.model, spec)) as handle:
            start = self._start()
            sample = self._answer(watch, start, inputs, handle)
        return sample, handle, watch.reads

    def ready(self, keep: int, batch: int) -> Ready:
        """Record what the stock ``generate`` is called with when `random` has kept so many tokens of each picture.

        Raises:
            UnsupportedMethod: If the prompt does not get shorter where tokens leave.
        """
        if (keep, batch) not in self._ready:
            if isinstance(self.work.family, CrossFamily):
                raise UnsupportedMethod(
                    f"text of {self.work.family.name} looks across at pictures, so no shorter prompt can be recorded",
                    "compare with random",
                )
            self._ready[keep, batch] = self._record(f"random:keep={keep}", self.inputs(batch))
        return self._ready[keep, batch]

    def _record(self, spec: str, inputs: Mapping[str, Any]) -> Ready:
        model, taken = self.work.model, dict[str, Any]()

        @functools.wraps(model.generate)  # the engine reads the signature
        def generate(**arguments: Any) -> Any:
            taken.update(arguments)
            return arguments["input_ids"]

        model.generate = generate
        try:
            with foveate.compress(model, spec) as handle:
                model.generate(**inputs)
        finally:
            del model.generate
        del taken["mm_encoder_outputs"]
        device = model.device
        return Ready(taken, tuple(torch.tensor(image.kept, device=device) for image in handle.report.images))

    # -- a model cut by hand

    @property
    def can_cut(self) -> bool:
        """Whether the plain loop of `hand_cut` is what this model's decoder does."""
        config = self.work.model.config
        return (config.model_type, config.get_text_config().model_type) == ("llava", "llama")

    def columns(self, handle: Handle) -> dict[int, Tensor]:
        """From what an in-LLM method kept: before which layer which columns of the hidden states stay."""
        ids = self.inputs(1)["input_ids"][0]
        visual = (ids == self.work.model.config.image_token_id).nonzero()[:, 0]
        alive, text = torch.arange(len(ids), device=ids.device), (ids != ids[visual[0]]).nonzero()[:, 0]
        cuts = {}
        for stage in handle.report.images[0].stages:
            kept = torch.tensor(stage.kept, dtype=torch.long, device=ids.device)
            left = torch.cat([text, visual[kept]]).sort().values
            cuts[stage.site] = torch.searchsorted(alive, left)
            alive = left
        return cuts

    @torch.no_grad()
    def hand_cut(self, cuts: Mapping[int, Tensor]) -> Sample:
        """A plain loop over the stock layers of one prompt, with gathers by known indices between them.

        No hooks, no scores. The decode steps are the stock ``generate`` on the cache that the loop filled.
        """
        inputs, now = self.inputs(1), self._now
        model: Any = self.work.family.base(self.work.model)
        decoder, ids = model.language_model, inputs["input_ids"]
        start, cpu = self._start()
        features = model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output
        encode = now() - start
        embeds = decoder.embed_tokens(ids)
        hidden = embeds.masked_scatter((ids == model.config.image_token_id)[..., None], torch.cat(list(features)))
        entered = now()
        cache = DynamicCache(config=decoder.config)
        positions = torch.arange(hidden.shape[1], device=ids.device)[None]
        mask: Any = create_causal_mask(decoder.config, hidden, torch.ones_like(ids), cache, positions)
        cos, sin = decoder.rotary_emb(hidden, position_ids=positions)
        for index, layer in enumerate(decoder.layers):
            if index in cuts:
                left = cuts[index]
                hidden, cos, sin = (tensor.index_select(1, left) for tensor in (hidden, cos, sin))
                mask = None if mask is None else mask.index_select(2, left).index_select(3, left)
            hidden = layer(
                hidden, attention_mask=mask, position_embeddings=(cos, sin), past_key_values=cache, use_cache=True
            )
        hidden = decoder.norm(hidden)
        prefill = now() - entered
        token = self.work.model.lm_head(hidden[:, -1:])[:, -1].float().argmax(-1, keepdim=True)
        first, spent = now() - start, time.process_time() * 1e3 - cpu
        steps, steps_cpu = self._steps(torch.cat([ids, token], 1), cache)
        total = first + sum(steps)
        return Sample(first, spent, total, steps, steps_cpu, encode, prefill, 0.0, 0.0, (int(token),))

    def _steps(self, ids: Tensor, cache: DynamicCache) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if not self.steps:
            return (), ()
        rest = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
        stamps = self._generate(rest)
        return _gaps(stamps.wall), _gaps(stamps.cpu)

    # -- the stock generate

    def _start(self) -> tuple[float, float]:
        return self._now(), time.process_time() * 1e3

    def _answer(
        self, watch: Watch, start: tuple[float, float], inputs: Mapping[str, Any], handle: Handle | None = None
    ) -> Sample:
        stamps = self._generate(inputs)
        report = None if handle is None else handle.report
        return Sample(
            first=stamps.wall[1] - start[0],
            cpu=stamps.cpu[1] - start[1],
            total=stamps.wall[-1] - start[0],
            steps=_gaps(stamps.wall),
            steps_cpu=_gaps(stamps.cpu),
            encode=watch.encode if report is None else report.encode_ms,
            prefill=watch.prefill,
            select=0.0 if report is None else report.select_ms or 0.0,
            evidence=watch.fold + watch.tap,
            answer=tuple(stamps.tokens[1]),
        )

    def _generate(self, inputs: Mapping[str, Any]) -> Stamps:
        stamps, model = Stamps(self._now), self.work.model
        model.generate(
            **inputs,
            max_new_tokens=1 + self.steps,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=model.generation_config.pad_token_id or 0,
            streamer=stamps,
        )
        assert len(stamps.wall) == 2 + self.steps
        return stamps


def _gaps(stamps: list[float]) -> tuple[float, ...]:
    """Times between tokens after the first; what is stamped before it is the prompt."""
    return tuple(after - before for before, after in pairwise(stamps[1:]))
