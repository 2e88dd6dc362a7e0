"""A plugin for vLLM: pictures are shortened before the LLM, by the same methods as in the transformers engine.

``pip install "foveate[vllm]"`` makes vLLM find `register`; who serves chooses the class and the method:

vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides '{"architectures": ["FoveateLlavaForConditionalGeneration"]}'
    --mm-processor-kwargs '{"foveate": "evocut:keep=64"}'

Nothing here imports vllm before it is asked for a class of its own.
"""

from __future__ import annotations

from typing import Any

from foveate.errors import MissingDependency

#: Architectures of vLLM, with the module of each, that can be shortened.
UPSTREAM = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
}

#: What their names begin with here.
PREFIX = "Foveate"


def register() -> None:
    """Make the architectures known to vLLM, which calls this in each of its processes, maybe more than once.

    Raises:
        MissingDependency: If vLLM is not installed.
    """
    try:
        from vllm import ModelRegistry
    except ImportError as error:
        raise MissingDependency("vllm is not installed", 'pip install "foveate[vllm]"') from error
    known = ModelRegistry.get_supported_archs()
    for name in UPSTREAM:
        if PREFIX + name not in known:
            ModelRegistry.register_model(PREFIX + name, f"foveate.engines.vllm.models:{PREFIX}{name}")
    _let_cpu_move_positions()


def _let_cpu_move_positions() -> None:
    """Let the runner on CPUs ask for positions of shortened pictures, as that on GPUs does when it loads a model."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original: Any = CPUModelRunner.load_model
    if hasattr(original, "foveate"):
        return

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config, model = self.model_config.multimodal_config, self.get_model()
        if config is not None and getattr(model, "supports_multimodal_pruning", False):
            self.is_multimodal_pruning_enabled = config.is_multimodal_pruning_enabled()

    load_model.foveate = True  # type: ignore[attr-defined]
    CPUModelRunner.load_model = load_model
