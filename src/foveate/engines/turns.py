"""Later turns: how a call is cut that goes on from a cache with a shortened prompt in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.engines import sequence
from foveate.engines.cut import Cut, Kept, Turn
from foveate.engines.sequence import Plan
from foveate.errors import UnsupportedCall
from foveate.families import Family

#: Arguments with one entry per token of the prompt.
PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


class Shortener:
    """Cuts what speaks of each token of a prompt, in the first turn and in later ones."""

    def __init__(self, model: Any, family: Family, positions: str) -> None:
        self._model, self._family, self._positions = model, family, positions

    def short(self, arguments: Mapping[str, Any], ids: Tensor, mask: Tensor, plan: Plan) -> dict[str, Any]:
        """Return everything that has one entry per token of the prompt, cut by the plan."""
        config = self._model.config.get_text_config()
        short = sequence.take(ids, plan.index, 1)
        new_mask = sequence.take(mask, plan.index, 1)
        if plan.valid is not None:
            short = short.masked_fill(~plan.valid, config.pad_token_id or 0)
            new_mask = new_mask * plan.valid.to(new_mask.dtype)
        out: dict[str, Any] = {"input_ids": short, "attention_mask": new_mask}
        for name in PER_TOKEN:
            if arguments.get(name) is not None:
                out[name] = sequence.take(arguments[name], plan.index, 1)
        return out

    def positions(
        self, arguments: Mapping[str, Any], short: Mapping[str, Any], mask: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        """Positions of the tokens that stay, and the last; counted alike by both doors: one goes on after the other."""
        given = arguments.get("position_ids")
        if self._positions == "original":
            if given is None:
                given = self._family.position_ids(self._model, arguments["input_ids"], mask, arguments)
            return sequence.take(given, plan.index, given.dim() - 1), self._family.last_position(given)
        if given is not None:
            raise UnsupportedCall(
                "`position_ids` were passed, and this method renumbers the tokens that stay",
                'leave them out, or choose positions="original"',
            )
        positions = self._family.position_ids(self._model, short["input_ids"], short["attention_mask"], {})
        return positions, self._family.last_position(positions)

    def later(self, arguments: Mapping[str, Any], turn: Turn) -> Cut | None:
        """Return a later call without its pictures, which are in the cache already, and cut as the first turn was.

        Raises:
            UnsupportedCall: If the call does not go on from what is in the cache.
        """
        media = [name for name in self._family.media_arguments.values() if arguments.get(name) is not None]
        if turn.kept is None and not media:
            return None
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        rest = {name: value for name, value in arguments.items() if name not in media}
        if ids is None:
            raise UnsupportedCall(
                "a later turn needs `input_ids`, to tell what is in the cache already", "pass input_ids"
            )
        if len(ids) % len(turn.ids):
            raise UnsupportedCall(
                f"the cache holds {len(turn.ids)} prompts, this call brings {len(ids)}", "start a new cache"
            )
        times, first, seen = len(ids) // len(turn.ids), turn.ids, turn.ids.shape[1]
        kept = None if turn.kept is None else turn.kept.expand(times)
        if times > 1:
            first = first.repeat_interleave(times, 0)
        turn = Turn(first, kept)
        fresh = ids  # may hold placeholders for pictures that are passed
        only_new = ids.shape[1] < seen or (mask is not None and mask.shape[1] > ids.shape[1])
        if not only_new:
            if not torch.equal(ids[:, :seen].to(first.device), first):
                raise UnsupportedCall(
                    "the prompt does not begin with the one in the cache",
                    "pass the whole conversation, beginning with the first prompt as it was, or start a new cache",
                )
            held = seen if kept is None else kept.plan.index.shape[1]
            read = int(arguments["past_key_values"].get_seq_length()) - held
            fresh = ids[:, seen + read + 1 :]  # what was generated is text, whatever its id
        if (media or not only_new) and self.visual(fresh):
            raise UnsupportedCall(
                "a picture was added to a cache that is not empty",
                "start a new cache, and pass the whole conversation with all its pictures",
            )
        if kept is None:
            return Cut(rest, ids, None, turn)
        return (self._new_tokens if only_new else self._whole)(rest, ids, mask, turn, kept)

    def visual(self, ids: Tensor) -> bool:
        """Whether there is a placeholder among these tokens."""
        visual = [self._family.token_id(self._model, modality) for modality in self._family.media_arguments]
        return bool(torch.isin(ids, torch.tensor(visual, device=ids.device)).any())

    def _whole(self, rest: dict[str, Any], ids: Tensor, mask: Tensor | None, turn: Turn, kept: Kept) -> Cut:
        """The whole conversation: its beginning is cut as it was, what is new stays."""
        mask, seen, valid = torch.ones_like(ids) if mask is None else mask, turn.ids.shape[1], kept.plan.valid
        tail = torch.arange(seen, ids.shape[1], device=ids.device).expand(len(ids), -1)
        plan = Plan(
            torch.cat([kept.plan.index, tail], 1),
            None if valid is None else torch.cat([valid, torch.ones_like(tail, dtype=torch.bool)], 1),
        )
        given = rest.get("position_ids")
        short = self.short(rest, ids, mask, plan)
        if given is not None:
            positions, _ = self.positions(rest, short, mask, plan)
        else:
            after = kept.last + mask[:, seen:].long().cumsum(-1)
            positions = torch.cat([kept.positions, after], -1)
        return Cut({**rest, **short, "position_ids": positions}, ids, None, turn)

    def _new_tokens(self, rest: dict[str, Any], ids: Tensor, mask: Tensor | None, turn: Turn, kept: Kept) -> Cut:
        """Only new tokens, as a decoding loop of one's own passes them: shorten what speaks of the whole prompt."""
        seen, plan = turn.ids.shape[1], kept.plan
        if mask is not None and mask.shape[1] >= seen + ids.shape[1]:
            head = sequence.take(mask[:, :seen], plan.index, 1)
            if plan.valid is not None:
                head = head * plan.valid.to(head.dtype)
            rest["attention_mask"] = mask = torch.cat([head, mask[:, seen:]], 1)
            if rest.get("position_ids") is None:
                after = kept.last + mask[:, plan.index.shape[1] :].long().cumsum(-1)
                rest["position_ids"] = after[..., -ids.shape[1] :]
        elif self._positions == "original" and rest.get("position_ids") is None:
            if plan.valid is not None:
                raise UnsupportedCall(
                    "original positions of a padded batch cannot be continued without the attention_mask of all tokens",
                    "pass the mask of the whole prompt and of everything after it, as without compression",
                )
            read = int(rest["past_key_values"].get_seq_length()) - plan.index.shape[1]
            rest["position_ids"] = kept.last + read + 1 + torch.arange(ids.shape[1], device=ids.device)
        return Cut(rest, ids, None, turn)
