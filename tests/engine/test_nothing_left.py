"""A handle leaves the model as it found it, whatever happened in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import foveate
from foveate.core import Evidence, Method, Selection
from foveate.engines.base import compress
from tests.engine.oracle import GREEDY, pair
from tests.models import Tower, tiny_inputs

EVERYTHING = "todre:keep=12 + adav:keep=10 + evocut:keep=8 + v2drop:stages=2@0.5/4@0.5 + todre:keep=6,exit=0.5,tau=0.6"


def _state(model: Any) -> dict[str, Any]:
    """Everything on a model that an engine could touch: attributes, hooks, configs, registered names."""
    found: dict[str, Any] = {
        "names": sorted(AttentionInterface._global_mapping),
        "masks": sorted(AttentionMaskInterface._global_mapping),
    }
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, dict):  # parameters, buffers, submodules, hooks
                found[f"{path}.{name}"] = {key: id(item) for key, item in value.items()}
            else:
                found[f"{path}.{name}"] = id(value)
        if hasattr(module, "config"):
            found[f"{path}: attention"] = module.config._attn_implementation
    found["config"] = model.config.to_json_string(use_diff=False)
    found["generation config"] = model.generation_config.to_json_string(use_diff=False)
    return found


def _logits(model: Any) -> torch.Tensor:
    return torch.stack(model.generate(**tiny_inputs(), **GREEDY, max_new_tokens=4).logits)


@pytest.fixture(params=[("sdpa", "clip"), ("eager", "clip"), ("eager", "siglip")], ids="-".join)
def model(request: pytest.FixtureRequest) -> Any:
    impl, tower = request.param
    chosen, _ = pair(impl, tower)
    before, logits = _logits(chosen), _state(chosen)  # the first call lets transformers settle its own hooks
    yield chosen
    assert _state(chosen) == logits
    assert torch.equal(_logits(chosen), before)


def test_after_with(model: Any) -> None:
    state = _state(model)
    with compress(model, EVERYTHING) as handle:
        assert _state(model) != state
        first = _logits(model)
        assert handle.report.calls == 1
    assert handle.report.calls == 1
    with compress(model, EVERYTHING):
        assert torch.equal(_logits(model), first)


def test_remove_twice_and_again(model: Any) -> None:
    handle = compress(model, EVERYTHING)
    handle.remove()
    state = _state(model)
    handle.remove()
    assert _state(model) == state
    with compress(model, "grid:keep=4") as other:
        handle.remove()
        _logits(model)
        assert other.report.kept == 12


def test_one_handle_at_a_time(model: Any) -> None:
    with compress(model, "grid:keep=4") as handle:
        state = _state(model)
        with pytest.raises(foveate.UnsupportedCall) as error:
            compress(model, "v2drop:stages=2@0.5")
        assert error.value.hint and "Chain" in error.value.hint
        assert _state(model) == state
        _logits(model)
        assert handle.report.kept == 12
    with compress(model, "v2drop:stages=2@0.5"):
        pass


def test_a_handle_that_could_not_be_made(model: Any) -> None:
    for spec in (
        "evocut:keep=4,start=9",
        "adav:keep=4 + evocut:keep=4,last=9",
        "adav:keep=8 + v2drop:stages=2@0.5/9@0.5",
        "adav:keep=8,positions=original + evocut:keep=4",
    ):
        state = _state(model)
        with pytest.raises(foveate.FoveateError):
            compress(model, spec)
        assert _state(model) == state


@dataclass(frozen=True, kw_only=True)
class Failing(Method):
    name: ClassVar[str] = "failing"

    at: int

    def sites(self, n_layers: int) -> tuple[int, ...]:
        return (self.at,)

    def select(self, evidence: Evidence, site: int) -> Selection:
        raise ZeroDivisionError


def _after_failure(model: Any, method: Method | str, fail: Callable[[Any], None], error: type[BaseException]) -> None:
    """A call fails; the same handle, if it can, and the model afterwards work as if it had not happened."""
    with compress(model, method) as handle:
        state = _state(model)
        works = not any(isinstance(part, Failing) for part in foveate.from_spec(method).parts)
        before = _logits(model) if works else None
        for _ in range(2):
            with pytest.raises(error):
                fail(model)
        assert _state(model) == state
        if works:
            assert torch.equal(_logits(model), before)
            assert handle.report.calls == 2
        text = tiny_inputs((0,))
        plain = model.generate(**text, **GREEDY, max_new_tokens=2)
        assert len(plain.logits) == 2


@pytest.mark.parametrize("at", [0, 3])
def test_a_method_that_raises(model: Any, at: int) -> None:
    failing = Failing(at=at, positions="paper" if at else "packed")
    _after_failure(model, failing, _logits, ZeroDivisionError)
    chain = foveate.Chain(foveate.from_spec("adav:keep=8 + v2drop:stages=2@0.5"), failing)
    _after_failure(model, chain, _logits, ZeroDivisionError)


def test_an_exception_leaves_the_with_block(model: Any) -> None:
    with pytest.raises(ZeroDivisionError), compress(model, Failing(at=2)):
        _logits(model)


@pytest.mark.parametrize("where", ["encoder", "decoder", "decoding"])
def test_an_interrupt_in_the_middle(model: Any, where: str) -> None:
    target = (
        model.model.vision_tower.encoder.layers[2]
        if where == "encoder"
        else model.model.language_model.layers[4 if where == "decoder" else 5]
    )

    def interrupt(module: Any, args: Any, kwargs: Any) -> None:
        if where == "decoding" and args[0].shape[1] > 1:
            return
        raise KeyboardInterrupt

    def fail(model: Any) -> None:
        hook = target.register_forward_pre_hook(interrupt, with_kwargs=True)
        try:
            _logits(model)
        finally:
            hook.remove()

    _after_failure(model, EVERYTHING, fail, KeyboardInterrupt)


def test_bad_input(model: Any) -> None:
    def fail(model: Any) -> None:
        model.generate(**{**tiny_inputs(), "pixel_values": torch.zeros(3, 3, 7, 7)}, max_new_tokens=2)

    _after_failure(model, EVERYTHING, fail, Exception)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_two_models_at_once(tower: Tower) -> None:
    one, other = pair("sdpa", tower)[0], pair("eager", tower)[0]
    with compress(one, "grid:keep=4"):
        alone = _logits(one)
    with compress(one, "grid:keep=4") as first, compress(other, EVERYTHING) as second:
        _logits(other)
        assert torch.equal(_logits(one), alone)
        first.remove()
        _logits(other)
    assert second.report.calls == 2
