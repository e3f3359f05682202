"""Pushing the result of a run, against servers on this machine that answer as Hugging Face and ModelScope."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from training_data import config

from diffusers_qwenimage.training.publish import check_login
from diffusers_qwenimage.training.trainer import train


class Answers(BaseHTTPRequestHandler):
    """Answers in JSON."""

    protocol_version = "HTTP/1.1"

    def answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self):
        self.server.asked.append(self.path)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def log_message(self, *_):
        pass


class Uploads(Answers):
    """The requests that huggingface_hub 2.4 makes to upload small files."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/api/whoami-v2" and self.server.knows_the_user:
            self.answer({"type": "user", "name": "somebody", "orgs": []})
        else:
            self.answer({"error": "Invalid credentials in Authorization header"}, status=401)

    def do_POST(self):
        body = self.body()
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


class ModelScopeUploads(Answers):
    """The requests that modelscope_hub 0.5 makes; large files go to where the answer to /batch says."""

    def do_GET(self):
        self.body()
        if self.path == "/openapi/v1/users/me" and self.server.knows_the_user:
            self.answer({"success": True, "data": {"username": "somebody"}})
        elif "/models/somebody/result" in self.path:
            self.answer({"Code": 10010205001, "Message": "not found", "Success": False}, status=404)
        else:
            self.answer({"Code": 401, "Message": "token", "Success": False}, status=401)

    def do_POST(self):
        body = json.loads(self.body())
        data = {}
        if self.path == "/api/v1/models":
            self.server.created.append(body)
        elif self.path.endswith("/objects/batch"):
            places = {
                entry["oid"]: f"{self.server.endpoint}/blob/{entry['oid']}" for entry in body["objects"]
            }
            data["objects"] = [
                {**entry, "actions": {"upload": {"href": places[entry["oid"]]}}} for entry in body["objects"]
            ]
        elif "/commit/" in self.path:
            for entry in body["actions"]:
                content = base64.b64decode(entry["content"]) if entry["type"] == "normal" else None
                self.server.files[entry["path"]] = content or self.server.blobs[entry["sha256"]]
        self.answer({"Code": 200, "Success": True, "Data": data})

    def do_PUT(self):
        self.server.blobs[self.path.rpartition("/")[2]] = self.body()
        self.answer({"Code": 200, "Success": True})


@contextmanager
def running(handler):
    found = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    found.endpoint = f"http://127.0.0.1:{found.server_port}"
    found.asked, found.created, found.files, found.blobs, found.knows_the_user = [], [], {}, {}, True
    threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def modelscope(monkeypatch, tmp_path):
    with running(ModelScopeUploads) as found:
        for name, value in (
            ("ENDPOINT", found.endpoint),
            ("API_TOKEN", "ms-of-a-test"),
            ("HOME", str(tmp_path)),
        ):
            monkeypatch.setenv(f"MODELSCOPE_{name}", value)
        yield found


@pytest.fixture
def server(monkeypatch):
    with running(Uploads) as found:
        pretend_to_be_hugging_face(found, monkeypatch)
        yield found


def pretend_to_be_hugging_face(found, monkeypatch):
    for name in ("ENDPOINT", "_HF_DEFAULT_ENDPOINT"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", found.endpoint, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", found.endpoint, raising=False)


def train_and_push(**changes):
    settings = {
        "max_steps": 2,
        "push_to_hub": "somebody/result",
        "hub_private": True,
        "validation_prompts": ("a dot",),
        "validation_size": 32,
        "validation_inference_steps": 2,
    }
    return train(config(**settings, **changes))


def test_pushes_weights_card_and_pictures(workplace, server):
    last = train_and_push()
    assert server.asked.index("/api/whoami-v2") < server.asked.index("/api/repos/create")
    assert server.created[0]["name"] == "result" and server.created[0]["organization"] == "somebody"
    assert server.created[0].get("private") is True or server.created[0].get("visibility") == "private"
    assert_whole(server.files, last)


def test_pushes_to_modelscope(workplace, modelscope):
    last = train_and_push(hub="modelscope")
    assert modelscope.asked[0] == "/openapi/v1/users/me"
    private = 1
    assert modelscope.created[0] == {
        "Path": "somebody",
        "Name": "result",
        "Visibility": private,
        "License": modelscope.created[0]["License"],
    }
    assert_whole(modelscope.files, last)


def test_refuses_before_training_if_modelscope_does_not_know_the_user(workplace, modelscope):
    modelscope.knows_the_user = False
    with pytest.raises(ValueError, match=r"modelscope does not accept this user.*modelscope login"):
        train(config(max_steps=1, push_to_hub="somebody/result", hub="modelscope"))
    assert not Path("out").exists()


def assert_whole(files, last):
    names = {last.name, "README.md", "loss.png", "samples/step-0.png", "samples/step-2.png"}
    assert set(files) == names
    for name in names:
        assert files[name] == (Path("out") / name).read_bytes()


def test_refuses_before_training_if_nobody_is_logged_in(workplace, server):
    server.knows_the_user = False
    with pytest.raises(ValueError, match=r"huggingface does not accept this user.*hf auth login"):
        train(config(max_steps=1, push_to_hub="somebody/result"))
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["result", "a/b/c", "some body/result", ""])
def test_refuses_a_name_that_is_none(name):
    with pytest.raises(ValueError, match="must be ORG/NAME"):
        check_login(name, "huggingface")
