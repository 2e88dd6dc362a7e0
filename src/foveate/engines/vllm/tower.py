"""What the vision encoder of a vLLM model shows while it runs: its layers have other shapes, its attention is fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core import Method
from foveate.engines.capture import EncoderCapture, Listener, Record
from foveate.engines.state import Attachment
from foveate.engines.vllm.view import View


class TowerFamily:
    """A family as `EncoderCapture` asks it; only the layers are vLLM's."""

    modalities = ("image",)

    def __init__(self, view: View, layers: Sequence[nn.Module]) -> None:
        self._family, self._layers = view.family, layers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def encoder_layers(self, model: Any, modality: str) -> Sequence[nn.Module]:
        return self._layers


class TowerCapture(EncoderCapture):
    """Listens to vLLM's vision encoder for the methods of one call."""

    def __init__(
        self, view: View, layers: Sequence[nn.Module], methods: Sequence[Method], attachment: Attachment
    ) -> None:
        family: Any = TowerFamily(view, layers)
        super().__init__(view.model, family, methods, attachment)

    def _watch(self, layer: nn.Module, hook: Callable[..., None], attachment: Attachment) -> None:
        forward = layer.forward

        def watched(states: Tensor, *args: Any, **kwargs: Any) -> Any:
            before = states.clone()  # fused norms write into it
            output = forward(states, *args, **kwargs)
            hook(layer, (_flat(before),), {}, _flat(output[0] if isinstance(output, tuple) else output))
            return output

        attachment.wrap(layer, "forward", watched)  # hooks are passed over where a layer could be compiled

    def _tap(self, module: nn.Module, listen: Listener, attachment: Attachment) -> None:
        kernel: Any = module.attn

        def hook(kernel: Any, args: Any, kwargs: Any) -> None:
            given = dict(zip(("query", "key"), args, strict=False)) | kwargs
            sizes = _sizes(given.get("cu_seqlens"), given.get("sequence_lengths"))
            heads = [_by_head(given[name], kernel.head_size) for name in ("query", "key")]
            pieces = [[states] if sizes is None else list(states.split(sizes, dim=2)) for states in heads]
            for query, key in zip(*pieces, strict=True):
                listen(module, query, key, None, kernel.scale)

        attachment.add(kernel.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _flat(states: Tensor) -> Tensor:
    """Packed states come as [patches, 1, d]."""
    return states[:, 0] if states.dim() == 3 and states.shape[1] == 1 else states


def _by_head(states: Tensor, size: int) -> Tensor:
    """Queries or keys as [forwards, heads, rows, size]."""
    return (states if states.dim() == 4 else states.unflatten(-1, (-1, size))).transpose(1, 2)


def _sizes(borders: Tensor | None, lengths: Tensor | None) -> list[int] | None:
    """Sizes of the sequences that are packed into one; some kernels take borders in units of their own, and lengths."""
    if borders is None:
        return None
    sizes: list[int] = (borders.diff() if lengths is None else lengths).tolist()
    return [size for size in sizes if size]


def share(record: Record) -> None:
    """Bring together what ranks of a tensor-parallel group saw: each has as many heads of its own."""
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

    ranks = get_tensor_model_parallel_world_size()
    if ranks == 1:
        return
    for pieces in [record.keys, *record.saliency.values()]:
        if pieces:
            pieces[:] = [tensor_model_parallel_all_reduce(torch.cat(pieces)) / ranks]
