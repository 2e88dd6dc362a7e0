"""Evidence: what methods are shown equals what the model computes, and nothing larger is ever made."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import foveate
from foveate.core import DECODER_EVIDENCE, Chain, Evidence, Method
from foveate.engines import capture
from foveate.engines.base import compress
from tests.engine.oracle import GREEDY, pair
from tests.engine.probes import Coin, SharedCoin, peek, watch
from tests.models import IMAGE, PATCH, SIDE, TOKENS, Tower, one_row, tiny_inputs, tiny_llava

TOWERS: list[Tower] = ["clip", "siglip"]
IMPLS = ["sdpa", "eager"]
ENCODER = ("encoder_fold", "encoder_saliency", "encoder_shallow", "encoder_keys")
INSIDE = (*sorted(DECODER_EVIDENCE), "text", "coordinates")


@torch.no_grad()
def _encoder(tower: Tower, pixels: Tensor) -> tuple[list[Tensor], list[Tensor], int, int]:
    """Hidden states and attention maps of the stock tower, rows before the first patch, index of the feature layer."""
    model = tiny_llava("eager", tower=tower)
    out = model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True, return_dict=True)
    skip, layer = (1, 2) if tower == "clip" else (0, 3)
    return [h[:, skip:] for h in out.hidden_states], list(out.attentions), skip, layer


def _run(model: Any, method: Method | str, inputs: dict[str, Tensor], **options: Any) -> Any:
    with compress(model, method) as handle:
        output = model.generate(**inputs, **GREEDY, **options, max_new_tokens=2)
    return handle, output


# -- the encoder


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("spec", ["evocut:keep=5", "evocut:keep=5,start=1", "evocut:keep=5,start=2,last=3"])
def test_folds(spec: str, tower: Tower, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, seen = tiny_inputs(), watch(monkeypatch)
    states, *_ = _encoder(tower, inputs["pixel_values"])
    _run(pair(impl, tower)[0], spec, inputs)
    method = foveate.from_spec(spec)
    for image, evidence in enumerate(seen["evocut", 0]):
        carry = None
        for layer in method.encoder_layers(4):
            carry = method.fold(carry, states[layer - 1][image], states[layer][image])
        assert evidence.encoder_fold is not None
        torch.testing.assert_close(evidence.encoder_fold, carry, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("layer", ["feature", "last"])
def test_saliency_and_keys(layer: Any, tower: Tower, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_CHUNK", 5)
    inputs, seen = tiny_inputs(), watch(monkeypatch)
    states, maps, skip, feature = _encoder(tower, inputs["pixel_values"])
    model = pair(impl, tower)[0]
    _run(model, peek(0, "encoder_saliency", "encoder_shallow", "encoder_keys", "encoder_fold", layer=layer), inputs)
    attention = maps[feature if layer == "feature" else -1].mean(1)
    module = model.model.vision_tower.encoder.layers[feature]
    with torch.no_grad():
        keys = module.self_attn.k_proj(module.layer_norm1(states[feature])).unflatten(-1, (4, 8)).mean(2)
        moves = [(b - a).norm(dim=2) for a, b in pairwise(states)]
    fold = torch.stack([moves[0] * 8, moves[1] * 4, moves[2] * 2, moves[3]]).sum(0)
    evidences = seen["peek", 0]
    assert [e.encoder_saliency.shape for e in evidences] == [(TOKENS,)] * 3
    for image, evidence in enumerate(evidences):
        for name, heads in (("encoder_shallow", maps[1].mean(1)), ("encoder_saliency", attention)):
            wanted = heads[image, 0, 1:] if tower == "clip" else heads[image].mean(0)
            assert (evidence.require(name) - wanted).abs().max() <= 1e-6
        assert skip or abs(wanted.sum() - 1) <= 1e-5
        torch.testing.assert_close(evidence.encoder_keys, keys[image], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(evidence.encoder_fold, fold[image], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tower", TOWERS)
def test_several_methods_listen_at_once(impl: str, tower: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, model, seen = tiny_inputs(), pair(impl, tower)[0], watch(monkeypatch)
    _, maps, _, feature = _encoder(tower, inputs["pixel_values"])
    _run(model, "todre:keep=12,exit=none + adav:keep=9 + evocut:keep=7 + evocut:keep=5,start=1", inputs)
    last, left = seen["evocut", 0], seen["adav", 0]  # of two methods of one name the last is remembered
    alone = {}
    for spec in ("evocut:keep=7", "evocut:keep=5,start=1"):
        again = watch(monkeypatch)
        _run(model, spec, inputs)
        alone[spec] = again["evocut", 0]
    for image in range(3):
        places = [tuple(row) for row in last[image].coordinates.tolist()]
        index = [row * 4 + column for _, row, column in places]
        assert len(index) == 7
        assert torch.equal(last[image].encoder_fold, alone["evocut:keep=5,start=1"][image].encoder_fold[index])
        index = [row * 4 + column for _, row, column in left[image].coordinates.tolist()]
        attention = maps[feature][image].mean(0)
        wanted = attention[0, 1:] if tower == "clip" else attention.mean(0)
        assert (left[image].encoder_saliency - wanted[index]).abs().max() <= 1e-6


def test_text_and_seed_are_the_prompts_own(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, (model, _), seen = tiny_inputs(), pair(), watch(monkeypatch)
    _run(model, peek(0, "text", "seed"), inputs)
    together = seen["peek", 0]
    embed = model.get_input_embeddings().weight
    ids = inputs["input_ids"]
    ends = [(row, (ids[row] == IMAGE).nonzero()[TOKENS * n + TOKENS - 1].item()) for row, n in ((1, 0), (2, 0), (2, 1))]
    for evidence, (row, end) in zip(together, ends, strict=True):
        words = [i for i in ids[row, end + 1 :].tolist() if i != IMAGE]
        assert torch.equal(evidence.text, embed[words])
    assert len({int(e.seed) for e in together}) == 3
    alone = [e for row in (1, 2) for e in _alone(model, one_row(inputs, row), monkeypatch)]
    assert [int(e.seed) for e in alone] == [int(e.seed) for e in together]


def _alone(model: Any, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Evidence]:
    seen = watch(monkeypatch)
    _run(model, peek(0, "text", "seed"), inputs)
    return seen["peek", 0]


@pytest.mark.parametrize("tower", TOWERS)
def test_folding_holds_on_to_no_layer(tower: Tower) -> None:
    """While the encoder runs, the same outputs of its layers are alive as in the plain model, and later none."""
    model, inputs = tiny_llava(tower=tower), tiny_inputs((1,))
    layers = list(model.model.vision_tower.encoder.layers)

    def watched(around: AbstractContextManager[Any]) -> list[list[bool]]:
        outputs: list[weakref.ref[Tensor]] = []
        alive: list[list[bool]] = []

        def after(module: Any, args: Any, output: Any) -> None:
            outputs.append(weakref.ref(output[0] if isinstance(output, tuple) else output))
            alive.append([ref() is not None for ref in outputs])

        with around, torch.no_grad():
            hooks = [layer.register_forward_hook(after) for layer in layers]
            try:
                model(**inputs)
            finally:
                for hook in hooks:
                    hook.remove()
        return [*alive, [ref() is not None for ref in outputs]]

    plain = watched(nullcontext())
    assert len(plain) == 5 and not any(plain[-1])
    assert watched(compress(model, "evocut:keep=5,start=1")) == plain


class _Shapes(TorchDispatchMode):
    """Notes the last two sizes of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.seen.add(tuple(tensor.shape[-2:]))
        return out


