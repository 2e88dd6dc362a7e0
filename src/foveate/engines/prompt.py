"""Site 0: the prompt is shortened outside the model, and the stock ``generate`` runs on an ordinary, shorter prompt.

The encoder runs once here; the features of the tokens that stay go in as ``mm_encoder_outputs``; the caller's own
prompt is put back in front of the answer. Methods that act only inside the LLM pass through here too: nothing is cut,
but the frame tells the decoder part where each image is.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.core import Evidence, Method, Selection, compose
from foveate.engines import sequence
from foveate.engines.caches import PLANS, TURN, forget, remember
from foveate.engines.capture import Record
from foveate.engines.cut import (
    Cut,
    Kept,
    PromptFirst,
    Turn,
    check_modes,
    shift_positions,
    shorten_lengths,
    with_mask,
    with_prompt,
)
from foveate.engines.encoded import Encoder
from foveate.engines.masks import Cutting
from foveate.engines.sequence import Layout
from foveate.engines.state import Attachment, Clock, Frame, Frames, Seen, Stage, bind
from foveate.engines.turns import Shortener
from foveate.errors import NothingCompressed, UnsupportedCall
from foveate.families import Family, Picture
from foveate.families.releases import installed, upgrade
from foveate.selection import select_all


def find_pictures(
    family: Family, model: Any, pictures: Mapping[str, Sequence[Picture]], mask: Tensor, arguments: Mapping[str, Any]
) -> Layout:
    """Find the tokens of each picture of a call in its prompts."""
    return sequence.find(
        mask,
        {m: family.placeholders(model, m, arguments["input_ids"], arguments) for m in pictures},
        {m: [len(picture.rows) for picture in each] for m, each in pictures.items()},
        {m: [picture.visual for picture in each] for m, each in pictures.items()},
    )


class PromptPart:
    """Wraps ``generate`` and ``forward`` of one model instance."""

    def __init__(
        self,
        model: Any,
        family: Family,
        methods: Sequence[Method],
        inner_sites: frozenset[int],
        positions: str,
        frames: Frames,
        finished: Callable[[Frame], None],
        attachment: Attachment,
    ) -> None:
        self._model, self._family, self._methods = model, family, tuple(methods)
        self._inner_sites, self._positions = inner_sites, positions
        self._frames, self._finished = frames, finished
        self._depth = len(family.layers(model))
        self.encoder = Encoder(model, family, methods, frames, attachment)
        self._shortener = Shortener(model, family, positions)
        self._generate_signature = inspect.signature(model.generate)
        attachment.wrap(model, "generate", self._wrap_generate(model.generate))
        attachment.wrap(model, "_expand_multimodal_outputs", self._wrap_expand(model._expand_multimodal_outputs))
        for module in dict.fromkeys((model, family.base(model))):
            attachment.wrap(module, "forward", self._wrap_forward(module.forward))

    # -- the two doors

    def _wrap_generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        @torch.no_grad()
        def generate(*args: Any, **kwargs: Any) -> Any:
            arguments = bind(self._generate_signature, args, kwargs)
            if "inputs" in arguments:
                arguments["input_ids"] = arguments.pop("inputs")
            cut = None
            if not self._frames.inside:
                config = self._model.generation_config
                with self.encoder.ordered():
                    if self._media(arguments) or hasattr(arguments.get("past_key_values"), TURN):
                        check_modes(arguments, config)
                    cut = self.cut(with_mask(arguments, config))
            if cut is None:
                with self._frames.entered(None):
                    return original(**arguments)
            shorten_lengths(cut, self._model.generation_config)
            if cut.removed and cut.arguments.get("streamer") is not None:
                cut.arguments["streamer"] = PromptFirst(cut.arguments["streamer"], cut.ids)
            with self._frames.entered(cut.frame):
                output = original(**cut.arguments)
            self._close(cut, output)
            return with_prompt(output, cut)

        return generate

    def _wrap_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._frames.inside:
                return original(*args, **kwargs)
            first = self._family.first_position
            with self.encoder.ordered():
                cut = self.cut(shift_positions(bind(signature, args, kwargs), -first))
            with self._frames.entered(None if cut is None else cut.frame):
                if cut is None:
                    return original(*args, **kwargs)
                output = original(**shift_positions(cut.arguments, first))
            self._close(cut, output)
            return output

        return forward

    def _wrap_expand(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Beams repeat each prompt's pictures; transformers' own way needs pictures of equal size in some families."""

        @functools.wraps(original)
        def expand(input_ids: Any, mm_encoder_output: Any, expand_size: int = 1, **kwargs: Any) -> Any:
            frame = self._frames.top
            if frame is None:
                return original(input_ids, mm_encoder_output, expand_size=expand_size, **kwargs)
            order = [
                frame.images[span.source]
                for row in range(frame.layout.batch)
                for _ in range(expand_size)
                for span in frame.layout.spans
                if span.row == row
            ]
            outputs = {m: output for m, output in mm_encoder_output.items() if output is not None}
            return {m: self._carrier(output, [s for s in order if s.modality == m]) for m, output in outputs.items()}

        return expand

    def _carrier(self, output: Any, images: Sequence[Seen]) -> Any:
        """A fresh encoder output that carries what is left of these pictures."""
        kept = [seen.picture.kept(seen.origin, seen.evidence.features) for seen in images]
        return self._family.with_rows(output, [rows for rows, _ in kept], [levels for _, levels in kept])

    def _close(self, cut: Cut, output: Any) -> None:
        """Check that what should have left has left, tell the handle, and leave the turn on the cache."""
        if cut.frame is not None:
            if cut.frame.pending:
                raise NothingCompressed(
                    f"tokens should have left before layers {sorted(cut.frame.pending)} and the layers never ran",
                    "call the model itself, not a compiled or replaced copy of its decoder",
                )
            self._finished(cut.frame)
        cache = cut.arguments.get("past_key_values")
        if cache is None:
            parts = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
            cache = next((part for part in parts if hasattr(part, "get_seq_length")), None)
        if cut.turn is not None and cache is not None:
            remember(cache, TURN, cut.turn, shorter=cut.turn.kept is not None)

    # -- the cut

    def cut(self, arguments: Mapping[str, Any]) -> Cut | None:
        """Return the call with a shorter prompt, or None when it is none of our business.

        Raises:
            UnsupportedCall: If the call asks for something that compression cannot honour.
        """
        arguments = {self._family.former_names.get(name, name): value for name, value in arguments.items()}
        media, cache = self._media(arguments), arguments.get("past_key_values")
        filled = cache is not None and int(cache.get_seq_length()) > 0
        if cache is not None and not filled:
            forget(cache)
        self._check_plans(getattr(cache, PLANS, ()))
        ready = arguments.get("mm_encoder_outputs") or {}
        if any(output is not None for output in ready.values()):
            raise UnsupportedCall(
                "ready-made `mm_encoder_outputs` were passed, which show nothing of the encoder",
                "pass pixel_values; an assistant_model reads what is left here, and needs no handle of its own",
            )
        turn = getattr(cache, TURN, None)
        if turn is not None:
            return self._shortener.later(arguments, turn)
        ids = arguments.get("input_ids")
        if arguments.get("inputs_embeds") is not None and (media or ids is None or self._shortener.visual(ids)):
            raise UnsupportedCall(
                "`inputs_embeds` hide where the visual tokens are, and whether there are any",
                "pass input_ids and pixel_values; for text alone, input_ids or a call outside the `with` block",
            )
        if not media:
            return None
        if ids is None:
            raise UnsupportedCall("pictures were passed without a prompt", "pass input_ids with pixel_values")
        if filled:
            raise UnsupportedCall(
                "a picture was passed with a cache that is not empty, and that was filled without it",
                "start a new cache, and pass the whole conversation with all its pictures",
            )
        return self._first_turn(arguments, media)

    def _media(self, arguments: Mapping[str, Any]) -> list[str]:
        """The modalities that a call brings."""
        given = {self._family.former_names.get(name, name) for name, value in arguments.items() if value is not None}
        return [modality for modality, name in self._family.media_arguments.items() if name in given]

    def _check_plans(self, plans: Sequence[Cutting]) -> None:
        """Refuse a cache in which layers are shorter than this handle knows to treat."""
        if plans and min(plan.first for plan in plans) < min(self._inner_sites, default=self._depth):
            raise UnsupportedCall(
                f"tokens left this cache before layers {sorted({plan.first for plan in plans})}, and the method here "
                f"acts {f'before layers {sorted(self._inner_sites)}' if self._inner_sites else 'before the LLM alone'}",
                "go on with the method that filled the cache, or start a new cache",
            )

    def _first_turn(self, arguments: Mapping[str, Any], media: Sequence[str]) -> Cut:
        if arguments.get("labels") is not None:
            raise UnsupportedCall(
                "`labels` have one entry per token of the full prompt, and the compressed prompt is shorter",
                "compute the loss without compression, or from the returned logits of the answer",
            )
        for modality in media:
            if (wanted := self._family.lacks(modality)) is not None:
                raise UnsupportedCall(
                    f"{modality}s of {self._family.name} need transformers >= {wanted}, found {installed()}",
                    upgrade(wanted),
                )
        ids, mask = arguments["input_ids"], self._mask(arguments)
        clock = Clock(ids.device)
        outputs, pictures, records, taken = self._encode(arguments, media, clock)
        layout = find_pictures(self._family, self._model, pictures, mask, arguments)
        images = self._see(layout, ids, pictures)
        with clock.section("select"):
            keeps = self._select(images, records)
        whole = all(len(keep) == seen.tokens for keep, seen in zip(keeps, images, strict=True))
        frame = Frame(layout, images, clock, tuple(mask.sum(1).tolist()), set(self._inner_sites) if images else set())
        rest = {name: value for name, value in arguments.items() if name not in taken}
        rest["mm_encoder_outputs"] = {
            modality: self._carrier(output, [seen for seen in images if seen.modality == modality])
            for modality, output in outputs.items()
        }
        if whole:
            return Cut(rest, ids, frame, Turn(ids, None) if images else None)
        frame.layout, plan = layout.shortened(keeps)
        if self._positions == "original" and bool((plan.index[:, -1] < ids.shape[1] - 1).any()):
            raise UnsupportedCall(
                "a prompt ends with a picture whose last token left, and an answer continues from the last position",
                'end the prompt with text, or choose positions="packed"',
            )
        plan = plan.to(ids.device)
        rest.update(self._shortener.short(rest, ids, mask, plan))
        rest["position_ids"], last = self._shortener.positions(arguments, rest, mask, plan)
        return Cut(rest, ids, frame, Turn(ids, Kept(plan, rest["position_ids"], last)))

    # -- evidence and selection

    def _encode(
        self, arguments: Mapping[str, Any], media: Sequence[str], clock: Clock
    ) -> tuple[dict[str, Any], dict[str, list[Picture]], dict[str, Record], set[str]]:
        """Run the encoder once; return by modality what it gave, its pictures, what it showed, and what it took."""
        outputs, records, taken = self.encoder.run(arguments, media, clock)
        pictures = {m: list(self._family.pictures(self._model, m, out, arguments)) for m, out in outputs.items()}
        return outputs, pictures, records, taken

    def _see(self, layout: Layout, ids: Tensor, pictures: Mapping[str, list[Picture]]) -> list[Seen]:
        needs = {need for method in self._methods for need in method.needs}
        embed = self._model.get_input_embeddings()
        images = []
        for span in layout.spans:
            picture = pictures[span.modality][span.number]
            feature, order = picture.features, picture.crop_order
            extra: dict[str, Any] = {}
            if "text" in needs:
                after = layout.text_after(span).to(ids.device)
                extra["text"] = embed(ids[span.row, after])
            if "seed" in needs:
                text = layout.text[span.row]
                place = int(span.positions[0]) - (int(text[0]) if len(text) else ids.shape[1])
                number = zlib.crc32(ids[span.row].cpu()[text].numpy().tobytes(), place)
                extra["seed"] = torch.tensor(number, device=feature.device)
            evidence = Evidence(
                grid=picture.grid,
                coordinates=picture.coordinates,
                features=feature,
                total=len(feature),
                depth=self._depth,
                modality=span.modality,
                crops=picture.crops,
                crop_order=None if order is None else order.to(feature.device),
                thumbnail=picture.thumbnail,
                **extra,
            )
            origin = torch.arange(len(feature), device=feature.device)
            images.append(Seen(span.row, span.modality, span.number, len(feature), picture, evidence, origin))
        return images

    def _select(self, images: Sequence[Seen], records: Mapping[str, Record]) -> list[Tensor]:
        """Run the methods of site 0; return the tokens that stay."""
        keeps = select_in_turn(enumerate(self._methods), images, records)
        for seen in images:
            seen.evidence = dataclasses.replace(seen.evidence, total=len(seen.origin))
        return keeps

    def _mask(self, arguments: Mapping[str, Any]) -> Tensor:
        """The 2-D mask of the prompts."""
        ids, mask = arguments["input_ids"], arguments.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.shape != ids.shape:
            raise UnsupportedCall(
                f"an attention_mask of shape {tuple(mask.shape)} for input_ids of shape {tuple(ids.shape)}",
                "pass the 2-D mask that the processor gives",
            )
        assert isinstance(mask, Tensor)
        return mask


