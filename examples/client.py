"""A client of `foveate serve`: one question at several budgets, what was read for it, and one answer as a stream.

foveate serve &
python examples/client.py                             # or: python examples/client.py http://HOST:PORT/v1 PICTURE
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from openai import OpenAI

from foveate import demo

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
PICTURE = Path(sys.argv[2]) if len(sys.argv) > 2 else demo.PICTURE
QUESTION = "what colour is the circle?"


def main() -> None:
    """Print an answer for each budget, then one word by word."""
    client = OpenAI(base_url=URL, api_key="none")
    url = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    asked = {"model": client.models.list().data[0].id, "messages": [{"role": "user", "content": content}]}
    for budget in ({"keep": 1.0}, {"keep": 0.25}, {"keep": 64}, {"method": "todre:keep=32,exit=none"}):
        answer = client.chat.completions.create(**asked, extra_body={"foveate": budget})
        read = answer.usage.model_extra["foveate"]
        counts = f"{read['visual_tokens_before']} -> {read['visual_tokens_after']} tokens"
        print(f"{read['method']}: {answer.choices[0].message.content} ({counts})")
    for event in client.chat.completions.create(**asked, stream=True):
        print(event.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