def test_no_map_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_CHUNK", 5)
    original, shapes = capture.attention_rows, set()

    def spy(*args: Any) -> Tensor:
        rows = original(*args)
        shapes.add(tuple(rows.shape[-2:]))
        return rows

    monkeypatch.setattr(capture, "attention_rows", spy)
    inputs = one_row(tiny_inputs(), 2)
    length = inputs["input_ids"].shape[1]
    text = 7 + 4 + 4  # the words after the first picture
    method = Chain(peek(0, "encoder_saliency"), peek(3, "relevance", "text_mass", together=True))
    for tower, rows in (("clip", 17), ("siglip", 16)):
        model, _ = pair("sdpa", tower)  # type: ignore[arg-type]
        with compress(model, method), torch.no_grad(), _Shapes() as made:
            model(**inputs)
        assert (rows, rows) not in made.seen or tower == "siglip"  # 16 x 16 is also another shape of this model
        assert (length, length) not in made.seen
        with _Shapes() as eager, torch.no_grad():
            pair("eager", tower)[0](**inputs)  # type: ignore[arg-type]
        assert {(rows, rows), (length, length)} <= eager.seen, "the check would not notice a map"
    assert {columns for _, columns in shapes} == {17, 16, length}
    assert {r for r, columns in shapes if columns == 17} == {1}
    assert max(r for r, columns in shapes if columns == 16) <= 5
    assert max(r for r, columns in shapes if columns == length) <= text < length


