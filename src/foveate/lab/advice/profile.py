"""A short profile of a model on this machine: what its parts cost at a few sizes, and what each method costs."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

import foveate
from foveate import registry
from foveate.errors import FoveateError
from foveate.lab.advice.timing import Call
from foveate.lab.contest import with_keep
from foveate.lab.environment import cpu_name
from foveate.lab.paired import Spread

_FORMAT = 1

Stage = Literal["encode", "prefill", "step", "rest", "first", "memory: encode", "memory: read"]


class ProfileError(FoveateError):
    """A saved profile cannot be used."""


@dataclass(frozen=True)
class Point:
    """One quantity under some conditions, in milliseconds or bytes.

    Args:
        stage: What was measured.
        batch: Prompts read together.
        size: ``encode``: pixel values of one picture; ``step``: tokens in the cache; else tokens of the prompt.
        values: One value per round.
    """

    stage: Stage
    batch: int
    size: int
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return Spread.of(self.values).median

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, by the median."""
        spread = Spread.of(self.values)
        return (spread.high - spread.low) / 2 / spread.median


@dataclass(frozen=True)
class MethodPoint:
    """What a call with a method took, in milliseconds: one entry per round of each stage.

    Args:
        method: Its spec, without the budget.
        keep: Its budget, in tokens of one picture.
        batch: Prompts read together.
        alive: Tokens of one picture in each decoder layer.
        calls: The stages of each call.
        select: Time in the method's own selection, all sites.
    """

    method: str
    keep: int
    batch: int
    alive: tuple[int, ...]
    calls: tuple[Call, ...]
    select: tuple[float, ...]

    def median(self, stage: str) -> float:
        return Spread.of([getattr(call, stage) for call in self.calls]).median


@dataclass(frozen=True)
class Profile:
    """What was measured, and on what.

    Args:
        setting: Model, device, hardware, versions: what a profile is valid for.
        layers: Decoder layers.
        tokens: Visual tokens of the profiled picture.
        pictures: How many pictures of so many tokens the model makes of it: its tiles, where each counts by itself.
        text: Other tokens of the prompt without a question.
        question: Tokens of the profiled question.
        pixels: Pixel values of the profiled picture, as the encoder gets it.
        kv_bytes: Bytes of keys and values that a token takes in all layers.
        weight_bytes: Bytes of the weights.
        device_bytes: Memory of the device, all of it.
        limit: Longest sequence that the model knows positions for.
        points: Parts of the model.
        methods: Methods.
        refused: Methods that cannot run here, and why.
        seconds: How long it took.
        rounds: How often everything was measured.
    """

    setting: dict[str, str]
    layers: int
    tokens: int
    pictures: int
    text: int
    question: int
    pixels: int
    kv_bytes: int
    weight_bytes: int
    device_bytes: int
    limit: int
    points: tuple[Point, ...]
    methods: tuple[MethodPoint, ...]
    refused: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    rounds: int = 0

    def at(self, stage: Stage) -> list[Point]:
        """Return what was measured of a stage."""
        return [point for point in self.points if point.stage == stage]

    def save(self, path: Path) -> None:
        """Write the profile as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path, setting: dict[str, str] | None = None) -> Profile:
        """Read a profile.

        Args:
            path: What `save` wrote.
            setting: What it has to be valid for.

        Raises:
            ProfileError: If it is none, or was made under other conditions.
        """
        try:
            data = json.loads(path.read_text())
            if data.pop("format") != _FORMAT:
                raise ValueError("another format")
            data["points"] = tuple(Point(**p | {"values": tuple(p["values"])}) for p in data["points"])
            data["methods"] = tuple(map(_method_point, data["methods"]))
            profile = cls(**data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ProfileError(f"not a profile: {path} ({error})", "name a new file, and a profile is made") from error
        other = {k: v for k, v in (setting or {}).items() if profile.setting.get(k) != v}
        if other:
            said = ", ".join(f"{k} was {profile.setting.get(k)}, is {v}" for k, v in other.items())
            raise ProfileError(f"{path} was made under other conditions: {said}", f"make it anew: rm {path}")
        return profile


def _method_point(data: dict[str, Any]) -> MethodPoint:
    rows = {"alive": tuple(data["alive"]), "select": tuple(data["select"])}
    return MethodPoint(**data | rows | {"calls": tuple(Call(**call) for call in data["calls"])})


def setting(model: Any, name: str) -> dict[str, str]:
    """Return what a profile of this model is valid for."""
    device = model.device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "model": name,
        "class": type(model).__name__,
        "device": device.type,
        "hardware": hardware,
        "threads": str(torch.get_num_threads()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "foveate": foveate.__version__,
    }


def device_bytes(device: torch.device) -> int:
    """Return the memory of a device, all of it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def schedule(method: str, keep: int, tokens: int, layers: int) -> list[tuple[int, int | None]]:
    """Return before which layer how many tokens of a picture are left; None where that depends on the input.

    Raises:
        BudgetError: If the method cannot meet the budget in so many layers.
    """
    built, alive, left = registry.from_spec(with_keep(method, keep)), tokens, []
    for site in built.sites(layers):
        stays = built.expected(alive, tokens, site, layers)
        alive = alive if stays is None else stays
        left.append((site, stays))
    return left
