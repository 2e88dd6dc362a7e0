"""Pieces of text, put together, are the answer: no half characters, no stop string, nothing lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foveate.serve.voice import Stops, Voice

LETTERS = st.text("abc", max_size=12)


def pieces(stops: Stops, text: list[str]) -> list[str]:
    return [*(stops.push(piece) for piece in text), "" if stops.met else stops.rest()]


@given(text=st.lists(LETTERS), stop=st.text("abc", min_size=1, max_size=4))
def test_text_ends_before_a_stop_string_however_it_comes_in(text: list[str], stop: str) -> None:
    stops = Stops((stop,))
    said = "".join(pieces(stops, text))
    whole = "".join(text)
    assert said == whole.split(stop)[0]
    assert stops.met == (stop in whole)


@given(text=st.lists(LETTERS))
def test_nothing_that_can_become_a_stop_string_is_said_before_it_cannot(text: list[str]) -> None:
    stops = Stops(("ab", "ca"))
    said = ""
    for i, piece in enumerate(text):
        said += stops.push(piece)
        whole = "".join(text[: i + 1])
        ends = [whole.find(stop) for stop in ("ab", "ca") if stop in whole]
        assert whole[: min(ends, default=len(whole))].startswith(said)
        if not ends:  # at most one letter waits, and only one that begins a stop string
            assert whole[len(said) :] in (("a", "c") if whole.endswith(("a", "c")) else ("",))


@pytest.fixture(scope="module")
def bytewise() -> Any:
    """A tokenizer with a token for each byte, as others have them for what is rare; 256 ends an answer."""
    signs = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(sorted(signs))}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def speak(tokenizer: Any, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[Voice, list[str]]:
    said: list[str] = []
    voice = Voice(tokenizer, [tokenizer.eos_token_id], stops, said.append, lambda: False)
    for i in range(len(ids)):
        if voice(torch.tensor([[5, 6, *ids[: i + 1]]]), None).item():
            break
    voice.finish()
    return voice, said


def test_characters_of_several_tokens_come_whole(bytewise: Any) -> None:
    text = "naïve 日本 🙂 dog"
    ids = bytewise(text).input_ids
    assert len(ids) == len(text.encode())
    voice, said = speak(bytewise, [*ids, bytewise.eos_token_id, 9])
    assert said == list(text)
    assert (voice.tokens, voice.ended) == (len(ids) + 1, True)


def test_an_answer_that_is_cut_within_a_character_loses_nothing_else(bytewise: Any) -> None:
    voice, said = speak(bytewise, bytewise("dog 🙂").input_ids[:-1])
    assert said == [*"dog ", "\N{REPLACEMENT CHARACTER}"]
    assert not voice.ended


@given(ids=st.lists(st.integers(4, 665), max_size=30))
def test_pieces_are_the_whole(model: tuple[Any, Any], ids: list[int]) -> None:
    tokenizer = model[1].tokenizer
    assert "".join(speak(tokenizer, ids)[1]) == tokenizer.decode(ids, skip_special_tokens=True).lstrip()


def test_a_stop_string_across_tokens_ends_an_answer(model: tuple[Any, Any]) -> None:
    tokenizer = model[1].tokenizer
    ids = tokenizer("one dog and two", add_special_tokens=False).input_ids
    voice, said = speak(tokenizer, ids, stops=("g an",))
    assert "".join(said) == "one do"
    assert voice.ended
    assert voice.tokens < len(ids)
