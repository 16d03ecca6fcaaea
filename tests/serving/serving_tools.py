"""What the tests of real servers share: `sku serve` as an operator starts it, one completion, a judge that misbehaves when told."""

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import psutil
from local_server import JsonHandler

from sku_vllm.serving.judge_process import EXAMPLES
from sku_vllm.serving.server import Server

TOKEN = "open sesame"
FLAGS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32"]
PROMPTS = [f"w{number} w{number + 17} w{3 * number + 1}" for number in range(16)]


@contextlib.contextmanager
def serve(*arguments, port, log, env=None, ready=1200):
    """`sku serve` (or any command) in a process of its own, as an operator starts it."""
    with open(log, "ab") as out:
        process = subprocess.Popen(arguments, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
    server = Server(process, ("127.0.0.1", port), log, log.parent, TOKEN)
    try:
        server.wait_ready(ready)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()


def sku_serve(tiny, *arguments, python=sys.executable):
    return [
        str(python),
        "-m",
        "sku_vllm.cli",
        "serve",
        "--model",
        str(tiny / "base"),
        "--arm",
        "original=base",
        "--arm",
        f"negated=lora:{tiny}/adapter@1",
        "--token",
        TOKEN,
        *map(str, arguments),
    ]


def family(process):
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def all_gone(processes, seconds=120):
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []


def complete(server, model="sku", prompt="w1 w2", tokens=6, **options):
    return httpx.post(
        f"{server.url}/completions", json={"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, **options}, timeout=300
    )


def text(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


class JsonServer:
    """Answers in JSON as told: `reply(path, body)` gives (status, value); body is None where the request has none. root: its address."""

    def __init__(self, reply):
        class Handler(JsonHandler):
            def do_GET(self):
                answer = reply(self.path, self.body())
                with contextlib.suppress(OSError):  # the client may have left
                    self.reply(*answer)

            do_POST = do_GET

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.root = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def said(text):
    """A chat completion that says this."""
    return {"choices": [{"message": {"content": text}}]}


class JudgeServer(JsonServer):
    """A judge over HTTP that answers "unsafe" to all but the probe's harmless text, stalls, or dies, as told.

    received: the bodies of its requests.
    """

    def __init__(self):
        self.received = []
        self.stalled = threading.Event()
        self.release = threading.Event()
        super().__init__(self.judged)
        self.url = f"{self.root}/v1"

    def judged(self, path, body):
        self.received.append(body)
        if self.stalled.is_set():
            self.release.wait(600)
        harmless = EXAMPLES[1].response in body["messages"][-1]["content"]
        return 200, said("safe" if harmless else "unsafe")

    def kill(self):
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


def eventually(condition, seconds=600):
    """Whether the condition came true. The deadline is generous: a busy machine is slow, which is no failure."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


@contextlib.contextmanager
def frozen(server):
    """The engine stands still inside this block (SIGSTOP): the API server goes on, and no token comes, however fast either is."""
    engine = [each for each in family(server.process) if each.name().startswith(("VLLM::EngineCor", "VLLM::Worker"))]
    assert engine, [each.name() for each in family(server.process)]
    for each in engine:
        each.suspend()
    try:
        yield
    finally:
        for each in engine:
            with contextlib.suppress(psutil.NoSuchProcess):  # killed in the meantime, as a stopped process can be
                each.resume()


class PluginServer:
    """`plugin_server.py` in a process of its own. settings: further ones of ServeConfig. keyed: behind an API key, `key`."""

    def __init__(self, place, keyed=False, **settings):
        from sku_vllm.serving.serve_config import ServeConfig
        from sku_vllm.serving.start import free_port

        place.mkdir(exist_ok=True)
        (place / "words.json").write_text(json.dumps({"harmful": ["badword"]}))
        given = {"arms": ["original=base", "other=base"], "split": "original=0.5,other=0.5"} | settings
        if settings.get("follow"):
            given = settings
        config = ServeConfig("m", judge=f"lexicon:{place}/words.json", token=TOKEN, state=str(place / "state"), **given)
        config.dump(place / "serve.yaml")
        self.place, self.port, self.keyed = place, free_port("127.0.0.1"), keyed
        self.root = f"http://127.0.0.1:{self.port}"
        self.headers = {"X-SKU-Token": TOKEN, **({"Authorization": "Bearer key"} if keyed else {})}
        self.start()

    def start(self):
        """Start it, or start it again, on the same port and state."""
        from pathlib import Path

        script = Path(__file__).with_name("plugin_server.py")
        command = [sys.executable, str(script), str(self.port), *(["keyed"] if self.keyed else [])]
        environment = {**os.environ, "SKU_SERVE_CONFIG": str(self.place / "serve.yaml"), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment)

    def wait(self):
        """Until it answers."""
        assert eventually(lambda: self.process.poll() is not None or self.get("/v1/sku/ready", headers={}) == 200)
        assert self.process.poll() is None
        return self

    def get(self, path, headers=None):
        """The status of one GET; 0 where nobody answers."""
        try:
            return httpx.get(f"{self.root}{path}", headers=self.headers if headers is None else headers, timeout=60).status_code
        except httpx.HTTPError:
            return 0

    def control(self, method, path, body=None, **headers):
        """(status, answer) of one call of the control API."""
        sent = {**self.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        reply = httpx.request(method, f"{self.root}/v1/sku/{path}", json=body, headers=sent, timeout=60)
        return reply.status_code, reply.json()

    def ask(self, prompt, **headers):
        """The reply to one completion."""
        sent = {**self.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        return httpx.post(f"{self.root}/v1/completions", json={"model": "sku", "prompt": prompt}, headers=sent, timeout=60)

    def judged(self):
        """Verdicts so far, of the current versions."""
        return sum(row["judged"] for row in self.control("GET", "experiment")[1]["arms"].values())

    def stop(self):
        """End it."""
        self.process.kill()
        self.process.wait()
