"""The side of vLLM that runs models: what is left of each picture behind the encoder.

`__getattr__` makes a class when vLLM asks for it by name, so that nothing of vllm is imported before.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.core import Evidence
from foveate.engines.prompt import select_in_turn
from foveate.engines.state import Attachment, Seen
from foveate.engines.vllm import PREFIX, UPSTREAM
from foveate.engines.vllm import places as grid
from foveate.engines.vllm.asked import Asked, take
from foveate.engines.vllm.processor import Context, Info, Processor
from foveate.engines.vllm.tower import TowerCapture, share
from foveate.engines.vllm.view import TOLD, View
from foveate.errors import UnsupportedModel
from foveate.families import Picture

_Upstream: Any = Any if TYPE_CHECKING else object

#: Transformers 5 leaves out a level of the tower's names that vLLM wants.
_TOWER = re.compile(r"(.*\bvision_tower)\.(?:vision_model\.)?(.*)")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.*)")


class Shortened(_Upstream):
    """Mixed into a model of vLLM: it answers with the tokens that stay of each picture."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if vllm_config.compilation_config.compile_mm_encoder:
            raise UnsupportedModel(
                "a compiled vision encoder shows nothing of its layers", "serve without compile_mm_encoder"
            )
        self.view = View(vllm_config.model_config.hf_config)

    @property
    def tower_layers(self) -> Sequence[nn.Module]:
        """All layers of the vision encoder, also those whose output the LLM does not read."""
        raise NotImplementedError

    def embed_multimodal(self, **kwargs: Any) -> Any:
        asked = take(kwargs)
        if not asked:
            return super().embed_multimodal(**kwargs)
        methods = {spec: self.view.accept(spec) for spec in dict.fromkeys(each.method for each in asked)}
        parts = [(spec, part) for spec, method in methods.items() for part in method.parts]
        told, attachment = {name: kwargs[name] for name in TOLD if name in kwargs}, Attachment()
        try:
            capture = TowerCapture(self.view, self.tower_layers, [part for _, part in parts], attachment)
            with capture.recording("image", told) as record:
                rows = list(super().embed_multimodal(**kwargs))
        finally:
            attachment.remove()
        share(record)
        pictures = self.pictures(rows, kwargs)
        images = [self._see(*each) for each in zip(range(len(rows)), pictures, asked, strict=True)]
        for spec in methods:
            numbered = [(place, part) for place, (owner, part) in enumerate(parts) if owner == spec]
            mine = [seen for seen, each in zip(images, asked, strict=True) if each.method == spec]
            select_in_turn(numbered, mine, {"image": record})
        return tuple(_agreed(self.rows(seen)) for seen in images)

    def pictures(self, rows: Sequence[Tensor], fields: Mapping[str, Any]) -> list[Picture]:
        """What the family knows of the pictures of a call, given what the LLM would read of each."""
        return self.view.pictures(rows, {name: fields[name] for name in TOLD if name in fields})

    def rows(self, seen: Seen) -> Tensor:
        """What the LLM reads of a picture in the end."""
        return seen.picture.kept(seen.origin, seen.evidence.features)[0]

    def _see(self, number: int, picture: Picture, asked: Asked) -> Seen:
        features, order = picture.features, picture.crop_order
        evidence = Evidence(
            grid=picture.grid,
            coordinates=picture.coordinates,
            features=features,
            total=len(features),
            depth=self.view.depth,
            crops=picture.crops,
            crop_order=None if order is None else order.to(features.device),
            thumbnail=picture.thumbnail,
            text=self._text(asked, features.device),
            seed=torch.tensor(asked.seed, device=features.device),
        )
        origin = torch.arange(len(features), device=features.device)
        return Seen(0, "image", number, len(features), picture, evidence, origin)

    def _text(self, asked: Asked, device: torch.device) -> Tensor:
        """The LLM's embeddings of the text; all ranks look up together."""
        ids = torch.tensor(asked.text, dtype=torch.long, device=device)
        found: Tensor = self.get_language_model().embed_input_ids(ids)
        return found


def _agreed(rows: Tensor) -> Tensor:
    """The rows of the first rank of a tensor-parallel group: a tie may break otherwise on another one."""
    from vllm.distributed import get_tp_group

    agreed: Tensor = get_tp_group().broadcast(rows.contiguous(), src=0)
    return agreed


