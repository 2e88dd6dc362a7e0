from __future__ import annotations

from functools import cache
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.zoo.inputs import Batch, batch, mixed, one_row
from tests.zoo.items import items
from tests.zoo.models import FLAT, GREEDY, HIDDEN, MIXED, NAMES, VIDEO, image_token, placeholders, tiny
from tests.zoo.reference import reference_logits

NEW = 4
CROSS = "mllama"  # whose visual tokens are not in the prompt


@cache
def model(name: str, impl: str = "sdpa") -> Any:
    return tiny(name, impl)


def read(name: str, inputs: Batch, impl: str = "sdpa", **more: Any) -> tuple[Tensor, Tensor]:
    """Return what the model generates: sequences, and logits of the new tokens, [batch, NEW, vocabulary]."""
    suppressed = placeholders(model(name, impl))
    out = model(name, impl).generate(**inputs, max_new_tokens=NEW, suppress_tokens=suppressed, **GREEDY, **more)
    return out.sequences, torch.stack(out.logits, 1)


def new(logits: Tensor) -> Tensor:
    return logits[:, -1 - NEW : -1]


def close(name: str, inputs: Batch, impl: str = "sdpa") -> None:
    sequences, logits = read(name, inputs, impl)
    torch.testing.assert_close(new(reference_logits(model(name, impl), inputs, sequences)), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_without_a_drop_it_is_the_model(name: str, impl: str) -> None:
    close(name, batch(name), impl)


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("name", VIDEO)
def test_it_reads_videos(name: str, impl: str) -> None:
    close(name, batch(name, video=True), impl)


@pytest.mark.parametrize("name", MIXED)
def test_it_reads_images_and_videos_together(name: str) -> None:
    inputs = mixed(name)
    order = [key for key, _ in groupby(items(model(name), inputs), key=lambda item: (item.row, item.kind))]
    assert order == [(0, "image"), (0, "video"), (1, "video"), (1, "image")]
    close(name, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_it_reads_rows_without_an_image(name: str) -> None:
    close(name, batch(name, (0, 2, 1)))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_alone_is_the_row_of_the_batch(name: str) -> None:
    inputs = batch(name)
    if name == CROSS:  # a row with fewer images than another has slots without one, which its first tokens look at
        inputs = batch(name, (1, 1))
    sequences, _ = read(name, inputs)
    together = reference_logits(model(name), inputs, sequences)
    for row in range(2):
        single = one_row(name, inputs, row)
        assert single["attention_mask"].all()
        pad = sequences.shape[1] - NEW - single["input_ids"].shape[1]
        alone = reference_logits(model(name), single, sequences[row : row + 1, pad:])
        torch.testing.assert_close(alone[0], together[row, pad:], rtol=0, atol=5e-5)
        assert together[row, :pad].isnan().all()


@pytest.mark.parametrize("layer", [0, 1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_it_notices_a_single_hidden_token(name: str, layer: int) -> None:
    inputs = batch(name)
    found = items(model(name), inputs)
    sequences, logits = read(name, inputs)
    kept: list[list[Any]] = [[] for _ in found]
    kept[-1] = [(layer, range(1, len(found[-1].columns)))]
    masked = reference_logits(model(name), inputs, sequences, kept)
    assert (new(masked) - logits)[1].abs().max() > 1e-3
    torch.testing.assert_close(new(masked)[0], logits[0], rtol=0, atol=1e-5)  # the other row did not lose anything
    if name != CROSS:
        seen = inputs["attention_mask"][1].bool()
        gone = masked[1].isnan().any(-1)[: len(seen)] & seen
        assert gone.nonzero()[:, 0].tolist() == [int(found[-1].columns[0])]


@pytest.mark.parametrize("name", VIDEO)
def test_it_notices_a_single_hidden_token_of_a_video(name: str) -> None:
    inputs = batch(name, video=True)
    found = items(model(name), inputs)
    sequences, logits = read(name, inputs)
    kept: list[list[Any]] = [[] for _ in found]
    kept[0] = [(2, range(1, len(found[0].columns)))]
    masked = reference_logits(model(name), inputs, sequences, kept)
    assert (new(masked) - logits)[0].abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_tokens_can_carry_other_features(name: str) -> None:
    inputs = batch(name, (1, 1))
    found = items(model(name), inputs)
    sequences, logits = read(name, inputs)
    other = torch.randn(2, HIDDEN)
    kept: list[list[Any]] = [[] for _ in found]
    kept[0] = [(0, [1, len(found[0].columns) - 1])]
    plain = reference_logits(model(name), inputs, sequences, kept)
    merged = reference_logits(model(name), inputs, sequences, kept, features={0: other})
    assert (new(merged) - new(plain))[0].abs().max() > 1e-3
    torch.testing.assert_close(new(merged)[1], logits[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llava", "vipllava", "video_llava", "gemma3", "gemma4", "paligemma", "mistral3"])
def test_packed_it_is_the_model_on_a_shorter_prompt(name: str) -> None:
    """A prompt cut by hand: features and placeholders leave together, and what is left is an ordinary prompt."""
    net, inputs = model(name), batch(name, (1,))
    (item,) = items(net, inputs)
    stay = torch.arange(0, len(item.columns), 3)
    names = ("pixel_values", "pixel_values_images", "image_sizes", "image_position_ids")
    keys = [key for key in names if key in inputs]
    with torch.no_grad():
        encoded = net.model.get_image_features(**{key: inputs[key] for key in keys}, return_dict=True)
    rows = encoded.pooler_output[0][stay]
    encoded.pooler_output = [rows] if isinstance(encoded.pooler_output, (list, tuple)) else rows[None]
    here = torch.ones_like(inputs["input_ids"][0], dtype=torch.bool)
    here[item.columns] = False
    here[item.columns[stay]] = True
    short = Batch({key: value[:, here] for key, value in inputs.items() if key not in keys}, [])
    sequences, logits = read(name, short, mm_encoder_outputs={"image": encoded})
    whole = torch.cat([inputs["input_ids"], sequences[:, int(here.sum()) :]], 1)
    reference = reference_logits(net, inputs, whole, [[(0, stay)]], "packed", window="packed")
    torch.testing.assert_close(new(reference), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_hiding_is_cutting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways of reading, under masks and layer by layer, agree where both can be gone."""
    inputs = batch(name)
    sequences, _ = read(name, inputs)
    kept = [[(0, range(0, 16, 2)), (3, [4, 6])], [(2, [])], [(1, range(9)), (4, [0])]]
    hidden = reference_logits(model(name), inputs, sequences, kept)
    monkeypatch.setattr("tests.zoo.reference._recurrent", lambda model: True)
    cut = reference_logits(model(name), inputs, sequences, kept)
    torch.testing.assert_close(new(hidden), new(cut), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "llava_next_video"])
def test_newlines_are_no_visual_tokens(name: str) -> None:
    inputs = batch(name, (1, 1))
    for row, item in enumerate(items(model(name), inputs)):
        marked = (inputs["input_ids"][row] == image_token(model(name))).sum()
        height, width = inputs["image_sizes"][row].tolist()
        lines = {30: 8, 28: 8}[height]
        assert len(item.columns) == marked - lines, (height, width)


def test_several_sequences_of_a_prompt_stand_next_to_each_other() -> None:
    inputs = batch("llava")
    sequences, _ = read("llava", inputs)
    twice = reference_logits(model("llava"), inputs, sequences.repeat_interleave(2, 0))
    once = reference_logits(model("llava"), inputs, sequences)
    torch.testing.assert_close(twice, once.repeat_interleave(2, 0), rtol=0, atol=0, equal_nan=True)


def test_equal_arguments_give_equal_weights() -> None:
    first, second = tiny("gemma3", "sdpa", 3, seed=5), tiny("gemma3", "eager", 3, seed=5)
    other = tiny("gemma3", "sdpa", 3, seed=6)
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("name", FLAT)
def test_packed_positions_close_gaps(name: str) -> None:
    inputs = batch(name, (1,))
    found = items(model(name), inputs)
    kept = [[(0, [0])] for _ in found]
    sequences, _ = read(name, inputs)
    gaps = reference_logits(model(name), inputs, sequences, kept)
    packed = reference_logits(model(name), inputs, sequences, kept, "packed")
    assert (new(gaps) - new(packed)).abs().max() > 1e-3
