"""The types everything speaks: what a method may look at, what it answers, and what a method is.

A method sees ONE image (or one video) and has no batch axis. Speed comes back in `selection.select_all`, which stacks
images of equal shape and calls the method under `torch.vmap`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate import budget
from foveate.budget import Keep, Stage
from foveate.errors import BudgetError, ContractError, MissingEvidence

Positions = Literal["paper", "original", "packed"]

#: Evidence that a method has to declare in ``needs``; the engine captures only what is declared.
ENCODER_EVIDENCE = frozenset({"encoder_fold", "encoder_keys", "encoder_saliency", "encoder_shallow"})
DECODER_EVIDENCE = frozenset({"hidden", "keys", "previous", "relevance", "text_hidden", "text_keys", "text_mass"})
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
        encoder_shallow: The same in an early layer, `Method.shallow_layer`.
        text: Input embeddings of the prompt text after the image.
        hidden: Input of decoder layer ``site``.
        previous: Input of the layer before.
        relevance: Attention of each prompt text token after the image to each visual token in layer ``site - 1`` (in
            the last one before it where that is recurrent), mean over heads; each row is what is left of a row that
            sums to 1 over the whole prompt.
        text_mass: Attention of each visual token to all prompt text after the image, in the same layer.
        keys: Keys of each visual token in that layer, all heads side by side, as attention compares them.
        text_keys: The same of the prompt text after the image.
        text_hidden: Input of decoder layer ``site`` of the prompt text after the image.
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
    encoder_shallow: Float[Tensor, " n"] | None = None
    text: Float[Tensor, "t d"] | None = None
    hidden: Float[Tensor, "n d"] | None = None
    previous: Float[Tensor, "n d"] | None = None
    relevance: Float[Tensor, "r n"] | None = None
    text_mass: Float[Tensor, " n"] | None = None
    keys: Float[Tensor, "n c"] | None = None
    text_keys: Float[Tensor, "w c"] | None = None
    text_hidden: Float[Tensor, "w d"] | None = None
    seed: Int[Tensor, ""] | None = None

    @property
    def n(self) -> int:
        """Tokens alive."""
        return self.features.shape[0]

    @property
    def filled_grid(self) -> tuple[int, int, int]:
        """The grid, or one row where the tokens do not fill it."""
        return self.grid if math.prod(self.grid) == self.n else (1, 1, self.n)

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

    def subset(self, selection: Selection, site: int = 0) -> Evidence:
        """Return the evidence of the tokens that a selection kept at ``site``."""
        keep = selection.keep
        rows: dict[str, Any] = {"crops": (), "crop_order": None, "thumbnail": None}
        for name in ("features", "coordinates", *ENCODER_EVIDENCE, "hidden", "previous", "text_mass", "keys"):
            value = getattr(self, name)
            rows[name] = None if value is None else value[keep]
        if selection.features is not None:
            rows["hidden" if site else "features"] = selection.features
        rows["relevance"] = None if self.relevance is None else self.relevance[:, keep]
        return dataclasses.replace(self, **rows)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a method answers: the tokens that stay.

    Args:
        keep: Sorted, unique, in range(n).
        stay: For adaptive methods: which of ``keep`` really stay (so that shapes never depend on data).
        scores: float32, higher means keep; for pictures and reports.
        features: Set when tokens were merged into the kept ones: what goes on in their places, in the LLM's embedding
            space at site 0 and among the inputs of layer ``site`` inside it.
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
        adaptive: The number of tokens that stay may depend on the input (`Selection.stay`).
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
            raise BudgetError(
                f"positions must be paper, original or packed, got {self.positions!r}",
                "leave it out: the paper's choice is the default",
            )

    @property
    def saliency_layer(self) -> Literal["feature", "last"]:
        return "feature"

    def shallow_layer(self, n_layers: int) -> int:
        """Return the encoder layer where ``encoder_shallow`` is read; 0 is the first."""
        return 0

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
        raise MissingEvidence(
            f"`{self.name}` declares encoder_fold but defines no fold", "define fold(), or take it out of `needs`"
        )


@dataclass(frozen=True, kw_only=True)
class PromptMethod(Method):
    """A method that selects once, before the LLM, as many tokens as its budget says (if adaptive, at most so many).

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
class LayerMethod(Method):
    """A method that lets tokens leave between decoder layers, by a schedule that never depends on data.

    Class attributes:
        shares: What the paper keeps of the alive at each of `layers`, where neither option says otherwise.

    Args:
        stages: (layer, what stays of the alive) pairs, rising layers >= 1; float = fraction, int = tokens, 0 = none.
        keep: Mean of tokens per decoder layer instead; int = tokens, float = fraction of the image's tokens.
    """

    shares: ClassVar[tuple[Keep, ...]]

    stages: tuple[Stage, ...] | None = None
    keep: Keep | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            budget.check_keep(self.keep)
        if self.stages is not None:
            budget.check_stages(self.stages)
            if self.keep is not None:
                raise BudgetError("keep and stages exclude each other", "keep=192 is a mean, stages are a schedule")

    @abstractmethod
    def layers(self, n_layers: int) -> tuple[int, ...]:
        """Return the layers before which tokens leave where ``stages`` names none."""

    def sites(self, n_layers: int) -> tuple[int, ...]:
        sites = tuple(layer for layer, _ in self.stages) if self.stages else self.layers(n_layers)
        if sites[-1] >= n_layers:
            raise BudgetError(
                f"stages before layers {', '.join(map(str, sites))} do not fit a model of {n_layers} layers",
                f"keep=64 alone places them by depth; by hand there are layers 1..{n_layers - 1}"
                if n_layers >= 4
                else "use a method that selects before the LLM",
            )
        return sites

    def schedule(self, total: int, n_layers: int) -> tuple[Stage, ...]:
        """Return the stages for ``total`` tokens of one image in ``n_layers`` layers."""
        sites = self.sites(n_layers)
        if self.keep is None:
            return self.stages or tuple(zip(sites, self.shares, strict=True))
        return budget.solve_decay(total, self.keep, n_layers, sites)

    def expected(self, alive: int, total: int, site: int, n_layers: int) -> int:
        return budget.stage_keep(dict(self.schedule(total, n_layers))[site], alive)


@dataclass(frozen=True, kw_only=True)
class EarlyMethod(LayerMethod):
    """A `LayerMethod` whose paper lets tokens leave once, early: before layer 2, or 1 in an LLM of under 24 layers.

    Args:
        layer: The layer before which tokens leave where ``stages`` names none, >= 1.
    """

    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None and (self.stages is not None or self.layer < 1):
            raise BudgetError(f"layer is >= 1 and goes without stages, got {self.layer}", "stages=3@0.5 names layer 3")

    def layers(self, n_layers: int) -> tuple[int, ...]:
        return (min(2, *budget.at_depths([1 / 16], n_layers)) if self.layer is None else self.layer,)


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
                    evidence = evidence.subset(chosen, site)
                    chosen = compose(chosen, part.select(evidence, site))
        if chosen is None:
            raise ContractError(
                f"no part of `{self.name}` acts at site {site}", "let sites() name exactly the sites of the parts"
            )
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
            raise BudgetError(
                f"a chain needs at least two methods, got {len(methods)}", "pass a single method as it is"
            )
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
