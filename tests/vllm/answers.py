"""Answers of a vLLM engine in a process of its own: ``python -m tests.vllm.answers job.json answers.json``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
ROOT = Path(__file__).parents[2]
NEW = 4  # tokens of an answer

Request = dict[str, Any]
Answer = dict[str, Any]


def request(prompt: str, pictures: list[list[int]], method: str | None = None, **kwargs: Any) -> Request:
    """A request with pictures, each a seed, a width and a height."""
    return {"prompt": prompt, "pictures": pictures, "kwargs": kwargs | ({} if method is None else {"foveate": method})}


def answers(
    folder: Path, architecture: str, rounds: list[list[Request]], tmp: Path, **engine: Any
) -> list[list[Answer]]:
    """Start an engine, let it answer rounds of requests, and stop it. The requests of a round are batched."""
    job, out = tmp / "job.json", tmp / "answers.json"
    engine = {"hf_overrides": {"architectures": [architecture]}, "model": str(folder), **engine}
    job.write_text(json.dumps({"engine": engine, "rounds": rounds}))
    command = [sys.executable, "-m", "tests.vllm.answers", str(job), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    made: list[list[Answer]] = json.loads(out.read_text())
    return made


def main() -> None:
    """Run a job."""
    from vllm import LLM, SamplingParams

    from tests.vllm.tiny import picture

    job = json.loads(Path(sys.argv[1]).read_text())
    engine = LLM(
        enforce_eager=True,
        seed=0,
        **{"dtype": "float32", "max_model_len": 1024, "limit_mm_per_prompt": {"image": 2}} | job["engine"],
    )
    sampling = SamplingParams(max_tokens=NEW, temperature=0, logprobs=8, ignore_eos=True)

    def asked(one: Request) -> dict[str, Any]:
        pictures = [picture(*each) for each in one["pictures"]]
        return {"prompt": one["prompt"], "multi_modal_data": {"image": pictures}, "mm_processor_kwargs": one["kwargs"]}

    def answer(output: Any) -> Answer:
        chosen = output.outputs[0]
        steps = [{str(token): found.logprob for token, found in step.items()} for step in chosen.logprobs]
        length, cached = len(output.prompt_token_ids), output.num_cached_tokens
        return {"length": length, "cached": cached, "tokens": list(chosen.token_ids), "logprobs": steps}

    steps, original = [0], engine.llm_engine.step

    def step() -> Any:
        steps[0] += 1
        return original()

    engine.llm_engine.step = step
    made = []
    for together in job["rounds"]:
        steps[0] = 0
        try:
            outputs = engine.generate([asked(one) for one in together], sampling, use_tqdm=False)
            made.append([answer(output) | {"steps": steps[0]} for output in outputs])
        except Exception as error:
            made.append([{"error": f"{type(error).__name__}: {error}"}])
    Path(sys.argv[2]).write_text(json.dumps(made))


if __name__ == "__main__":
    main()
