"""`foveate serve` as a process: it says where it listens, answers what it has when told to stop, and leaves with 0."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from foveate import demo
from foveate.serve.app import CHAT
from tests.cli.test_bad_input import refused
from tests.cli.test_commands import call
from tests.models import tiny_llava
from tests.serve.conftest import messages, picture_url

ROOT = Path(__file__).parents[2]


def start(*arguments: str) -> tuple[subprocess.Popen[str], int]:
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "foveate", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.readline()
    found = re.search(r"at http://127\.0\.0\.1:(\d+)/v1", said)
    assert found is not None, said + process.stderr.read()
    return process, int(found[1])


def test_a_server_that_is_told_to_stop_answers_first() -> None:
    process, port = start("--dtype", "bfloat16")
    answers = []

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps({"messages": messages(demo.QUESTIONS[1][0], picture_url()), "stream": True})
        connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        begun.set()
        answers.append((response.status, response.read().decode()))
        connection.close()

    begun = threading.Event()
    asking = threading.Thread(target=ask)
    asking.start()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")  # answered after the question has come in
    connection.getresponse().read()
    process.send_signal(signal.SIGTERM)
    asking.join()
    out, err = process.communicate(timeout=30)
    connection.close()
    assert process.returncode == 0, err
    assert (out, err) == ("", "")
    assert answers[0][0] == 200
    assert answers[0][1].endswith("data: [DONE]\n\n")
    assert '"content": "dog"' in answers[0][1]


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused(call("serve", "--port", port), error=f"cannot listen on 127.0.0.1 port {port}", hint="--port 0")
    refused(call("serve", "--host", "no.such.host.invalid"), error="cannot listen on", hint="--port 0")


def test_mistakes_before_anything_is_loaded() -> None:
    refused(call("serve", "--port", "0", "--method", "adav:keep=0"), error="keep must be at least 1", hint="keep=64")
    refused(call("serve", "--port", "0", "--model", "nobody/nothing"), error="cannot load", hint="a network")
    refused(call("serve", "--port", "0", "--dtype", "int3"), error="dtype", hint="")


def test_a_method_that_the_model_cannot_run() -> None:
    result = call("serve", "--port", "0", "--method", "v2drop:stages=30@0.5")
    refused(result, error="stages before layers 30 do not fit", hint="")


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    tiny_llava().save_pretrained(tmp_path)
    for file in demo.MODEL.iterdir():
        if file.name.startswith(("tokenizer", "processor")):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    refused(
        call("serve", "--port", "0", "--model", str(tmp_path)), error="no chat template", hint="chat_template.jinja"
    )


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("foveate.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    refused(call("serve"), error="serving needs fastapi", hint="pip install 'foveate[serve]'")
