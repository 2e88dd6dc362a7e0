"""An independent reference for the engine: whole prompts, no cache, no padding, no hooks, float64; it only masks.

Each prompt of a batch is read alone, as one list of embeddings. A token that left before decoder layer l goes on
through the layers like any other, but from layer l on nobody sees it. The layers are written out here from their
weights. From the handle it takes only which tokens survived at each site, by way of ``handle.report``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.models import IMAGE, PAD, SIDE, TOKENS, Tower, tiny_llava


@dataclass(frozen=True)
class Read:
    """What a prompt did in the reference.

    Args:
        logits: What follows each token, [sequence, vocabulary]; NaN where the token had left.
        hidden: Input of each decoder layer, [layers + 1, entries, d].
        maps: Attention of each decoder layer, mean over heads, [layers, entries, entries].
        keys: Keys of each decoder layer after rotation, heads side by side, [layers, entries, heads * width].
        column: The entry of each token of the sequence; -1 where the token left before the LLM.
        visual: For each image the entries of the tokens that entered the LLM.
    """

    logits: Tensor
    hidden: Tensor
    maps: Tensor
    keys: Tensor
    column: Tensor
    visual: tuple[Tensor, ...]


class Oracle:
    """The reference of one model; make it before the model is compressed."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).double().eval()
        self.model.set_attn_implementation("eager")
        self.text = self.model.model.language_model
        self.config = self.text.config

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """What the projector makes of one picture, [n, d]."""
        return self.model.model.get_image_features(pixels[None].double(), return_dict=True).pooler_output[0]

    def logits(
        self,
        inputs: Mapping[str, Tensor],
        sequences: Tensor,
        report: Any = None,
        positions: str = "original",
        rewrite: Any = None,
    ) -> Tensor:
        """Return what follows each token of ``sequences``, [batch, sequence, vocabulary]; NaN on padding."""
        out = torch.full((*sequences.shape, self.config.vocab_size), float("nan"), dtype=torch.float64)
        for row in range(len(sequences)):
            read = self.read(inputs, sequences, row, report, positions, rewrite=rewrite and rewrite(row))
            out[row, sequences.shape[1] - len(read.logits) :] = read.logits
        return out

    @torch.no_grad()
    def read(
        self,
        inputs: Mapping[str, Tensor],
        sequences: Tensor,
        row: int,
        report: Any = None,
        positions: str = "original",
        source: int | None = None,
        rewrite: Any = None,
    ) -> Read:
        """Read one sequence, which begins with prompt ``source`` of the inputs (default: prompt ``row``).

        ``rewrite(layer, h, maps, text, visual)`` may return other inputs of a layer than those that came out of the
        one before; it sees the entries of the text and those of each image.
        """
        source = row if source is None else source
        mask = inputs.get("attention_mask")
        real = torch.ones_like(inputs["input_ids"][source]) if mask is None else mask[source]
        pad = int((real == 0).sum())
        ids = sequences[row, pad:]
        prompt = inputs["input_ids"].shape[1] - pad
        layers = self.config.num_hidden_layers

        placeholders = (inputs["input_ids"] == IMAGE).sum(1)
        first = int(placeholders[:source].sum()) // TOKENS
        images = [first + i for i in range(int(placeholders[source]) // TOKENS)]
        pictures = [] if report is None else [image for image in report.images if image.row == source]
        assert report is None or len(pictures) == len(images)

        entries, where, dies = [], [], []  # embedding, place in the sequence, first layer that no longer sees it
        column = torch.full((len(ids),), -1)
        visual: list[list[int]] = [[] for _ in images]
        starts = (ids[:prompt] == IMAGE).nonzero()[:, 0][::TOKENS].tolist()
        place = 0
        while place < len(ids):
            if place in starts:
                image = starts.index(place)
                rows = self.features(inputs["pixel_values"][images[image]])
                for token, features, last in _tokens(rows, pictures[image] if pictures else None, layers):
                    column[place + token] = len(entries)
                    visual[image].append(len(entries))
                    entries.append(features)
                    where.append(place + token)
                    dies.append(last)
                place += TOKENS
            else:
                column[place] = len(entries)
                entries.append(self.text.embed_tokens.weight[ids[place]])
                where.append(place)
                dies.append(layers)
                place += 1
        numbers = torch.arange(len(entries)) if positions == "packed" else torch.tensor(where)
        last = torch.tensor(dies)
        words = [entry for entry in range(len(entries)) if all(entry not in tokens for tokens in visual)]
        change = rewrite and (lambda layer, h, maps: rewrite(layer, h, maps, words, visual))
        hidden, maps, keys, final = self._layers(torch.stack(entries), numbers, last, change)
        logits = torch.full((len(ids), self.config.vocab_size), float("nan"), dtype=torch.float64)
        seen = column >= 0
        logits[seen] = final[column[seen]]
        gone = seen & (last[column.clamp(min=0)] < layers)
        logits[gone] = float("nan")
        return Read(logits, hidden, maps, keys, column, tuple(torch.tensor(v, dtype=torch.long) for v in visual))

    def _layers(
        self, h: Tensor, positions: Tensor, dies: Tensor, change: Any = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Llama, written out: [t, d] embeddings to layer inputs, attention maps, keys and logits."""
        config, t = self.config, len(h)
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        width = config.hidden_size // heads
        frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
        angle = positions.double()[:, None] * frequency
        turn = torch.polar(torch.ones_like(angle), angle)  # [t, width / 2]

        def norm(x: Tensor, module: Any) -> Tensor:
            return module.weight * x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

        def rotate(x: Tensor) -> Tensor:  # [heads, t, width]; halves are the real and imaginary parts
            z = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * turn
            return torch.cat([z.real, z.imag], -1)

        def split(x: Tensor, n: int) -> Tensor:
            return x.view(t, n, width).transpose(0, 1)

        causal = torch.ones(t, t, dtype=torch.bool).tril()
        inputs, maps, keys = [h], [], []
        for index, layer in enumerate(self.text.layers):
            visible = causal & (dies > index)
            visible |= torch.eye(t, dtype=torch.bool)  # a token that left still sees itself, and nobody looks
            h = change(index, h, maps) if change else h
            x, attention = norm(h, layer.input_layernorm), layer.self_attn
            q = rotate(split(x @ attention.q_proj.weight.T, heads))
            k = rotate(split(x @ attention.k_proj.weight.T, groups))
            keys.append(k.transpose(0, 1).flatten(1))
            k = k.repeat_interleave(heads // groups, 0)
            v = split(x @ attention.v_proj.weight.T, groups).repeat_interleave(heads // groups, 0)
            scores = (q @ k.transpose(1, 2) / width**0.5).masked_fill(~visible, float("-inf")).softmax(-1)
            maps.append(scores.mean(0))
            h = h + (scores @ v).transpose(0, 1).reshape(t, -1) @ attention.o_proj.weight.T
            x, mlp = norm(h, layer.post_attention_layernorm), layer.mlp
            gate = x @ mlp.gate_proj.weight.T
            h = h + (gate * gate.sigmoid() * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
            inputs.append(h)
        logits = norm(h, self.text.norm) @ self.model.lm_head.weight.T
        return torch.stack(inputs), torch.stack(maps), torch.stack(keys), logits


def _tokens(features: Tensor, image: Any, layers: int) -> list[tuple[int, Tensor, int]]:
    """What the LLM reads of one image: place, embedding, and the first layer from which it is gone."""
    if image is None:
        return [(i, row, layers) for i, row in enumerate(features)]
    kept = list(image.kept)
    rows = features[kept]
    if image.merged_into is not None:
        slots = torch.tensor(image.merged_into)
        rows = torch.stack([features[slots == slot].mean(0) for slot in range(len(kept))])
    lives = [[layer for layer in range(1, layers) if token not in image.after(layer)] for token in kept]
    return [(t, row, gone[0] if gone else layers) for t, row, gone in zip(kept, rows, lives, strict=True)]


#: Greedy generation that neither stops early nor hides its logits.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "return_dict_in_generate": True,
    "output_logits": True,
}

#: Every difference that `differ` measured; the terminal summary prints the largest.
DIFFERENCES: list[float] = []


def differ(logits: Any, reference: Tensor) -> float:
    """Return the largest difference between the logits of new tokens, one [batch, v] per step, and the reference's.

    Args:
        logits: What ``generate`` returned, or a list of steps.
        reference: What `Oracle.logits` returned for the sequences that came of it.
    """
    steps = torch.stack(list(logits), 1)
    wanted = reference[:, -1 - steps.shape[1] : -1]
    difference = float((steps - wanted).abs().max())
    assert difference == difference, "the reference has no logits there"
    DIFFERENCES.append(difference)
    return difference


def cache_lengths(report: Any, inputs: Mapping[str, Tensor], layers: int, decoded: int) -> list[int]:
    """Return how long each layer's cache must be: the longest row's survivors, and the tokens decoded since."""
    mask = inputs["attention_mask"]
    text = ((inputs["input_ids"] != IMAGE) & mask.bool()).sum(1).tolist()
    alive = [
        [sum(len(image.after(layer)) for image in report.images if image.row == row) for row in range(len(text))]
        for layer in range(layers)
    ]
    rows = [[t + a for t, a in zip(text, counts, strict=True)] for counts in alive]
    whole = all(image.n_kept == image.tokens for image in report.images)
    return [
        (mask.shape[1] if whole and counts == alive[0] else max(row)) + decoded
        for counts, row in zip(alive, rows, strict=True)
    ]


def vivid(model: Any) -> Any:
    """Return the model with larger decoder weights: freshly made, attention is flat and a wrong mask hardly shows."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "vision_tower" not in name:
                sharp = "q_proj" in name or "k_proj" in name
                weight.mul_(10 if "embed_tokens" in name or "lm_head" in name else 6 if sharp else 3)
    return model


@cache
def pair(impl: str = "sdpa", tower: Tower = "clip") -> tuple[Any, Oracle]:
    """Return a small model and its reference; every test gets the same ones, so nothing may be left on them."""
    model = vivid(tiny_llava(impl, tower=tower))
    return model, Oracle(model)


def prompts(rows: Sequence[Sequence[int]], pixels: Tensor | None = None, seed: int = 1) -> dict[str, Tensor]:
    """Return a left-padded batch; in ``rows`` each IMAGE stands for a whole picture."""
    ids = [[i for item in row for i in ([IMAGE] * TOKENS if item == IMAGE else [item])] for row in rows]
    length = max(map(len, ids))
    inputs = {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids]),
    }
    count = sum(list(row).count(IMAGE) for row in rows)
    if count:
        noise = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
        inputs["pixel_values"] = noise if pixels is None else pixels
    return inputs
