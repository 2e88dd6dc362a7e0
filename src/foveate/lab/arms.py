"""The arms of the speed benchmark: one way each of answering the same prompt with the same model.

Every arm but `Bench.hand_cut` goes through the stock ``generate``; a streamer stamps each token, so that one call gives
the time to the first token and the time of each decode step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

import foveate
from foveate.lab.shapes import Shape, picture, prompt


@dataclass
class Sample:
    """One run of one arm, in milliseconds.

    Args:
        first: From the call to the first token: encode, select, prefill.
        cpu: CPU time of the process until the first token, all threads.
        steps: Each decode step after the first token.
        steps_cpu: CPU time of the same.
        encode: The encoder (with what a method reads from it), where it can be told apart.
        prefill: The decoder's layers over the prompt.
        select: Selection by the report's clock.
        fold: What a method's fold adds to the encoder: from before to after its hooks, summed over the layers.
        attention: Time of each watched attention module over the prompt, by name.
        token: The first token.
    """

    first: float
    cpu: float
    steps: list[float]
    steps_cpu: list[float]
    encode: float | None = None
    prefill: float | None = None
    select: float | None = None
    fold: float | None = None
    attention: dict[str, float] = field(default_factory=dict)
    token: int = -1


def clock() -> float:
    """Seconds for short pieces: with one thread the CPU's, which other work on the machine does not lengthen."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Stamps(BaseStreamer):  # type: ignore[no-untyped-call,unused-ignore]
    """A streamer that keeps the time at which each token came; the prompt is the first thing it is shown."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.tokens.append(int(value.flatten()[-1]))

    def end(self) -> None:
        """Nothing is held back."""


class Watch:
    """Times pieces of a forward pass from the outside, by torch's own module hooks."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self.spent: dict[str, float] = {}
        self.wall: dict[str, float] = {}
        self._start: dict[str, tuple[float, float]] = {}

    @contextmanager
    def attached(self) -> Iterator[Watch]:
        """Time the first call of each module."""
        handles = []
        for name, module in self._modules.items():
            handles.append(module.register_forward_pre_hook(self._enter(name), prepend=True))
            handles.append(module.register_forward_hook(self._leave(name)))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._start.setdefault(name, (clock(), time.perf_counter()))

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            spent, wall = self._start[name]
            self.spent.setdefault(name, (clock() - spent) * 1e3)
            self.wall.setdefault(name, (time.perf_counter() - wall) * 1e3)

        return hook


