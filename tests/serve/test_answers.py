"""What OpenAI's own client gets from the demo model is what the model says offline."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

import foveate
from foveate import demo, registry
from foveate.serve.limits import Limits
from foveate.serve.reader import Reader
from tests.serve.conftest import messages, picture_url, serving

openai = pytest.importorskip("openai")

GREY = Image.new("RGB", (400, 300), (120, 130, 140))


@pytest.fixture(scope="module")
def port(model: tuple[Any, Any]) -> Iterator[int]:
    with serving(Reader("demo", *model, registry.from_spec("adav:keep=64")), Limits(private_urls=True)) as port:
        yield port


@pytest.fixture(scope="module")
def client(port: int) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client


def offline(model: tuple[Any, Any], method: str, text: str, *pictures: Image.Image) -> str:
    """The library's answer, without the server's code."""
    network, processor = model
    prompt = "<image>\n" * len(pictures) + text
    inputs = processor(images=list(pictures) or None, text=f"USER: {prompt} ASSISTANT:", return_tensors="pt")
    with foveate.compress(network, method):
        output = network.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer: str = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()


@pytest.mark.parametrize(("question", "truth"), demo.QUESTIONS)
def test_the_demo_questions(client: Any, question: str, truth: str) -> None:
    asked = {"model": "demo", "messages": messages(question, picture_url())}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == truth
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.foveate["visual_tokens_before"] == 576
    assert whole.usage.foveate["visual_tokens_after"] == 64
    assert whole.usage.foveate["prompt_tokens_before"] - whole.usage.prompt_tokens == 512
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == truth
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize(
    ("wish", "method"),
    [
        ({"keep": 16}, "adav:keep=16"),
        ({"keep": 0.25}, "adav:keep=0.25"),
        ({"method": "evocut:keep=64"}, "evocut:keep=64"),
        ({"method": "v2drop:keep=128"}, "v2drop:keep=128"),
        ({"method": "evocut:keep=96 + v2drop:keep=60"}, "evocut:keep=96 + v2drop:keep=60"),
        ({"keep": 1.0}, "adav:keep=1.0"),
    ],
)
def test_a_budget_of_ones_own(client: Any, model: tuple[Any, Any], wish: dict[str, Any], method: str) -> None:
    question = demo.QUESTIONS[0][0]
    asked = {"model": "demo", "messages": messages(question, picture_url())}
    answer = client.chat.completions.create(**asked, extra_body={"foveate": wish})
    assert answer.usage.foveate["method"] == method
    with Image.open(demo.PICTURE) as picture:
        assert answer.choices[0].message.content == offline(model, method, question, picture.convert("RGB"))


def test_methods_differ(client: Any) -> None:
    """So that the test above can fail."""
    asked = {"model": "demo", "messages": messages(demo.QUESTIONS[0][0], picture_url())}
    answers = {
        client.chat.completions.create(**asked, extra_body={"foveate": {"method": method}}).choices[0].message.content
        for method in ("adav:keep=64", "evocut:keep=64")
    }
    assert len(answers) == 2


def test_two_pictures_and_none(client: Any, model: tuple[Any, Any]) -> None:
    with Image.open(demo.PICTURE) as picture:
        first = picture.convert("RGB")
    question = "is there a white heart?"
    both = client.chat.completions.create(
        model="demo", messages=messages(question, picture_url(), picture_url(GREY)), temperature=0
    )
    assert both.usage.foveate["visual_tokens_before"] == 2 * 576
    assert both.usage.foveate["visual_tokens_after"] == 2 * 64
    assert both.choices[0].message.content == offline(model, "adav:keep=64", question, first, GREY)
    none = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": question}])
    assert none.usage.foveate["visual_tokens_before"] == 0
    assert none.usage.foveate["prompt_tokens_before"] == none.usage.prompt_tokens
    assert none.choices[0].message.content == offline(model, "adav:keep=64", question)


def test_a_conversation_goes_on(client: Any) -> None:
    first = messages(demo.QUESTIONS[0][0], picture_url())
    said = client.chat.completions.create(model="demo", messages=first).choices[0].message
    answer = client.chat.completions.create(
        model="demo", messages=[*first, said, {"role": "user", "content": demo.QUESTIONS[1][0]}]
    )
    assert answer.usage.foveate["visual_tokens_after"] == 64
    assert answer.choices[0].message.content


def test_an_answer_ends_where_it_is_told_to(client: Any) -> None:
    asked = {"model": "demo", "messages": messages("what word is written?", picture_url()), "temperature": 0}
    cut = client.chat.completions.create(**asked, max_completion_tokens=1)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 1
    stopped = client.chat.completions.create(**asked, stop=["og"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("d", "stop")


def test_a_seed_draws_the_same_answer(client: Any) -> None:
    asked = {"model": "demo", "messages": [{"role": "user", "content": "hello"}], "temperature": 1.5, "max_tokens": 12}
    answers = [client.chat.completions.create(**asked, seed=seed).choices[0].message.content for seed in (3, 3, 4, 5)]
    assert answers[0] == answers[1]
    assert len(set(answers)) == 3
    cold = [
        client.chat.completions.create(**asked | {"temperature": t}).choices[0].message.content for t in (0, 1e-300)
    ]
    assert cold[0] == cold[1]
    assert (
        client.chat.completions.create(**asked | {"temperature": None}, top_p=0.0).choices[0].message.content == cold[0]
    )


def test_a_picture_from_the_web(client: Any) -> None:
    with files({"/a b.png": demo.PICTURE.read_bytes()}) as base:
        for url in (f"{base}/a b.png", f"{base}/moved"):
            answer = client.chat.completions.create(model="demo", messages=messages(demo.QUESTIONS[1][0], url))
            assert answer.choices[0].message.content == demo.QUESTIONS[1][1]


def test_models_health_and_metrics(client: Any, port: int) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="no such model: 'gpt-4'"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="this server has one"):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "hello"}])

    def read(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as response:
            assert response.status == 200
            text: str = response.read().decode()
            return text

    def count(name: str) -> float:
        return next(float(line.split()[-1]) for line in read("/metrics").splitlines() if line.startswith(name))

    assert read("/health") == '{"status":"ok"}'
    before = count('foveate_visual_tokens_total{when="after"}')
    client.chat.completions.create(model="demo", messages=messages("how many?", picture_url()))
    assert count('foveate_visual_tokens_total{when="after"}') - before == 64
    assert count('foveate_requests_total{status="200"}') > 0
    assert count('foveate_requests_total{status="404"}') == 1
    assert count("foveate_requests_inside") == 0


class files:
    """A web server on this machine that has some files, and one name that leads to another."""

    def __init__(self, content: dict[str, bytes]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.replace("%20", " ")
                if path == "/moved":
                    self.send_response(302)
                    self.send_header("Location", next(iter(content)).replace(" ", "%20"))
                    self.end_headers()
                    return
                self.send_response(200 if path in content else 404)
                self.end_headers()
                self.wfile.write(content.get(path, b""))

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self) -> str:
        self.thread.start()
        return f"http://localhost:{self.server.server_port}"

    def __exit__(self, *args: Any) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
