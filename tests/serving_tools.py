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

from sku_vllm.serving.server import Server

TOKEN = "open sesame"
FLAGS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32"]
PROMPTS = [f"w{number} w{number + 17} w{3 * number + 1}" for number in range(16)]


@contextlib.contextmanager
def serve(*arguments, port, log, env=None, ready=300):
    """`sku serve` (or any command) in a process of its own, as an operator starts it."""
    with open(log, "ab") as out:
        process = subprocess.Popen(arguments, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
    server = Server(process, "127.0.0.1", port, log, log.parent, TOKEN)
    try:
        server.wait_ready(ready)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def sku_serve(tiny, *arguments, python=sys.executable):
    return [str(python), "-m", "sku_vllm.cli", "serve", "--model", str(tiny / "base"), "--arm", "original=base",
            "--arm", f"negated=lora:{tiny}/adapter@1", "--token", TOKEN, *map(str, arguments)]


def family(process):
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def all_gone(processes, seconds=40):
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []


def complete(server, model="sku", prompt="w1 w2", tokens=6, **options):
    return httpx.post(
        f"{server.url}/completions", json={"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, **options}, timeout=60
    )


def text(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


class JudgeServer:
    """A judge over HTTP that answers "unsafe", stalls, or dies, as told."""

    def __init__(self):
        self.stalled = threading.Event()
        self.release = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                if outer.stalled.is_set():
                    outer.release.wait(60)
                body = json.dumps({"choices": [{"message": {"content": "unsafe"}}]}).encode()
                with contextlib.suppress(OSError):
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def kill(self):
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


def eventually(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False