class Bench:
    """A model, a prompt, and the arms.

    Args:
        model: A random LLaVA (``LlavaForConditionalGeneration``).
        shape: What it was built from.
        keep: Visual tokens that stay.
        steps: Decode steps after the first token.
        seed: Of prompt and picture.
    """

    def __init__(self, model: Any, shape: Shape, keep: int, steps: int, seed: int) -> None:
        self.model, self.shape, self.keep, self.steps = model, shape, keep, steps
        self.ids, self.short = prompt(shape, shape.tokens, seed), prompt(shape, keep, seed)
        self.pixels = picture(shape, model.dtype, seed)
        self.chosen = torch.randperm(shape.tokens, generator=torch.Generator().manual_seed(seed))[:keep].sort().values
        self.watched: dict[str, nn.Module] = {}

    @property
    def encoder_layers(self) -> nn.ModuleList:
        """The layers of the vision tower."""
        tower = self.model.model.vision_tower
        layers: nn.ModuleList = getattr(tower, "vision_model", tower).encoder.layers
        return layers

    def tapped(self, spec: str) -> dict[str, nn.Module]:
        """The attention modules that a method listens to: those whose config changes while it is attached."""
        modules = {name: m for name, m in self.model.named_modules() if name.endswith("self_attn")}
        before = {name: module.config for name, module in modules.items()}
        with foveate.compress(self.model, spec):
            return {name: module for name, module in modules.items() if module.config is not before[name]}

    @torch.no_grad()
    def full(self) -> Sample:
        """The uncompressed model."""
        with Watch(self.watched).attached() as watch:
            sample = self._generate(time.perf_counter(), self.ids, self.steps, pixel_values=self.pixels)
        sample.attention = watch.spent
        return sample

    @torch.no_grad()
    def ideal(self) -> Sample:
        """The same model, handed ``keep`` features that somebody chose at no cost."""
        with Watch(self.watched | {"decoder": self.model.model.language_model}).attached() as watch:
            cpu, start = time.process_time(), time.perf_counter()
            output = self.model.get_image_features(pixel_values=self.pixels, return_dict=True)
            features = output.pooler_output[0][self.chosen]
            encode = (time.perf_counter() - start) * 1e3
            ready = {"image": BaseModelOutputWithPooling(pooler_output=[features])}  # type: ignore[arg-type]
            del output
            sample = self._generate(start, self.short, self.steps, cpu, mm_encoder_outputs=ready)
        sample.encode, sample.prefill = encode, watch.wall["decoder"]
        sample.attention = watch.spent
        return sample

    @torch.no_grad()
    def method(self, spec: str) -> tuple[Sample, foveate.Report]:
        """The model compressed by a method. Attaching is done once and is not in the time."""
        opened: list[float] = []
        folds: list[float] = []
        hooks = [layer.register_forward_hook(lambda *_: opened.append(clock())) for layer in self.encoder_layers]
        with Watch(self.watched).attached() as watch, foveate.compress(self.model, spec) as handle:
            hooks += [
                layer.register_forward_hook(lambda *_: folds.append(clock() - opened[-1]))
                for layer in self.encoder_layers
            ]
            try:
                sample = self._generate(time.perf_counter(), self.ids, self.steps, pixel_values=self.pixels)
            finally:
                for hook in hooks:
                    hook.remove()
            report = handle.report
        sample.encode, sample.select, sample.prefill = report.encode_ms, report.select_ms, report.prefill_ms
        sample.fold, sample.attention = sum(folds) * 1e3, watch.spent
        return sample, report

    def columns(self, report: foveate.Report) -> dict[int, Tensor]:
        """From what an in-LLM method kept: before which layer which columns of the hidden states stay."""
        before, after = torch.arange(self.shape.before), torch.arange(self.shape.after)
        first_after = self.shape.before + self.shape.tokens
        alive = torch.arange(self.ids.shape[1])
        cuts = {}
        for stage in report.images[0].stages:
            kept = torch.tensor(stage.kept, dtype=torch.long)
            left = torch.cat([before, self.shape.before + kept, first_after + after])
            cuts[stage.site] = torch.searchsorted(alive, left)
            alive = left
        return cuts

    @torch.no_grad()
    def hand_cut(self, cuts: Mapping[int, Tensor]) -> Sample:
        """A plain loop over the stock layers, with gathers by known indices between them; no hooks, no scores.

        The decode steps are the stock ``generate`` on the cache that the loop filled.
        """
        model, decoder = self.model.model, self.model.model.language_model
        cpu, start = time.process_time(), time.perf_counter()
        features = model.get_image_features(pixel_values=self.pixels, return_dict=True).pooler_output
        encode = (time.perf_counter() - start) * 1e3
        embeds = decoder.embed_tokens(self.ids)
        hidden = embeds.masked_scatter((self.ids == self.shape.image_token)[..., None], torch.cat(list(features)))
        entered = time.perf_counter()
        cache = DynamicCache(config=decoder.config)
        positions = torch.arange(hidden.shape[1])[None]
        mask: Any = create_causal_mask(decoder.config, hidden, torch.ones_like(self.ids), cache, positions)
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
        prefill = (time.perf_counter() - entered) * 1e3
        token = self.model.lm_head(hidden[:, -1:])[:, -1].float().argmax(-1, keepdim=True)
        first, spent = (time.perf_counter() - start) * 1e3, (time.process_time() - cpu) * 1e3
        sample = Sample(first, spent, [], [], encode, prefill, token=int(token))
        if self.steps:
            ids = torch.cat([self.ids, token], 1)
            rest = self._generate(time.perf_counter(), ids, self.steps, past_key_values=cache)
            sample.steps, sample.steps_cpu = rest.steps, rest.steps_cpu
        return sample

    def _generate(self, start: float, ids: Tensor, steps: int, cpu: float | None = None, **arguments: Any) -> Sample:
        stamps = Stamps()
        cpu = time.process_time() if cpu is None else cpu
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1 + steps,
            do_sample=False,
            streamer=stamps,
            **arguments,
        )
        assert len(stamps.wall) == 2 + steps
        return Sample(
            first=(stamps.wall[1] - start) * 1e3,
            cpu=(stamps.cpu[1] - cpu) * 1e3,
            steps=[(b - a) * 1e3 for a, b in pairwise(stamps.wall[1:])],
            steps_cpu=[(b - a) * 1e3 for a, b in pairwise(stamps.cpu[1:])],
            token=stamps.tokens[1],
        )
