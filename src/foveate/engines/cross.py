"""Site 0 where text looks across at the pictures: the rows it looks at become fewer, the prompt stays as it is.

The encoder runs once here, as for other families, and the language model is handed the rows that stay. The model makes
its cross-attention mask for all rows at every step; before the language model gets it, it is cut to the same columns.

Padding (the slots that a prompt has no picture for, and what a picture leaves empty of its own) holds no visual token,
and text that sees a picture does not see it: it leaves with the first token that leaves. A prompt without pictures then
has nothing to look at, and reads on as if it were alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import StaticLayer

from foveate.core import Method
from foveate.engines import sequence
from foveate.engines.caches import SIGHT, remember
from foveate.engines.cut import Cut, Turn
from foveate.engines.prompt import PromptPart
from foveate.engines.sequence import Plan
from foveate.engines.state import Attachment, Clock, Frame, Frames, Seen, kv_bytes_per_token
from foveate.errors import UnsupportedCall
from foveate.families.cross import CrossFamily
from foveate.report import Report


@dataclass(frozen=True)
class Sight:
    """What a cache remembers of the rows that its prompts look at.

    Args:
        rows: How many rows the encoder made for each prompt.
        plan: Which of them stayed; None: all.
    """

    rows: int
    plan: Plan | None

    def narrow(self, mask: Tensor | None, size: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Return a cross-attention mask for what stayed; filler is dark, also to text that sees no picture.

        Args:
            mask: What the model made, [prompts, 1, tokens, rows]; None lets every token see all.
            size: Prompts and tokens of this step.
            dtype: Of the model.
        """
        if self.plan is None:
            return mask
        plan = self.plan.expand(size[0] // len(self.plan.index))
        if mask is None:
            mask = torch.zeros(size[0], 1, size[1], plan.index.shape[1], dtype=dtype, device=plan.index.device)
        elif mask.shape[-1] == self.rows:
            mask = mask.gather(3, plan.index.to(mask.device)[:, None, None].expand(-1, 1, size[1], -1))
        else:
            raise UnsupportedCall(
                f"cross_attention_mask speaks of {mask.shape[-1]} rows of pictures, and {self.rows} were read",
                "pass the mask for the pictures of the first turn, or start a new cache",
            )
        if plan.valid is not None:
            mask = mask.masked_fill(~plan.valid.to(mask.device)[:, None, None], torch.finfo(mask.dtype).min)
        return mask


@dataclass
class CrossFrame(Frame):
    """A frame whose visual tokens stand beside the prompt.

    Args:
        sight: Where the rows that stay come from.
        states: Those rows, [prompts, rows, d].
        read: Rows of all pictures before and after the selection, padding of prompts and slots apart.
    """

    sight: Sight
    states: Tensor
    read: tuple[int, int]

    def report(self, method: str, model: Any, layers: int, calls: int) -> Report:
        of_token, depth = kv_bytes_per_token(model), model.config.get_text_config().num_hidden_layers
        text = of_token * (depth - layers) * sum(self.prompt_tokens)
        before, after = (text + of_token * layers * rows for rows in self.read)
        report = super().report(method, model, layers, calls)
        return replace(report, prompt_tokens_after=self.prompt_tokens, kv_bytes_before=before, kv_bytes_after=after)


class CrossPart(PromptPart):
    """Wraps ``generate`` and ``forward`` of one model instance, and ``forward`` of its language model."""

    def __init__(
        self,
        model: Any,
        family: CrossFamily,
        methods: Sequence[Method],
        frames: Frames,
        finished: Callable[[Frame], None],
        attachment: Attachment,
    ) -> None:
        super().__init__(model, family, methods, frozenset(), "original", frames, finished, attachment)
        self._slots, self._across = family.slots, family.cross_layers(model)
        decoder = family.decoder(model)
        attachment.wrap(decoder, "forward", self._wrap_decoder(decoder.forward))

    def _wrap_decoder(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Hand the language model the rows that stay, once, and at every step the mask for them."""

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            frame, cache = self._frames.top, kwargs.get("past_key_values")
            sight: Sight | None = getattr(cache, SIGHT, None)
            new = frame if isinstance(frame, CrossFrame) and frame.sight is not sight else None
            sight = sight if new is None else new.sight
            if sight is None:
                return original(*args, **kwargs)
            tokens = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
            if new is not None:
                times = len(tokens) // len(new.states)  # beams repeat prompts in place
                kwargs["cross_attention_states"] = new.states.repeat_interleave(times, 0) if times > 1 else new.states
                self._fit(cache, new.states.shape[1])
                new.pending.clear()
            mask, size = kwargs.get("cross_attention_mask"), tokens.shape[:2]
            kwargs["cross_attention_mask"] = sight.narrow(mask, size, self._model.dtype)
            output = original(*args, **kwargs)
            if new is not None and output.past_key_values is not None:
                remember(output.past_key_values, SIGHT, sight, shorter=sight.plan is not None)
            return output

        return forward

    def _fit(self, cache: Any, rows: int) -> None:
        """Static layers are made for all rows: give those that look across the size of what stayed."""
        layers = [] if cache is None else cache.layers
        for index in self._across:
            if index < len(layers) and isinstance(layers[index], StaticLayer):
                layers[index] = StaticLayer(max_cache_len=rows)

    # -- the cut

    def cut(self, arguments: Mapping[str, Any]) -> Cut | None:
        if arguments.get("cross_attention_states") is not None:
            raise UnsupportedCall(
                "ready-made `cross_attention_states` were passed, which show nothing of the encoder",
                "pass pixel_values, or leave the `with` block for this call",
            )
        return super().cut(arguments)

    def _first_turn(self, arguments: Mapping[str, Any], media: Sequence[str]) -> Cut:
        if arguments.get("cross_attention_mask") is None:
            raise UnsupportedCall(
                "pictures were passed without `cross_attention_mask`, which tells what text sees which picture",
                "pass all that the processor gives",
            )
        ids, mask = arguments["input_ids"], self._mask(arguments)
        clock = Clock(ids.device)
        outputs, pictures, records, taken = self._encode(arguments, media, clock)
        slots, states = self._slots(arguments).tolist(), outputs["image"]
        marks = self._family.placeholders(self._model, "image", ids, arguments)
        layout = sequence.find(mask, {"image": marks}, {"image": [1] * len(slots)})
        marked = [sum(span.row == row for span in layout.spans) for row in range(len(ids))]
        passed = [sum(prompt == row for prompt, _ in slots) for row in range(len(states))]
        if marked != passed:
            raise UnsupportedCall(
                f"the prompts have places for {marked} pictures, and {passed} were passed",
                "let the processor make text and pictures together, with a list of pictures for each prompt",
            )
        images = self._see(layout, ids, pictures)
        with clock.section("select"):
            keeps = self._select(images, records)
        rows, plan, made = states.flatten(1, 2), None, states.shape[2] * len(images)
        if any(len(keep) < seen.tokens for keep, seen in zip(keeps, images, strict=True)):
            rows, plan = _stay(images, slots, states)
        frame = CrossFrame(
            layout=layout,
            images=images,
            clock=clock,
            prompt_tokens=tuple(mask.sum(1).tolist()),
            pending={0},
            sight=Sight(states.shape[1] * states.shape[2], plan),
            states=rows,
            read=(made, made if plan is None else sum(len(s.origin) + len(s.picture.fixed) for s in images)),
        )
        rest = {name: value for name, value in arguments.items() if name not in taken}
        return Cut(rest, ids, frame, Turn(ids, None))


def _stay(
    images: Sequence[Seen], slots: Sequence[Sequence[int]], states: Float[Tensor, "b m r d"]
) -> tuple[Float[Tensor, "b k d"], Plan]:
    """Return what is left of the rows of each prompt, with zeros behind those of shorter ones, and where it was."""
    indices = [[torch.arange(0, device=states.device)] for _ in states]
    rows = [[states[0, 0, :0]] for _ in states]
    for seen in images:
        picture = seen.picture
        assert picture.visual is not None
        prompt, slot = slots[seen.number]
        fixed, visual = (part.to(states.device) for part in (picture.fixed, picture.visual))
        index = torch.cat([visual[seen.origin], fixed]).sort().values + slot * states.shape[2]
        indices[prompt].append(index)
        rows[prompt].append(picture.kept(seen.origin, seen.evidence.features)[0])
    whole = [torch.cat(index) for index in indices]
    lengths, valid = torch.tensor([len(index) for index in whole]), None
    if int(lengths.min()) < int(lengths.max()):
        valid = (torch.arange(int(lengths.max())) < lengths[:, None]).to(states.device)
    plan = Plan(pad_sequence(whole, batch_first=True), valid)
    return pad_sequence([torch.cat(row) for row in rows], batch_first=True), plan
