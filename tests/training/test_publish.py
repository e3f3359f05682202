"""Pushing the result of a run, against a server on this machine that answers as Hugging Face."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from training_data import config

from diffusers_qwenimage.training.publish import check_login
from diffusers_qwenimage.training.trainer import train


class Uploads(BaseHTTPRequestHandler):
    """The requests that huggingface_hub 2.4 makes to upload small files."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/api/whoami-v2" and self.server.knows_the_user:
            self.answer({"type": "user", "name": "somebody", "orgs": []})
        else:
            self.answer({"error": "Invalid credentials in Authorization header"}, status=401)

    def do_POST(self):
        self.server.asked.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.endpoint}/somebody/result", "id": "somebody/result"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
                    ]
                }
            )
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.endpoint}/somebody/result/commit/{'1' * 40}"
            self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": url})
        else:
            self.answer({"errors": [], "warnings": []})

    def answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    found = ThreadingHTTPServer(("127.0.0.1", 0), Uploads)
    found.endpoint = f"http://127.0.0.1:{found.server_port}"
    found.asked, found.created, found.files, found.knows_the_user = [], [], {}, True
    threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
    for name in ("ENDPOINT", "_HF_DEFAULT_ENDPOINT"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", found.endpoint, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", found.endpoint, raising=False)
    yield found
    found.shutdown()
    found.server_close()


def test_pushes_weights_card_and_pictures(workplace, server):
    last = train(
        config(
            max_steps=2,
            push_to_hub="somebody/result",
            hub_private=True,
            validation_prompts=("a dot",),
            validation_size=32,
            validation_inference_steps=2,
        )
    )
    assert server.asked.index("/api/whoami-v2") < server.asked.index("/api/repos/create")
    assert server.created[0]["name"] == "result" and server.created[0]["organization"] == "somebody"
    assert server.created[0].get("private") is True or server.created[0].get("visibility") == "private"
    names = {last.name, "README.md", "loss.png", "samples/step-0.png", "samples/step-2.png"}
    assert set(server.files) == names
    assert server.files[last.name] == last.read_bytes()
    assert server.files["README.md"] == (Path("out") / "README.md").read_bytes()


def test_refuses_before_training_if_nobody_is_logged_in(workplace, server):
    server.knows_the_user = False
    with pytest.raises(ValueError, match=r"huggingface does not accept this user.*hf auth login"):
        train(config(max_steps=1, push_to_hub="somebody/result"))
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["result", "a/b/c", "some body/result", ""])
def test_refuses_a_name_that_is_none(name):
    with pytest.raises(ValueError, match="must be ORG/NAME"):
        check_login(name, "huggingface")
