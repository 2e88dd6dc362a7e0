"""The types everything speaks: what a method may look at, what it answers, and what a method is.

A method sees ONE image (or one video) and has no batch axis. Speed comes back in `selection.select_all`, which stacks
images of equal shape and calls the method under `torch.vmap`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate import budget
from foveate.budget import Keep
from foveate.errors import BudgetError, ContractError, MissingEvidence

Positions = Literal["paper", "original", "packed"]

#: Evidence that a method has to declare in ``needs``; the engine captures only what is declared.
ENCODER_EVIDENCE = frozenset({"encoder_fold", "encoder_keys", "encoder_saliency"})
DECODER_EVIDENCE = frozenset({"hidden", "previous", "relevance", "text_mass"})
DECLARABLE = ENCODER_EVIDENCE | DECODER_EVIDENCE | {"coordinates", "text", "seed"}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a method may look at, for one image at one site: one row per visual token as the LLM sees it.

    Args:
        grid: Frames (or crops), rows, columns before any drop.
        coordinates: Where each alive token sits in the grid.
        features: What the LLM reads for each token, in its embedding space.
        total: Visual tokens of this image that entered the decoder (at site 0: that the encoder made).
        depth: Decoder layers of the model.
        modality: ``image`` or ``video``.
        crops: Tokens per encoder forward (crop or frame); sums to n at site 0. ``()`` means one crop.
        crop_order: The tokens crop by crop; None where they stand so already.
        thumbnail: Which crop shows the whole image, where several crops do not; else None.
        encoder_fold: Result of the method's own fold over encoder layers.
        encoder_keys: Head-mean keys of the feature layer.
        encoder_saliency: Attention received, mean over heads: from CLS, or the column mean where there is no CLS.
        text: Input embeddings of the prompt text after the image.
        hidden: Input of decoder layer ``site``.
        previous: Input of the layer before.
        relevance: Attention of each prompt text token after the image to each visual token in layer ``site - 1``,
            mean over heads; each row is what is left of a row that sums to 1 over the whole prompt.
        text_mass: Attention of each visual token to all prompt text after the image, in the same layer.
        seed: A number made from the prompt and the image's place in it: the same prompt, the same number.
    """

    grid: tuple[int, int, int]
    coordinates: Int[Tensor, "n 3"]
    features: Float[Tensor, "n d"]
    total: int
    depth: int
    modality: str = "image"
    crops: tuple[int, ...] = ()
    crop_order: Int[Tensor, " n"] | None = None
    thumbnail: int | None = None
    encoder_fold: Float[Tensor, " n"] | None = None
    encoder_keys: Float[Tensor, "n v"] | None = None
    encoder_saliency: Float[Tensor, " n"] | None = None
    text: Float[Tensor, "t d"] | None = None
    hidden: Float[Tensor, "n d"] | None = None
    previous: Float[Tensor, "n d"] | None = None
    relevance: Float[Tensor, "r n"] | None = None
    text_mass: Float[Tensor, " n"] | None = None
    seed: Int[Tensor, ""] | None = None

    @property
    def n(self) -> int:
        """Tokens alive."""
        return self.features.shape[0]

    def by_crop(self) -> tuple[Int[Tensor, " c"], ...]:
        """Return the tokens of each crop, rising; one crop when nothing is known of crops."""
        order = self.crop_order
        if order is None:
            order = torch.arange(self.n, device=self.features.device)
        crops: tuple[Tensor, ...] = order.split(list(self.crops) or [self.n])
        return crops

    def require(self, name: str) -> Tensor:
        """Return the evidence ``name``.

        Raises:
            MissingEvidence: If the method did not declare it, so that the engine did not capture it.
        """
        value = getattr(self, name, None)
        if value is None:
            raise MissingEvidence(
                f"evidence `{name}` was not captured", f"add {name!r} to the method's `needs` if it reads it"
            )
        assert isinstance(value, Tensor)
        return value

    def subset(self, selection: Selection) -> Evidence:
        """Return the evidence of the tokens that a selection kept."""
        keep = selection.keep
        rows: dict[str, Any] = {"crops": (), "crop_order": None, "thumbnail": None}
        for name in ("coordinates", *ENCODER_EVIDENCE, "hidden", "previous", "text_mass"):
            value = getattr(self, name)
            rows[name] = None if value is None else value[keep]
        rows["features"] = self.features[keep] if selection.features is None else selection.features
        rows["relevance"] = None if self.relevance is None else self.relevance[:, keep]
        return dataclasses.replace(self, **rows)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a method answers: the tokens that stay.

    Args:
        keep: Sorted, unique, in range(n).
        stay: For adaptive methods: which of ``keep`` really stay (so that shapes never depend on data).
        scores: float32, higher means keep; for pictures and reports.
        features: Set when tokens were merged into the kept ones.
        merged_into: Slot in ``keep`` of each token, -1 = gone; for pictures.
        measures: Named scalars that the report shows.
        repeats: Indices may repeat: the same row is read twice (only to reproduce a released code's defect).
    """

    keep: Int[Tensor, " k"]
    stay: Bool[Tensor, " k"] | None = None
    scores: Float[Tensor, " n"] | None = None
    features: Float[Tensor, "k d"] | None = None
    merged_into: Int[Tensor, " n"] | None = None
    measures: Mapping[str, Tensor] = field(default_factory=dict)
    repeats: bool = False


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A frozen set of hyper-parameters that selects visual tokens.

    Class attributes:
        name: The word in specs.
        needs: Evidence the engine must capture (see `DECLARABLE`).
        scope: ``image``: one call per image; ``prompt``: one call for all visual tokens of a prompt together.
        adaptive: The number of tokens that stay depends on the input (`Selection.stay`).
        paper_positions: What the rotary embedding sees in the method's paper.
        saliency_layer: Where ``encoder_saliency`` is read: the ``feature`` layer or the ``last`` one.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    scope: ClassVar[Literal["image", "prompt"]] = "image"
    adaptive: ClassVar[bool] = False
    paper_positions: ClassVar[Literal["original", "packed"]] = "original"

    positions: Positions = "paper"

    def __post_init__(self) -> None:
        if self.positions not in ("paper", "original", "packed"):
            raise BudgetError(f"positions must be paper, original or packed, got {self.positions!r}")

    @property
    def saliency_layer(self) -> Literal["feature", "last"]:
        return "feature"

    @cached_property
    def parts(self) -> tuple[Method, ...]:
        """The single-site-kind methods this one is made of."""
        return (self,)

    @abstractmethod
    def sites(self, n_layers: int) -> tuple[int, ...]:
        """Return the decoder layers before which tokens leave; 0 = before the LLM."""

    @abstractmethod
    def select(self, evidence: Evidence, site: int) -> Selection:
        """Choose the tokens of one image that stay from layer ``site`` on."""

    def expected(self, alive: int, total: int, site: int, n_layers: int) -> int | None:
        """Return how many of ``alive`` tokens stay at ``site``; None when it depends on the input."""
        return None

    def encoder_layers(self, n_layers: int) -> range:
        """Return the encoder transitions the fold reads: l means from ``hidden_states[l - 1]`` to ``[l]``."""
        return range(0)

    def fold(
        self, carry: Float[Tensor, " n"] | None, before: Float[Tensor, "n v"], after: Float[Tensor, "n v"]
    ) -> Float[Tensor, " n"]:
        """Take one encoder transition into the carry (None at the first). Pure; one image (one crop)."""
        raise MissingEvidence(f"`{self.name}` declares encoder_fold but defines no fold")


@dataclass(frozen=True, kw_only=True)
class PromptMethod(Method):
    """A method that selects once, before the LLM, a number of tokens that never depends on data.

    Args:
        keep: int = tokens per image, float = fraction in (0, 1].
        per: What a budget is for in a video: the whole ``video``, or each ``frame``, which is then judged alone like
            an image. Images are not concerned.
    """

    paper_positions: ClassVar[Literal["original", "packed"]] = "packed"

    keep: Keep
    per: Literal["video", "frame"] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        budget.check_keep(self.keep)
        if self.per not in ("video", "frame"):
            raise BudgetError(f"per must be video or frame, got {self.per!r}", "frame judges each frame alone")

    def sites(self, n_layers: int) -> tuple[int, ...]:
        return (0,)

    def count(self, n: int) -> int:
        """Return how many of ``n`` tokens stay."""
        return budget.resolve_keep(self.keep, n)

    def expected(self, alive: int, total: int, site: int, n_layers: int) -> int | None:
        return self.count(alive)


@dataclass(frozen=True, kw_only=True)
class Composite(Method):
    """A method made of parts, each acting at its own sites."""

    name: ClassVar[str] = "chain"

    @cached_property
    @abstractmethod
    def parts(self) -> tuple[Method, ...]:
        """The parts, flat, in the order in which they act."""

    def sites(self, n_layers: int) -> tuple[int, ...]:
        return tuple(sorted({site for part in self.parts for site in part.sites(n_layers)}))

    def expected(self, alive: int, total: int, site: int, n_layers: int) -> int | None:
        count: int | None = alive
        for part in self.parts:
            if count is not None and site in part.sites(n_layers):
                count = part.expected(count, total, site, n_layers)
        return count

    def select(self, evidence: Evidence, site: int) -> Selection:
        chosen: Selection | None = None
        for part in self.parts:
            if site in part.sites(evidence.depth):
                if chosen is None:
                    chosen = part.select(evidence, site)
                else:
                    evidence = evidence.subset(chosen)
                    chosen = compose(chosen, part.select(evidence, site))
        if chosen is None:
            raise ContractError(f"no part of `{self.name}` acts at site {site}")
        return chosen


@dataclass(frozen=True, init=False)
class Chain(Composite):
    """Several methods, each at its own sites: ``Chain(EvoCut(keep=128), V2Drop(keep=32))``.

    Args:
        methods: Two or more methods; those that act before the LLM run in the order given.
    """

    methods: tuple[Method, ...]

    def __init__(self, *methods: Method) -> None:
        if len(methods) < 2:
            raise BudgetError(f"a chain needs at least two methods, got {len(methods)}")
        object.__setattr__(self, "methods", methods)
        object.__setattr__(self, "positions", "paper")

    @cached_property
    def parts(self) -> tuple[Method, ...]:
        return tuple(part for method in self.methods for part in method.parts)


def compose(first: Selection, second: Selection) -> Selection:
    """Return the selection that applies ``second`` to what ``first`` kept."""
    merged = first.merged_into
    if merged is not None:
        places = torch.arange(len(second.keep), device=second.keep.device)
        slot = torch.full_like(first.keep, -1).scatter(0, second.keep, places)
        merged = torch.where(merged < 0, merged, slot[merged.clamp(min=0)])
    features = second.features
    if features is None and first.features is not None:
        features = first.features[second.keep]
    scores = first.scores
    if second.scores is not None and scores is not None:
        scores = torch.full_like(scores, float("-inf")).scatter(0, first.keep, second.scores)
    return Selection(
        keep=first.keep[second.keep],
        stay=second.stay,
        scores=scores,
        features=features,
        merged_into=merged,
        measures={**first.measures, **second.measures},
        repeats=first.repeats or second.repeats,
    )
