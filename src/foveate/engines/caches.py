"""Marks on caches: what a later call must know of the prompt that filled one, and that it needs a handle to go on.

A mark is an attribute of the cache object: it is freed with it and goes along with its copies.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from foveate.engines.state import attended
from foveate.errors import UnsupportedCall

#: The prompt that filled a cache, and which of its tokens are in it (`cut.Turn`).
TURN = "_foveate_turn"
#: Which tokens left before which decoder layer (`masks.Cutting`).
PLANS = "_foveate_plans"
#: Which rows of pictures text looks across at (`cross.Sight`).
SIGHT = "_foveate_sight"
_GUARDED = "get_mask_sizes"


class Guard:
    """Takes the place of a cache's ``get_mask_sizes``, which every forward asks before it writes anything.

    Without a handle the stock model would go on from a shortened cache as if it were whole. The cache is held weakly:
    if it held itself, its memory would wait for the garbage collector.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = weakref.ref(cache)

    def __reduce__(self) -> Any:
        return Guard, (self._cache(),)  # copies and pickles of the cache are guarded themselves

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache: Any = self._cache()
        if not torch.compiler.is_compiling() and not attended():
            if int(cache.get_seq_length()):
                raise UnsupportedCall(
                    "this cache was filled while tokens left, and no handle is attached any more",
                    "call handle.remove() after the conversation is over, or start a new cache",
                )
            forget(cache)  # it was reset
        return getattr(type(cache), _GUARDED)(cache, *args, **kwargs)


def remember(cache: Any, name: str, value: Any, *, shorter: bool = True) -> None:
    """Put a mark on a cache; ``shorter``: it holds fewer tokens than the caller's prompt."""
    setattr(cache, name, value)
    if shorter and _GUARDED not in vars(cache):
        setattr(cache, _GUARDED, Guard(cache))


def forget(cache: Any) -> None:
    """Take all marks off a cache that was reset."""
    for name in (TURN, PLANS, SIGHT, _GUARDED):
        vars(cache).pop(name, None)
