"""The peer's side: OpenVINO GenAI, in its own environment. Started by `measure`."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

import openvino
import openvino_genai

from benchmarks.openvino_peer.work import PROMPT, Line, picture, serve, timed


def main(folder: str, dtype: str, threads: str, weight: str) -> None:
    """Load the exported model and answer requests ``{"picture": number, "prune": percent}``."""
    precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    pipeline = openvino_genai.VLMPipeline(
        folder,
        "CPU",
        INFERENCE_NUM_THREADS=int(threads),
        INFERENCE_PRECISION_HINT=precision,
        KV_CACHE_PRECISION=precision,  # by default the cache is stored smaller
    )

    def answer(request: Line) -> Line:
        config = pipeline.get_generation_config()
        config.max_new_tokens, config.ignore_eos, config.do_sample, config.logprobs = 1, True, False, 1
        config.pruning_ratio, config.relevance_weight = request["prune"], float(weight)
        image = openvino.Tensor(picture(request["picture"])[None])
        reply: Line = {}
        with timed(reply):
            output = pipeline.generate(PROMPT, images=[image], generation_config=config)
        times = output.perf_metrics
        return reply | {
            "tokens": times.get_num_input_tokens(),
            "before_llm": times.get_prepare_embeddings_duration().mean,
            "llm": times.get_inference_duration().mean,
            "word": output.texts[0],
            "logprob": output.scores[0],
        }

    split = os.environ.get("CDPRUNER_SPLIT_THRESHOLD", "default")
    versions = {name: version(name) for name in ("openvino", "openvino-genai", "optimum-intel")}
    serve({"pid": os.getpid(), "versions": versions, "split": split, "weight": weight}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