def select_in_turn(
    methods: Iterable[tuple[int, Method]], images: Sequence[Seen], records: Mapping[str, Record]
) -> list[Tensor]:
    """Run methods of site 0 in order; each sees what the one before left. Return the tokens that stay.

    Args:
        methods: Each with the place under which the encoder was recorded for it.
        images: To be shortened.
        records: What the encoder showed, by modality.
    """
    done = [seen.origin for seen in images]
    for place, method in methods:
        shown = {modality: record.evidence(method, place) for modality, record in records.items()}
        evidences = []
        for seen in images:
            rows: dict[str, Any] = {
                name: seen.picture.evidence(values)[seen.origin] for name, values in shown[seen.modality].items()
            }
            evidences.append(dataclasses.replace(seen.evidence, **rows))
        for i, selection in enumerate(select_all(method, evidences, 0)):
            if selection.stay is not None:
                really = Selection(keep=selection.stay.nonzero()[:, 0])
                selection = compose(dataclasses.replace(selection, stay=None), really)
            seen, keep = images[i], selection.keep
            seen.stages.append(Stage(0, method.name, seen.origin, seen.origin[keep], selection))
            seen.origin = seen.origin[keep]
            seen.evidence = seen.evidence.subset(selection)
            done[i] = seen.origin
    return done
