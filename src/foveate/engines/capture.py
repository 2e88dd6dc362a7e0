"""Only the evidence a method declared, read while the model runs: encoder folds and attention taps.

A fold sees each encoder layer's input and output as the layer ends, so at most two layers are alive. A tap sees the
queries and keys of one attention module and computes the rows that are asked for: no N x N map is ever made.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.core import ENCODER_EVIDENCE, Method
from foveate.engines.state import Attachment
from foveate.families import Family

Listener = Callable[[nn.Module, Tensor, Tensor, Tensor | None, float | None], None]

_CHUNK = 128  # query rows per step where many rows are averaged
_HIDDEN = -1e4  # an additive mask below this hides


@dataclass
class Record:
    """What the encoder showed of one modality's pictures: one value per patch of the call, in one flat list.

    Args:
        modality: ``image`` or ``video``.
        arguments: Of the call.
        real: Which encoder rows are patches, counted over all forwards; None: all.
        segments: Patches of each encoder forward; known when the first layer ends.
        folds: By the method's place.
        saliency: By layer (an early one by the method's place), in the pieces in which the encoder computes attention.
        keys: Head-mean keys of the feature layer, in the same pieces.
    """

    modality: str
    arguments: Mapping[str, Any]
    real: Tensor | None = None
    segments: list[int] = field(default_factory=list)
    folds: dict[int, Tensor] = field(default_factory=dict)
    saliency: dict[str, list[Tensor]] = field(default_factory=dict)
    keys: list[Tensor] = field(default_factory=list)

    def evidence(self, method: Method, place: int) -> dict[str, Tensor]:
        """What the encoder showed of what a method reads: [p] or [p, v] over all patches of the call."""
        pieces = {
            "encoder_fold": [self.folds[place]] if place in self.folds else [],
            "encoder_saliency": self.saliency.get(method.saliency_layer, []),
            "encoder_shallow": self.saliency.get(f"shallow {place}", []),
            "encoder_keys": self.keys,
        }
        return {name: torch.cat(found) for name, found in pieces.items() if found and name in method.needs}


class EncoderCapture:
    """Listens to the vision encoder for the methods that select before the LLM."""

    def __init__(self, model: Any, family: Family, methods: Sequence[Method], attachment: Attachment) -> None:
        self._model, self._family = model, family
        self._local = threading.local()
        needs = {need for method in methods for need in method.needs}
        if not needs & ENCODER_EVIDENCE:
            return
        towers: list[Any] = []
        for modality in family.modalities:
            layers = family.encoder_layers(model, modality)
            if all(layers[0] is not tower[0] for tower in towers):
                towers.append(layers)
        for layers in towers:
            self._attach(layers, methods, needs, attachment)

    def _attach(self, layers: Any, methods: Sequence[Method], needs: set[str], attachment: Attachment) -> None:
        for place, method in enumerate(methods):
            if "encoder_fold" in method.needs:
                for transition in method.encoder_layers(len(layers)):
                    self._watch(layers[transition - 1], self._folder(place, method), attachment)
        places = {"feature": self._family.feature_layer(self._model), "last": len(layers) - 1}
        wanted: set[str] = {method.saliency_layer for method in methods if "encoder_saliency" in method.needs}
        early = {f"shallow {i}": m for i, m in enumerate(methods) if "encoder_shallow" in m.needs}
        places |= {name: method.shallow_layer(len(layers)) for name, method in early.items()}
        for name in sorted(wanted | early.keys()):
            self._tap(self._family.encoder_attention(layers[places[name]]), self._saliency(name), attachment)
        if "encoder_keys" in needs:
            self._tap(self._family.encoder_attention(layers[places["feature"]]), self._keys, attachment)

    def _watch(self, layer: nn.Module, hook: Callable[..., None], attachment: Attachment) -> None:
        """Call ``hook`` with what one layer of the encoder got and gave."""
        attachment.add(layer.register_forward_hook(hook, with_kwargs=True).remove)

    def _tap(self, module: nn.Module, listen: Listener, attachment: Attachment) -> None:
        """Let ``listen`` see the queries and keys of one attention module of the encoder."""
        tap(module, listen, attachment)

    @contextmanager
    def recording(self, modality: str, arguments: Mapping[str, Any]) -> Iterator[Record]:
        """Record the encoder passes of this thread over the pictures of one modality."""
        real = self._family.real(self._model, modality, arguments)
        rows = None if real is None else real.flatten().nonzero()[:, 0]  # once, as it waits for the device
        record = self._local.record = Record(modality, arguments, rows)
        try:
            yield record
        finally:
            self._local.record = None

    @property
    def _record(self) -> Record | None:
        return getattr(self._local, "record", None)

    def _folder(self, place: int, method: Method) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            record = self._record
            if record is None:
                return
            states = args[0] if args else kwargs.get("hidden_states", kwargs.get("hidden_state"))
            before = self._patches(record, states)
            if not record.segments:
                record.segments = self._family.segments(self._model, record.modality, record.arguments, before)
            after = self._patches(record, output[0] if isinstance(output, tuple) else output)
            record.folds[place] = _fold(method, record.folds.get(place), before, after, record.segments)

        return hook

    def _saliency(self, name: str) -> Listener:
        def listen(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> None:
            record = self._record
            if record is None:
                return
            if self._family.has_cls(self._model):
                received = _from_cls(query, key, scaling, self._family.stretches(self._model))
            else:
                received = _column_mean(query, key, scaling, mask)
            received = self._patches(record, received[..., None])
            record.saliency.setdefault(name, []).append(received.flatten())

        return listen

    def _keys(self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> None:
        if self._record is not None:
            mean = self._patches(self._record, key.mean(1))
            self._record.keys.append(mean.reshape(-1, mean.shape[-1]))

    def _patches(self, record: Record, states: Tensor) -> Tensor:
        """Encoder states of the patches alone: without CLS, and without what fills a forward up."""
        states = self._family.patches(self._model, states)
        return states if record.real is None else states.flatten(0, 1)[record.real.to(states.device)]


def _fold(
    method: Method, carry: Tensor | None, before: Tensor, after: Tensor, segments: Sequence[int]
) -> Float[Tensor, " p"]:
    """One transition of every encoder forward; forwards of equal size go through one `torch.vmap`."""
    if before.dim() == 2 and len(set(segments)) == 1:
        before, after = (states.unflatten(0, (len(segments), -1)) for states in (before, after))
    if before.dim() == 2:
        sizes = list(segments)
        carries: Sequence[Tensor | None] = [None] * len(sizes) if carry is None else carry.split(sizes)
        each = zip(carries, before.split(sizes), after.split(sizes), strict=True)
        return torch.cat([method.fold(c, b, a) for c, b, a in each])
    if len(before) == 1:  # vmap's bookkeeping would take a quarter of the fold's time
        return method.fold(carry, before[0], after[0])
    if carry is None:
        return torch.vmap(lambda b, a: method.fold(None, b, a))(before, after).flatten()
    return torch.vmap(method.fold)(carry.unflatten(0, (len(before), -1)), before, after).flatten()


def _from_cls(query: Tensor, key: Tensor, scaling: float | None, stretches: int) -> Float[Tensor, "b n"]:
    """Mean over heads of what each row gets from the CLS row of its stretch."""
    cls = query.unflatten(2, (stretches, -1))[:, :, :, 0]
    given: Tensor = attention_rows(cls, key, scaling, None).mean(1).unflatten(2, (stretches, -1))
    return given.diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1)


def _column_mean(query: Tensor, key: Tensor, scaling: float | None, mask: Tensor | None) -> Float[Tensor, "b n"]:
    """Mean over heads and queries of the attention each patch receives, chunk by chunk.

    Unseen pairs do not count, nor do queries that cannot see themselves: they fill up an image smaller than others.
    """
    if mask is None:
        total = sum(attention_rows(q, key, scaling, None).sum((1, 2)) for q in query.split(_CHUNK, dim=2))
        assert isinstance(total, Tensor)
        return total / (query.shape[1] * query.shape[2])
    if mask.dim() == 2:  # what flash kernels get: which keys are real
        mask = mask[:, None, None].bool()
    allowed = mask[..., : key.shape[2]] if mask.dtype == torch.bool else mask[..., : key.shape[2]] > _HIDDEN
    allowed = allowed.expand(-1, -1, query.shape[2], -1)
    allowed = allowed & allowed.diagonal(dim1=2, dim2=3)[..., None]
    total = torch.zeros_like(key[:, 0, :, 0], dtype=torch.float32)
    for q, seen in zip(query.split(_CHUNK, dim=2), allowed.split(_CHUNK, dim=2), strict=True):
        total += attention_rows(q, key, scaling, seen).masked_fill(~seen, 0.0).sum((1, 2))  # a blind row is NaN
    return total / (query.shape[1] * allowed[:, 0].sum(1).clamp(min=1))


def attention_rows(
    query: Float[Tensor, "b h r d"],
    key: Float[Tensor, "b k s d"],
    scaling: float | None,
    allowed: Bool[Tensor, "*mask"] | None,
) -> Float[Tensor, "b h r s"]:
    """Softmax of some query rows against all keys, in float32; grouped queries without repeating keys.

    Args:
        query: The rows that are asked for, after rotary embedding.
        key: All keys; the number of query heads is a multiple of theirs.
        scaling: Factor on the scores; None = 1 / sqrt(d).
        allowed: Broadcastable to [b, h, r, s]; False = the row cannot see this key.
    """
    b, h, r, d = query.shape
    k, s = key.shape[1], key.shape[2]
    grouped = query.reshape(b, k, h // k, r, d).float()
    scores = torch.einsum("bkgrd,bksd->bkgrs", grouped, key.float()).reshape(b, h, r, s)
    scores = scores * (d**-0.5 if scaling is None else scaling)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1)


def decoder_evidence(
    needs: Set[str],
    query: Float[Tensor, "h s d"],
    key: Float[Tensor, "k s d"],
    scaling: float | None,
    sees: Callable[[Tensor], Tensor],
    text: Int[Tensor, " t"],
    visual: Int[Tensor, " n"],
) -> dict[str, Tensor]:
    """What one decoder layer's attention shows of one prompt.

    Args:
        needs: What is wanted of ``relevance``, ``text_mass``, ``keys`` and ``text_keys``.
        query: Of all tokens, after rotary embedding.
        key: Of all tokens.
        scaling: Factor on the scores; None = 1 / sqrt(d).
        sees: Which columns each of some rows sees, [rows, s].
        text: Columns of the text.
        visual: Columns of the visual tokens.

    Returns:
        The head-mean rows of the text queries at the visual columns [t, n]; for each visual query the head-mean
        probability it puts on the text columns [n] (zero for text that comes later, which it cannot see); the keys of
        both with the heads side by side.
    """

    def rows(positions: Tensor) -> Tensor:
        return attention_rows(query[None, :, positions], key[None], scaling, sees(positions))[0].mean(0)

    ways: dict[str, Callable[[], Tensor]] = {
        "relevance": lambda: rows(text)[:, visual],
        "text_mass": lambda: torch.cat([rows(chunk)[:, text].sum(1) for chunk in visual.split(_CHUNK)]),
        "keys": lambda: key[:, visual].transpose(0, 1).flatten(1),
        "text_keys": lambda: key[:, text].transpose(0, 1).flatten(1),
    }
    return {name: way() for name, way in ways.items() if name in needs}


def tap(module: nn.Module, listen: Listener, attachment: Attachment) -> None:
    """Let ``listen`` see the queries and keys of one attention module, which keeps running its own kernel.

    Only this module's ``config`` is replaced, by a shallow copy under a private attention name: masks are made from
    the model's own config, and every other layer sees it untouched.
    """
    original = module.config
    implementation = original._attn_implementation  # type: ignore[union-attr]
    name = f"foveate_tap::{implementation}@{id(module)}.{id(attachment)}"
    outer = ALL_ATTENTION_FUNCTIONS.get(implementation)

    def attention(
        inner: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        for q, k in _packed(query, key, kwargs.get("cu_seq_lens_q")):
            listen(module, q, k, attention_mask, kwargs.get("scaling"))
        kernel = outer or sys.modules[type(module).__module__].eager_attention_forward
        return kernel(_AsWas(inner, original), query, key, value, attention_mask, *args, **kwargs)

    AttentionInterface.register(name, attention)
    config = copy.copy(original)
    config._attn_implementation_internal = name  # type: ignore[union-attr]
    module.config = config

    def undo() -> None:
        module.config = original
        AttentionInterface._global_mapping.pop(name, None)

    attachment.add(undo)


def _packed(query: Tensor, key: Tensor, borders: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of each of the sequences that a flash kernel gets packed into one."""
    if borders is None:
        return [(query, key)]
    sizes = borders.diff().tolist()
    return list(zip(query.split(sizes, dim=2), key.split(sizes, dim=2), strict=True))


class _AsWas:
    """A module with its own config: flash kernels read the name of the implementation from it again."""

    def __init__(self, module: Any, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