class LlavaLike(Shortened):
    """LLaVA, LLaVA-NeXT and LLaVA-OneVision: vLLM builds no encoder layer behind the one that the LLM reads.

    Methods may look at those behind, so they are built here; they run when a method listens to them.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        encoder: Any = self.vision_tower.vision_model.encoder
        config, layers = self.config.vision_config, encoder.layers
        encoder.behind = nn.ModuleList(
            type(layers[0])(
                config,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.vision_tower.vision_model.encoder.layers.{i}".lstrip("."),
                attn_cls=type(layers[0].self_attn.attn),
            )
            for i in range(len(layers), config.num_hidden_layers)
        )
        encoder.register_forward_hook(_run_behind)

    @property
    def tower_layers(self) -> Sequence[nn.Module]:
        encoder: Any = self.vision_tower.vision_model.encoder
        return [*encoder.layers, *encoder.behind]

    def pictures(self, rows: Sequence[Tensor], fields: Mapping[str, Any]) -> list[Picture]:
        """One by one: pictures of a request are filled up with empty tiles, which the encoder reads as well."""
        config, made, start = self.config.vision_config, [], 0
        for i, pixels in enumerate(fields["pixel_values"]):
            told = {name: fields[name][i : i + 1] for name in TOLD if name in fields}
            (picture,) = self.view.pictures(rows[i : i + 1], told)
            assert picture.patches is not None
            made.append(dataclasses.replace(picture, patches=picture.patches + start))
            tiles = len(pixels) if pixels.dim() == 4 else 1
            start += tiles * (config.image_size // config.patch_size) ** 2
        return made

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        return super().load_weights(self._renamed(weights))

    def _renamed(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        read = len(self.vision_tower.vision_model.encoder.layers)
        for name, weight in weights:
            if tower := _TOWER.fullmatch(name):
                within = tower[2]
                if (layer := _LAYER.fullmatch(within)) and int(layer[1]) >= read:
                    within = f"encoder.behind.{int(layer[1]) - read}.{layer[2]}"
                name = f"{tower[1]}.vision_model.{within}"
            yield name, weight


def _run_behind(encoder: Any, args: Any, output: Any) -> None:
    """Run the layers behind the one that the LLM reads, if somebody listens to them."""
    if not any("forward" in vars(module) or module._forward_pre_hooks for module in encoder.behind.modules()):
        return
    states = output[-1] if isinstance(output, list | tuple) else output
    for layer in encoder.behind:
        states = layer(states)
        states = states[0] if isinstance(states, tuple) else states


class QwenLike(Shortened):
    """Qwen2.5-VL: tokens that stay keep their places in the grid, and bring them along behind their features."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        # By this vLLM tells whether features bring positions along; there are no videos to which it applies.
        vllm_config.model_config.multimodal_config.video_pruning_rate = 1e-9
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    @property
    def tower_layers(self) -> Sequence[nn.Module]:
        layers: Sequence[nn.Module] = self.visual.blocks
        return layers

    def _postprocess_image_embeds_evs(self, embeds: Any, image_input: Any) -> Any:
        return embeds

    def rows(self, seen: Seen) -> Tensor:
        return grid.with_places(super().rows(seen), seen.evidence.coordinates)

    def get_mrope_input_positions(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        lengths = [feature.mm_position.length for feature in sorted(mm_features, key=lambda f: f.mm_position.offset)]
        grids = [(offset, (t, h, w)) for offset, t, h, w, _ in self.iter_mm_grid_thw(mm_features)]
        pictures = [(offset, kept, size) for (offset, size), kept in zip(grids, lengths, strict=True)]
        positions, after = grid.count(len(input_tokens), pictures)
        return positions, after - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        pairs = [grid.split_places(rows) for rows in multimodal_embeddings]
        after = int(mrope_positions[:, -1].max()) + 1 - mrope_positions.shape[1]
        if pairs:
            device = mrope_positions.device
            visual = torch.as_tensor(input_ids, device=device) == self.view.token
            found = torch.cat([places for _, places in pairs]).to(device)
            mrope_positions = grid.move(mrope_positions, visual, found, num_computed_tokens)
        return [rows for rows, _ in pairs], mrope_positions, after


@cache
def shortened(name: str) -> Any:
    """Make the class of an architecture: a model of vLLM, with a processor to match.

    Raises:
        UnsupportedModel: If vLLM keeps a model's processor elsewhere than it did.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import InputProcessingContext

    upstream: Any = getattr(importlib.import_module(f"vllm.model_executor.models.{UPSTREAM[name]}"), name)
    made = getattr(upstream, "_processor_factory", None)
    if made is None:
        raise UnsupportedModel(f"{name} of this vLLM has no processor that is known", "pip install vllm==0.32.0")

    def info(context: Any) -> Any:
        hiding = _mixed(Context, InputProcessingContext)(context.model_config, context.tokenizer)
        return _mixed(Info, type(made.info(context)))(hiding)

    def processor(info: Any, dummy_inputs: Any) -> Any:
        return _mixed(Processor, type(made.processor(info, dummy_inputs)))(info, dummy_inputs)

    kind = type(PREFIX + name, (QwenLike if hasattr(upstream, "iter_mm_grid_thw") else LlavaLike, upstream), {})
    kind.__module__ = __name__
    return MULTIMODAL_REGISTRY.register_processor(processor, info=info, dummy_inputs=made.dummy_inputs)(kind)


def _mixed(mixin: Any, upstream: Any) -> Any:
    return type(PREFIX + upstream.__name__, (mixin, upstream), {})


def __getattr__(name: str) -> Any:
    if name.removeprefix(PREFIX) in UPSTREAM and name.startswith(PREFIX):
        return shortened(name.removeprefix(PREFIX))
    raise AttributeError(f"module {__name__} has no attribute {name!r}")