@pytest.mark.parametrize("tower", TOWERS)
def test_painting_one_patch_changes_one_token(tower: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava(tower=tower)
    for layer in model.model.vision_tower.encoder.layers:  # patches that cannot see each other
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
    method = peek(0, "encoder_fold", "encoder_keys", "coordinates")
    inputs, seen = tiny_inputs((2,)), watch(monkeypatch)
    _run(model, method, inputs)
    before = seen["peek", 0]
    assert before[0].grid == (1, 4, 4)
    for image, row, column in ((0, 0, 0), (0, 2, 1), (1, 1, 3), (1, 3, 3)):
        painted = inputs["pixel_values"].clone()
        painted[image, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = 1.0
        assert painted.shape[-1] == SIDE
        _run(model, method, {**inputs, "pixel_values": painted})
        after = seen["peek", 0]
        for name in ("features", "encoder_fold", "encoder_keys"):
            changed = [
                (i, tuple(evidence.coordinates[token].tolist()))
                for i, evidence in enumerate(after)
                for token in range(TOKENS)
                if not torch.equal(getattr(evidence, name)[token], getattr(before[i], name)[token])
            ]
            assert changed == [(image, (0, row, column))], name


# -- the decoder


def _decoder_evidence(
    monkeypatch: pytest.MonkeyPatch, impl: str, method: Method, site: int, together: bool, **options: Any
) -> None:
    """Compare everything that a method sees at a site inside the LLM with the reference's full maps."""
    (model, oracle), inputs, seen = pair(impl), tiny_inputs(), watch(monkeypatch)
    handle, output = _run(model, method, inputs, **options)
    evidences, report, prompt = iter(seen["peek", site]), handle.report, inputs["input_ids"].shape[1]
    ids = inputs["input_ids"]
    for row in (1, 2):
        pad = int((inputs["attention_mask"][row] == 0).sum())
        read = oracle.read(inputs, output.sequences[:, :prompt], row, report, handle.positions)
        images = [image for image in report.images if image.row == row]
        units = [list(range(len(images)))] if together else [[i] for i in range(len(images))]
        for unit in units:
            alive = {i: _alive_before(images[i], site) for i in unit}
            if not sum(map(len, alive.values())):
                continue
            evidence = next(evidences)
            entries = [read.visual[i][images[i].kept.index(token)] for i in unit for token in alive[i]]
            end = (ids[row, pad:] == IMAGE).nonzero()[unit[0] * TOKENS + TOKENS - 1].item()
            words = [c for c in range(end + 1, prompt - pad) if ids[row, pad + c] != IMAGE]
            text, visual = read.column[words], torch.stack(entries)
            attention = read.maps[site - 1]
            wanted = attention[text][:, visual], attention[visual][:, text].sum(1)
            for got, want in zip((evidence.relevance, evidence.text_mass), wanted, strict=True):
                assert got is not None and got.shape == want.shape
                assert (got - want).abs().max() <= 1e-6 * 5
            torch.testing.assert_close(evidence.hidden.double(), read.hidden[site][visual], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(evidence.previous.double(), read.hidden[site - 1][visual], atol=1e-4, rtol=1e-4)
            read_keys, embeddings = read.keys[site - 1], model.get_input_embeddings().weight[ids[row, pad:][words]]
            for got, want in (
                (evidence.keys, read_keys[visual]),
                (evidence.text_keys, read_keys[text]),
                (evidence.text_hidden, read.hidden[site][text]),
                (evidence.text, embeddings),
            ):
                torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4, check_dtype=False)
            features = read.hidden[0][visual]
            torch.testing.assert_close(evidence.features.double(), features, atol=1e-4, rtol=1e-4)
            places = [tuple(divmod(token, 4)) for i in unit for token in alive[i]]
            assert [tuple(place[1:]) for place in evidence.coordinates.tolist()] == places
            assert evidence.total == sum(images[i].n_kept for i in unit)
    assert next(evidences, None) is None


def _alive_before(image: Any, site: int) -> list[int]:
    """Original indices of the tokens that the probe saw: all stages before it, also those at its own site."""
    kept = list(range(image.tokens))
    for stage in image.stages:
        if stage.method == "peek":
            break
        kept = list(stage.kept)
    return kept


DROPS = {
    "nothing before": (),
    "site 0 before": (Coin(positions="packed", share=0.6),),
    "inside before": (SharedCoin(at="2", share=0.6, least=0),),
    "just before": (Coin(at="34", share=0.7),),
    "at the same site": (Coin(at="4", share=0.6),),
    "everywhere before": (Coin(share=0.9), SharedCoin(at="13", share=0.8, least=0), Coin(at="4", share=0.8)),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("together", [True, False], ids=["prompt", "image"])
@pytest.mark.parametrize("name", DROPS)
def test_decoder_evidence(name: str, together: bool, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = peek(4, *INSIDE, together=together)
    method = Chain(*DROPS[name], probe) if DROPS[name] else probe
    monkeypatch.setattr(capture, "_CHUNK", 5)
    _decoder_evidence(monkeypatch, impl, method, 4, together)


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"num_beams": 1, "use_cache": False}], ids=str)
def test_decoder_evidence_with_other_caches(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    probe = peek(1, *INSIDE, together=True)
    if "use_cache" in options:
        options = {**options, "suppress_tokens": [IMAGE]}
    _decoder_evidence(monkeypatch, "sdpa", probe, 1, True, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_relevance_equals_the_stock_models_own_attention(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stock, inputs, seen = pair(impl)[0], pair("eager")[0], tiny_inputs(), watch(monkeypatch)
    _run(model, peek(3, "relevance", "text_mass", together=True), inputs)
    with torch.no_grad():
        maps = stock(**inputs, output_attentions=True).attentions[2].mean(1)
    ids = inputs["input_ids"]
    for evidence, row in zip(seen["peek", 3], (1, 2), strict=True):
        visual = (ids[row] == IMAGE).nonzero()[:, 0]
        text = torch.tensor([i for i in range(ids.shape[1]) if i > visual[TOKENS - 1] and ids[row, i] != IMAGE])
        assert (evidence.relevance - maps[row][text][:, visual]).abs().max() <= 1e-6
        assert (evidence.text_mass - maps[row][visual][:, text].sum(1)).abs().max() <= 1e-6


def test_taps_change_no_bit() -> None:
    for impl in IMPLS:
        for tower in TOWERS:
            (model, _), inputs = pair(impl, tower), tiny_inputs()
            plain = model.generate(**inputs, **GREEDY, max_new_tokens=3)
            method = Chain(
                peek(0, *ENCODER, layer="last"), peek(0, *ENCODER), peek(3, "relevance", "hidden", "previous")
            )
            _, output = _run(model, method, inputs)
            assert torch.equal(torch.stack(output.logits), torch.stack(plain.logits)[:2])
