"""The code that pages show: blocks of Python, page by page, and what has to be there for them to run.

python -m tests.docs.snippets     # lists every block, and why those that are not run are not
"""

from __future__ import annotations

import contextlib
import copy
import doctest
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import transformers
from PIL import Image

import foveate
from foveate import demo, families

ROOT = Path(__file__).parents[2]

#: Pages whose code is run by tests of their own, and one that speaks to a server which no test has.
ELSEWHERE = {
    "README.md": "run in tests/cli/test_documents.py",
    "docs/add-a-method.md": "run in tests/methods/test_add_a_method.py",
    "docs/ledger.md": "run in tests/docs/test_ledger.py",
    "docs/methods.md": "made from doctests, which are run where they are written",
    "docs/vllm.md": "needs a server of vLLM",
}
#: What a page leaves to its reader before a block: page and number of the block.
BEFORE = {
    ("docs/guide.md", 1): "model.generate(**inputs, max_new_tokens=2)",
    ("docs/guide.md", 3): "handle.remove()",
}
SERVER = "127.0.0.1:8000"
_BLOCK = re.compile(r"(?:<!-- not run: (?P<why>.*?) -->\n+)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of Python on a page.

    Args:
        page: Path of the page in the repository.
        line: Where its code begins.
        code: What it says.
        why: Why it is not run, as the comment above it says: ``<!-- not run: needs a GPU -->``; None where it is run.
    """

    page: str
    line: int
    code: str
    why: str | None = None


def pages() -> list[str]:
    """Return every page of the documentation."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start("code")), match["code"], ELSEWHERE.get(page, match["why"]))
        for match in _BLOCK.finditer(text)
    ]


def run(page: str, model: Any, processor: Any, address: str = SERVER) -> int:
    """Run the blocks of a page one after another, in one namespace; return how many.

    Args:
        page: Path of the page.
        model: The demo model, or whatever a page loads; the page gets a copy.
        processor: Its processor.
        address: Where a server listens that the page takes for its own.
    """
    model = copy.deepcopy(model)
    module = sys.modules["page"] = ModuleType("page")  # dataclasses look up the module that they are in
    vars(module).update(given(model, processor))
    done = 0
    with (
        hub_of_one(model, processor),
        mock.patch.object(families, "FAMILIES", families.FAMILIES),
    ):
        for number, block in enumerate(blocks(page)):
            if block.why is not None:
                continue
            exec(BEFORE.get((page, number), ""), vars(module))
            if block.code.startswith(">>>"):
                test = doctest.DocTestParser().get_doctest(block.code, vars(module), block.page, block.page, block.line)
                assert not doctest.DocTestRunner().run(test, clear_globs=False).failed, block
            else:
                code = "\n" * block.line + block.code.replace(SERVER, address)  # tracebacks name the line of the page
                exec(compile(code, str(ROOT / page), "exec", dont_inherit=True), vars(module))
            done += 1
    return done


def given(model: Any, processor: Any) -> dict[str, Any]:
    """Return what every page may take for granted: a model, a picture, a question about it."""
    image, (question, _) = Image.open(demo.PICTURE), demo.QUESTIONS[0]
    inputs = processor(images=image, text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
    names = {"model": model, "processor": processor, "image": image, "question": question, "inputs": inputs}
    more = {"questions": [text for text, _ in demo.QUESTIONS], "grid": (1, 24, 24), "scores": [0.5] * 576}
    return {"foveate": foveate, **names, **more}


@contextlib.contextmanager
def hub_of_one(model: Any, processor: Any) -> Iterator[None]:
    """Let every name on the hub be the demo model, on the CPU."""

    with (
        mock.patch.object(transformers.AutoModelForImageTextToText, "from_pretrained", lambda name, **_: model),
        mock.patch.object(transformers.AutoProcessor, "from_pretrained", lambda name, **_: processor),
        mock.patch.object(demo, "load", lambda *_, **__: (model, processor)),
    ):
        yield


@contextlib.contextmanager
def serving(model: Any, processor: Any) -> Iterator[str]:
    """Run `foveate serve` in a thread; yields its address."""
    from foveate import registry
    from foveate.serve.app import create_app
    from foveate.serve.limits import Limits
    from foveate.serve.reader import Reader
    from foveate.serve.run import configured, listen

    place, limits = listen("127.0.0.1", 0), Limits()
    server = configured(
        create_app(Reader("demo", model, processor, registry.from_spec("adav:keep=64")), limits), limits
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    try:
        yield f"127.0.0.1:{place.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        place.close()


def main() -> None:
    """Print every block that is not run, and how many are."""
    every = [block for page in pages() for block in blocks(page)]
    for block in every:
        if block.why is not None and block.page not in ELSEWHERE:
            print(f"{block.page}:{block.line}: not run: {block.why}")
    for page, why in ELSEWHERE.items():
        print(f"{page}: {len(blocks(page))} blocks: {why}")
    print(f"{sum(block.why is None for block in every)} of {len(every)} blocks are run")


if __name__ == "__main__":
    main()
