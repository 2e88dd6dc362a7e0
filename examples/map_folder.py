"""Ask one question about every picture of a folder, or of a parquet file's column `image`, in as many processes as fit.

python examples/map_folder.py PICTURES OUT.jsonl "what word is written?"    # once more, and a killed run goes on
"""

import json
import sys
from pathlib import Path

import ray

from foveate.lab.pictures import Pictures
from foveate.lab.reader import Prompt, Reader

PICTURES, OUT, QUESTION = Pictures(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]


class Answers:
    """Ray makes one in each process, and a new one where a process dies."""

    def __init__(self) -> None:
        self.reader = Reader("demo", "evocut:keep=64")  # or a folder with a model, or a name on the hub

    def __call__(self, batch: dict) -> dict:
        prompts = [Prompt.about([PICTURES.open(name)], QUESTION) for name in batch["picture"]]
        return batch | {"answer": [answer.text for answer in self.reader.answer(prompts, max_new_tokens=16)]}


with OUT.open("ab") as out:
    out.truncate(OUT.read_bytes().rfind(b"\n") + 1)  # a kill may have torn the last line
done = {line["picture"] for line in map(json.loads, OUT.open()) if line["question"] == QUESTION}
left = [{"picture": name, "question": QUESTION} for name in PICTURES.names if name not in done]
ray.init(include_dashboard=False)
pool = ray.data.ActorPoolStrategy(
    size=int(ray.cluster_resources()["CPU"])
)  # on GPUs: their number, and num_gpus=1 below
asked = ray.data.from_items(left, override_num_blocks=max(1, len(left) // 4)).map_batches(Answers, compute=pool)
with OUT.open("a") as out:
    for line in asked.iter_rows():
        print(json.dumps(line), file=out, flush=True)
