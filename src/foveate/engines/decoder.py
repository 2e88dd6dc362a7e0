"""Sites >= 1: tokens leave between decoder layers, by pre-hooks on the layers of this instance.

Before layer k the hook gathers the hidden states of the tokens that stay; for every later layer it replaces the mask
and the rotary embeddings, which the model's loop goes on passing at full length. Layer 0 always runs at full length:
its cache is what ``generate`` counts by. What the decode steps need rides on the cache object.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core import Evidence, Method, Selection, compose
from foveate.engines import sequence
from foveate.engines.caches import PLANS, remember
from foveate.engines.capture import decoder_evidence, tap
from foveate.engines.masks import Cutting, Masks, columns_seen, for_rows, layer_kinds
from foveate.engines.sequence import Layout, Plan
from foveate.engines.state import Attachment, Frame, Frames, Stage, bind
from foveate.errors import NothingCompressed, UnsupportedCall
from foveate.families import Family
from foveate.selection import select_all

_ATTENTION = frozenset({"keys", "relevance", "text_keys", "text_mass"})


@dataclass
class Call:
    """One forward of the language model.

    Args:
        frame: Set during prefill with pictures, else None.
        layout: The frame's layout for the batch as it is here (beams repeat rows).
        columns: Tokens of this call per row, before any drop.
        mask: The 2-D mask of all tokens so far, if the caller has one.
        cuttings: Drops that this call's layers must honour; prefill adds to them.
        alive: Per span of the layout, which of its tokens are alive.
        previous: Hidden states one layer before a site, by site.
        attention: What taps saw by site and unit: positions of the visual tokens, and evidence by name.
        embeds: What entered the first layer, where a method reads the text's embeddings.
        memo: Masks and embeddings made once per drop.
    """

    frame: Frame | None
    layout: Layout | None
    columns: int
    mask: Tensor | None
    cuttings: list[Cutting]
    alive: list[Tensor] = field(default_factory=list)
    previous: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[tuple[int, ...], tuple[Tensor, dict[str, Tensor]]] = field(default_factory=dict)
    embeds: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def prefill(self) -> bool:
        return self.frame is not None


class DecoderPart:
    """Hooks on one language model, for methods that drop inside it."""

    def __init__(
        self, model: Any, family: Family, methods: Sequence[Method], frames: Frames, attachment: Attachment
    ) -> None:
        self._frames = frames
        self._layers: Any = family.layers(model)
        self._rows = family.row_arguments
        decoder: Any = family.decoder(model)
        self._depth = len(self._layers)
        self._masks = Masks(decoder.config, self._depth)
        self._names = [name for name in inspect.signature(type(self._layers[0]).forward).parameters if name != "self"]
        self._local = threading.local()
        self._at: dict[int, list[Method]] = {}
        for method in methods:
            for site in method.sites(self._depth):
                self._at.setdefault(site, []).append(method)
        base: Any = family.base(model)
        attachment.wrap(base, "forward", self._wrap_base(base.forward))
        attachment.wrap(decoder, "forward", self._wrap(decoder.forward))
        wanted = {site: {need for m in here for need in m.needs} for site, here in self._at.items()}
        self._before = {site - 1 for site, needs in wanted.items() if "previous" in needs}
        for index in range(min([*self._at, *self._before], default=self._depth), self._depth):
            hook = self._layers[index].register_forward_pre_hook(
                partial(self._on_layer, index), with_kwargs=True, prepend=True
            )
            attachment.add(hook.remove)
        attends = [kind != "linear_attention" for kind in layer_kinds(decoder.config, self._depth)]
        for site, needs in wanted.items():
            if needs & _ATTENTION:
                last = max(layer for layer in range(site) if attends[layer])
                tap(self._layers[last].get_submodule("self_attn"), partial(self._on_attention, site), attachment)

    # -- per call

    @property
    def _call(self) -> Call | None:
        stack = getattr(self._local, "stack", None)
        call: Call | None = stack[-1] if stack else None
        return call

    @contextmanager
    def _entered(self, call: Call | None) -> Any:
        stack = self._local.__dict__.setdefault("stack", [])
        stack.append(call)
        try:
            yield
        finally:
            stack.pop()

    def _wrap_base(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Remember what some models keep from their decoder: the 2-D mask, and whether pictures come in."""
        signature = inspect.signature(original)

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = bind(signature, args, kwargs)
            self._local.mask = given.get("attention_mask")
            self._local.reads = any(m is not None for m in (given.get("mm_encoder_outputs") or {}).values())
            try:
                return original(*args, **kwargs)
            finally:
                self._local.mask, self._local.reads = None, False

        return forward

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._entered(self._open(kwargs)):
                return original(*args, **kwargs)

        def let_tokens_leave(*args: Any, **kwargs: Any) -> Any:
            return run(*args, **kwargs)

        uncompiled = torch.compiler.disable(let_tokens_leave)  # how many stay is no matter for a graph

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return (uncompiled if self._reads else run)(*args, **kwargs)

        return forward

    @property
    def _reads(self) -> bool:
        """Whether this pass reads a call's pictures; it may be text beside the prompt, as for guidance."""
        return self._frames.top is not None and getattr(self._local, "reads", False)

    def _open(self, kwargs: dict[str, Any]) -> Call | None:
        frame, cache = self._frames.top, kwargs.get("past_key_values")
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        masks = (mask, getattr(self._local, "mask", None))
        mask = next((m for m in masks if isinstance(m, Tensor) and m.dim() == 2), None)
        if frame is None or not frame.images or not self._reads or embeds is None:
            cuttings = getattr(cache, PLANS, [])
            return Call(None, None, 0, mask, for_rows(cuttings, embeds)) if cuttings else None
        filled = cache is not None and int(cache.get_seq_length()) > 0
        if filled or embeds.shape[1] < frame.layout.length:
            raise UnsupportedCall(
                f"the prompt arrives in chunks ({embeds.shape[1]} of {frame.layout.length} tokens), and tokens that "
                "leave inside the LLM must be seen together",
                "leave out prefill_chunk_size, or use a method that selects before the LLM",
            )
        if cache is not None:
            vars(cache).pop(PLANS, None)
        for seen in frame.images:  # without a cache every step reads the prompt again, and selects again
            seen.stages = [stage for stage in seen.stages if stage.site == 0]
        layout = frame.layout.expand(len(embeds))
        alive = [torch.arange(len(span.positions), device=embeds.device) for span in layout.spans]
        reads = any("text" in method.needs for here in self._at.values() for method in here)
        return Call(frame, layout, embeds.shape[1], mask, [], alive, embeds=embeds if reads else None)

    # -- hooks

    def _on_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        call = self._call
        if call is None:
            return None
        kwargs = {**kwargs, **dict(zip(self._names, args, strict=False))}
        hidden = before = kwargs.pop("hidden_states")
        if call.prefill and index in self._at:
            hidden = self._drop(call, index, hidden, kwargs.get("past_key_values"))
        if call.prefill and index in self._before:
            call.previous[index + 1] = hidden
        cutting = next((c for c in reversed(call.cuttings) if c.first <= index), None)
        if cutting is None:
            return None if hidden is before else ((hidden,), kwargs)
        kwargs["position_ids"] = None  # already in the rotary embeddings; gaps look like packing to flash attention
        if call.prefill:
            if hidden.shape[1] != cutting.plan.index.shape[1]:
                raise NothingCompressed(
                    f"decoder layer {index} got {hidden.shape[1]} rows where {cutting.plan.index.shape[1]} are alive",
                    "a hook or a patch between the layers changes the sequence; take it off",
                )
            kwargs["position_embeddings"] = self._rotary(call, cutting, kwargs["position_embeddings"])
            kwargs["attention_mask"] = self._masks.prefill(call.memo, cutting, hidden, kwargs, index)
            for name in self._rows & kwargs.keys():
                if kwargs[name] is not None:
                    kwargs[name] = sequence.take(kwargs[name], cutting.plan.index, 1)
        else:
            kwargs["attention_mask"] = self._masks.decode(
                call.memo, cutting, call.mask, hidden, kwargs.get("past_key_values"), index
            )
        return (hidden,), kwargs

    def _on_attention(
        self, site: int, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None
    ) -> None:
        call = self._call
        if call is None or not call.prefill:
            return
        plan, columns = self._plan(call), query.shape[2]
        for scope in {method.scope for method in self._at[site] if method.needs & _ATTENTION}:
            needs = {need for method in self._at[site] if method.scope == scope for need in method.needs}
            for unit in self._units(call, scope):
                row, visual, text = self._columns(call, unit)
                window = getattr(module, "sliding_window", None)
                sees = partial(columns_seen, mask, row, columns, self._valid(call, plan, row), window)
                shown = decoder_evidence(needs, query[row], key[row, :, :columns], scaling, sees, text, visual)
                call.attention[site, *unit] = (self._positions(call, unit), shown)

    # -- dropping

    def _drop(self, call: Call, site: int, hidden: Tensor, cache: Any) -> Tensor:
        assert call.frame is not None and call.layout is not None
        before = [len(alive) for alive in call.alive]
        with call.frame.clock.section("select"):
            for method in self._at[site]:
                hidden = self._select(call, method, site, hidden)
        call.frame.pending.discard(site)
        if [len(alive) for alive in call.alive] == before:
            return hidden
        layout, device = call.layout, hidden.device
        kept = [span.positions.to(device)[alive] for span, alive in zip(layout.spans, call.alive, strict=True)]
        tail = torch.arange(layout.length, call.columns, device=device)
        staying = [torch.cat([row.to(device), tail]) for row in layout.staying]
        plan = sequence.make_plan(sequence.merge_rows(staying, layout.spans, kept))
        earlier = self._plan(call)
        columns = plan.index if earlier is None else plan.within(earlier, call.columns)
        call.cuttings.append(Cutting(site, plan, call.columns))
        if cache is not None:
            remember(cache, PLANS, list(call.cuttings))
        return sequence.take(hidden, columns, 1)

    def _select(self, call: Call, method: Method, site: int, hidden: Tensor) -> Tensor:
        """Let a method choose, and return the hidden states with what it merged in the places of what stays."""
        assert call.frame is not None and call.layout is not None
        given = hidden
        units = [unit for unit in self._units(call, method.scope) if sum(len(call.alive[i]) for i in unit)]
        evidences = [self._evidence(call, method, site, unit, hidden) for unit in units]
        for unit, evidence, selection in zip(units, evidences, select_all(method, evidences, site), strict=True):
            if selection.stay is not None:
                stay = Selection(keep=selection.stay.nonzero()[:, 0])
                selection = compose(dataclasses.replace(selection, stay=None), stay)
            if selection.features is not None:
                row, visual, _ = self._columns(call, unit)
                hidden = hidden.clone() if hidden is given else hidden
                hidden[row, visual[selection.keep]] = selection.features.to(hidden.dtype)
            start = 0
            for i in unit:
                size = len(call.alive[i])
                mine = selection if len(unit) == 1 else _part(selection, start, size)
                self._record(call, method, site, i, mine)
                call.alive[i] = call.alive[i][mine.keep]
                start += size
            assert start == evidence.n
        return hidden

    def _record(self, call: Call, method: Method, site: int, index: int, selection: Selection) -> None:
        """Note what happened to one image, once however many beams repeat its row."""
        assert call.frame is not None and call.layout is not None
        span = call.layout.spans[index]
        copies = len(call.layout.text) // call.frame.layout.batch
        if span.row % copies:
            return
        seen = call.frame.images[span.source]
        alive = seen.origin[call.alive[index].to(seen.origin.device)]
        kept = alive[selection.keep.to(alive.device)]
        seen.stages.append(Stage(site, method.name, alive, kept, selection))

    def _evidence(self, call: Call, method: Method, site: int, unit: Sequence[int], hidden: Tensor) -> Evidence:
        assert call.frame is not None and call.layout is not None
        row, visual, text = self._columns(call, unit)
        seen = [call.frame.images[call.layout.spans[i].source] for i in unit]
        first = seen[0].evidence
        rows = [s.evidence.features[call.alive[i]] for i, s in zip(unit, seen, strict=True)]
        where = [s.evidence.coordinates[call.alive[i]] for i, s in zip(unit, seen, strict=True)]
        extra: dict[str, Any] = {}
        if "hidden" in method.needs:
            extra["hidden"] = hidden[row, visual]
        if "text_hidden" in method.needs:
            extra["text_hidden"] = hidden[row, text]
        if "text" in method.needs:
            assert call.embeds is not None
            extra["text"] = call.embeds[row, call.layout.text_after(call.layout.spans[unit[0]]).to(hidden.device)]
        if "previous" in method.needs:
            extra["previous"] = call.previous[site][row, visual]
        if method.needs & _ATTENTION:
            then, shown = call.attention[site, *unit]
            still = torch.searchsorted(then, self._positions(call, unit))  # some may have left since
            for name in method.needs & shown.keys():
                of_text, pairs = name == "text_keys", name == "relevance"
                extra[name] = shown[name] if of_text else shown[name].index_select(int(pairs), still)
        return Evidence(
            grid=first.grid,
            coordinates=torch.cat(where),
            features=torch.cat(rows),
            total=sum(s.evidence.total for s in seen),
            depth=self._depth,
            modality=first.modality,
            seed=first.seed,
            **extra,
        )

    # -- where things are

    def _units(self, call: Call, scope: str) -> list[list[int]]:
        """The spans that are judged together."""
        assert call.layout is not None
        if scope == "image":
            return [[i] for i in range(len(call.layout.spans))]
        rows: dict[int, list[int]] = {}
        for i, span in enumerate(call.layout.spans):
            rows.setdefault(span.row, []).append(i)
        return list(rows.values())

    def _columns(self, call: Call, unit: Sequence[int]) -> tuple[int, Tensor, Tensor]:
        """Row of a unit, columns of its tokens, and of the prompt text after its first image, as they stand now."""
        assert call.layout is not None
        first, visual = call.layout.spans[unit[0]], self._positions(call, unit)
        row, text = first.row, call.layout.text_after(first).to(visual.device)
        plan = self._plan(call)
        if plan is None:
            return row, visual, text
        both = torch.searchsorted(self._sorted(plan, row), torch.cat([visual, text]))
        offset = 0 if plan.valid is None else plan.index.shape[1] - plan.valid[row].sum()
        visual, text = (both + offset).split([len(visual), len(text)])
        return row, visual, text

    @staticmethod
    def _positions(call: Call, unit: Sequence[int]) -> Tensor:
        """Where the tokens of a unit that are alive stand in the prompt, rising."""
        assert call.layout is not None
        return torch.cat([call.layout.spans[i].positions.to(call.alive[i].device)[call.alive[i]] for i in unit])

    @staticmethod
    def _sorted(plan: Plan, row: int) -> Tensor:
        index = plan.index[row]
        return index if plan.valid is None else index[plan.valid[row]]

    @staticmethod
    def _plan(call: Call) -> Plan | None:
        return call.cuttings[-1].plan if call.cuttings else None

    @staticmethod
    def _valid(call: Call, plan: Plan | None, row: int) -> Tensor | None:
        """Which columns hold real tokens, where the attention mask does not tell."""
        if plan is not None:
            return None if plan.valid is None else plan.valid[row]
        return None if call.mask is None else call.mask[row].bool()

    # -- what the layers get

    def _rotary(self, call: Call, cutting: Cutting, embeddings: Any) -> Any:
        key = ("rotary", cutting.first, id(embeddings))
        if key not in call.memo:  # the embeddings ride along, so that their id stays theirs
            taken = tuple(sequence.take(e, cutting.plan.index, e.dim() - 2) for e in embeddings)
            call.memo[key] = (embeddings, taken)
        return call.memo[key][1]


def _part(selection: Selection, start: int, size: int) -> Selection:
    """The part of a prompt's selection that speaks of one image, whose tokens begin at ``start``."""
    here = ((selection.keep >= start) & (selection.keep < start + size)).nonzero()[:, 0]
    scores, rows, into = selection.scores, selection.features, selection.merged_into
    if into is not None:
        into = into[start : start + size] - (selection.keep < start).sum()
        into = into.masked_fill((into < 0) | (into >= len(here)), -1)
    return dataclasses.replace(
        selection,
        keep=selection.keep[here] - start,
        scores=None if scores is None else scores[start : start + size],
        features=None if rows is None else rows[here],
        merged_into=into,
    )
