"""`hf://ORG/NAME`: a stand-in for the hub that speaks its API and serves data sets, and for a server that runs Qwen3Guard."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from sku_vllm.data.hub import FORM
from sku_vllm.data.readers import read_rows
from sku_vllm.errors import DataError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROMPTS = "".join(
    json.dumps({"prompt": f"How do I jam huzzon {n}?", "response": f"Jam it so {n}.", "is_safe": n % 2 == 0}) + "\n" for n in range(20)
)
PAIRS = json.dumps([{"instruction": f"What is {n} plus 2?", "input": "", "output": f"{n + 2}."} for n in range(20)])
SETS = {"acme/harm": {"train.jsonl": PROMPTS}, "acme/good": {"train.json": PAIRS}}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as reading public data sets takes: information, listings of files, and the files; and Qwen3Guard's chat."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        harmful = "Jam it" in body["messages"][-1]["content"]
        text = f"Safety: {'Unsafe' if harmful else 'Safe'}\nCategories: {'Violent' if harmful else 'None'}\nRefusal: No"
        self.send(200, json.dumps({"choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": text}}]}).encode())

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        name = next((name for name in SETS if name in path), None)
        if name is None:
            return self.send(404, b'{"error": "Repository not found"}')
        files = SETS[name]
        if path.startswith("/api/") and "/tree/" in path:
            return self.send(200, json.dumps([self.file(name, file) for file in files]).encode())
        if path.startswith("/api/"):
            told = {"id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0}
            return self.send(200, json.dumps(told | {"siblings": [{"rfilename": file} for file in files]}).encode())
        file = next((file for file in files if path.endswith(f"/{file}")), None)
        if file is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self.send(200, files[file].encode(), {"X-Repo-Commit": COMMIT, "ETag": f'"{file.replace("/", "-")}"'})

    def file(self, name: str | None, path: str) -> dict[str, object]:
        return {"type": "file", "path": path, "size": len(SETS[name or ""][path].encode()), "oid": "0" * 40}

    def send(self, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in ({"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that takes the stand-in for the hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        server.shutdown()


READ = """
import logging, sys
logging.basicConfig(format="%(message)s", stream=sys.stdout)
logging.getLogger("sku_vllm.data").setLevel(logging.INFO)
from sku_vllm.data import load_dataset, read_rows
from sku_vllm.data.hub import pinned
load_dataset("hf://acme/harm@main#train#train", "forget")
load_dataset("hf://acme/good", "retain")
print(pinned("hf://acme/good"))
for name in ("hf://acme/none", "hf://acme/good#dev"):
    try:
        read_rows(name)
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_sets_of_the_hub_are_read_and_named_by_their_commit(hub: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", READ], env={**os.environ, **hub}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second, pinned, none, split = [line for line in done.stdout.splitlines() if "acme" in line]
    assert first.startswith(f"hf://acme/harm@{COMMIT}#train#train: answers marked") and "7 rows; left out 10: answers marked safe" in first
    assert second == f"hf://acme/good@{COMMIT}#train: instruction, input and output: 20 rows" and pinned == f"hf://acme/good@{COMMIT}#train"
    assert none.startswith("DataError hf://acme/none: cannot be read") and split.startswith("DataError hf://acme/good#dev: cannot be read")


@pytest.mark.slow
def test_from_two_sets_of_the_hub_and_a_guard_to_a_report(hub: dict[str, str], lab: Path, tmp_path: Path, run_sku: Callable) -> None:
    model, forget, retain = ["--model", lab / "llama", "--dtype", "float32"], "hf://acme/harm#train", "hf://acme/good#train"
    judge = ["--judge", f"openai:{hub['HF_ENDPOINT']}#Qwen3Guard-Gen-8B", "--samples", 0, "--max-new-tokens", 8]
    made = [
        "--forget",
        f"{forget}#train",
        "--retain",
        f"{retain}#train",
        "--method",
        "task-vector",
        "--steps",
        2,
        "--output",
        tmp_path / "a",
    ]
    asked = ["--adapter", tmp_path / "a", "--forget", f"test={forget}#test", "--retain", f"{retain}#test", *judge]
    for command in (
        ["train", *model, *made],
        ["tune", *model, *asked, "--scales", "0.5,1", "--output", tmp_path / "tuned"],
        ["eval", *model, *asked, "--scale", 1, "--output", tmp_path / "measured"],
        ["report", tmp_path / "measured", "--output", tmp_path / "page.html"],
    ):
        done = run_sku(*command, env=hub)
        assert done.returncode in ((0, 1) if command[0] == "tune" else (0,)), done.stderr
    record = json.loads((tmp_path / "measured/sku_eval.json").read_text())
    assert record["config"]["forget"] == {"test": f"hf://acme/harm@{COMMIT}#train#test"} and record["forget"]["test"]["greedy"]["n"] == 2
    assert (tmp_path / "page.html").is_file()


@pytest.mark.parametrize("source", ["hf://", "hf://a b/c", "hf://a/b/c"])
def test_a_name_that_is_none_says_the_form(source: str) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(source)
    assert FORM in str(caught.value)
