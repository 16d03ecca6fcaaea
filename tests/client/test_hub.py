"""Uploads to the hub, against a stand-in of its HTTP API that keeps what it is sent."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sku_vllm.client.hub import Repository, licence_lines
from sku_vllm.errors import ConfigError, RunError


class Hub(ThreadingHTTPServer):
    """Repositories by name: whether private, and their files. `failing`: answers commits with 500."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.failing = False
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        name = "/".join(self.path.split("?")[0].split("/")[3:5])
        if name not in self.server.repositories:
            return self.reply({"error": "Repository not found"}, 404)
        self.reply({"id": name, "private": self.server.repositories[name]["private"], "siblings": []})

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rsplit("/", 1)[1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        assert self.headers["Authorization"] == "Bearer hf_not_a_real_token"
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name in self.server.repositories:
                return self.reply({"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409)
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.repositories[name] = {"private": private, "files": {}}
            return self.reply({"url": f"{self.server.url}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(data)["files"]
            sorts = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"} for f in files]
            return self.reply({"files": [{**sort, "shouldIgnore": False} for sort in sorts]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(data)["objects"]
            uploads = [{**each, "actions": {"upload": {"href": f"{self.server.url}/blob/{each['oid']}"}}} for each in objects]
            return self.reply({"transfer": "basic", "objects": uploads})
        if "/commit/" in self.path:
            if self.server.failing:
                return self.reply({"error": "the stand-in fails"}, 500)
            name = re.match(r"/api/models/(.+)/commit/", self.path)[1]  # type: ignore[index]
            for line in map(json.loads, data.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.repositories[name]["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.repositories[name]["files"][value["path"]] = self.server.blobs[value["oid"]]
            return self.reply({"commitUrl": f"{self.server.url}/{name}/commit/0", "commitOid": "0" * 40, "hookOutput": ""})
        self.reply({"error": f"the stand-in does not know {self.path}"}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import HfApi, constants

    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=server.url))
    yield server
    server.shutdown()


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    folder = tmp_path / "fused"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "sku_manifest.json", "sku_fuse.json", "README.md"):
        (folder / name).write_bytes(name.encode() * 3)
    return folder


def test_a_checkpoint_goes_to_a_private_repository_without_this_machines_paths(hub: Hub, fused: Path) -> None:
    address = Repository("org/safer").upload_checkpoint(fused)
    kept = hub.repositories["org/safer"]
    assert address == f"{hub.url}/org/safer" and kept["private"]
    assert kept["files"] == {file.name: file.read_bytes() for file in fused.iterdir() if file.name != "sku_fuse.json"}


def test_a_public_repository_has_to_be_asked_for(hub: Hub, fused: Path) -> None:
    Repository("org/open", public=True).upload_checkpoint(fused)
    assert not hub.repositories["org/open"]["private"]
    with pytest.raises(ConfigError, match=r"--push org/open: exists and is public; give --public"):
        Repository("org/open")
    Repository("org/open", public=True).upload_card("# A card")
    assert hub.repositories["org/open"]["files"]["README.md"] == b"# A card"


def test_a_raw_adapter_is_never_published(hub: Hub, fused: Path) -> None:
    (fused / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no fused checkpoint"):
        Repository("org/safer").upload_checkpoint(fused)
    assert hub.repositories["org/safer"]["files"] == {}


def test_what_goes_wrong_is_one_line_with_a_way_on(hub: Hub, fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Repository("org/safer")
    hub.failing = True
    with pytest.raises(RunError, match=rf"^--push org/safer: .*500.*; the checkpoint is in {fused}; try again with: hf upload"):
        repository.upload_checkpoint(fused)
    with pytest.raises(ConfigError, match="expected ORG/NAME"):
        Repository("safer")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="hf auth login"):
        Repository("org/safer")


def test_the_licence_is_the_bases(tmp_path: Path) -> None:
    assert licence_lines(str(tmp_path)) == []
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama3\ntags:\n- x\n---\n# Base\n")
    assert licence_lines(str(tmp_path)) == ["license: other", "license_name: llama3"]
