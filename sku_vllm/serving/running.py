"""A server that runs: its metrics, its control API, and the end of it."""

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from sku_vllm import arm_metrics
from sku_vllm.errors import ConfigError, RunError
from sku_vllm.serving.launch import REFUSED

GRACE = 20.0


class Server:
    """A running server. url: ends in /v1, as OpenAI clients want it. root: without /v1. run: its private directory."""

    def __init__(self, process: subprocess.Popen[bytes], host: str, port: int, log: Path | None, run: Path, token: str | None) -> None:
        self.process, self.port, self.log, self.run, self.token = process, port, log, run, token
        self.root = f"http://{'127.0.0.1' if host in ('', '0.0.0.0') else host}:{port}"
        self.url = f"{self.root}/v1"

    def metrics(self) -> arm_metrics.Metrics:
        """/metrics as {sample name: {sorted label pairs: value}}."""
        return arm_metrics.parse(urllib.request.urlopen(f"{self.root}/metrics", timeout=30).read().decode())

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a sample over every label set that holds these labels; 0 where there is none yet."""
        wanted = set(labels.items())
        return sum(value for pairs, value in self.metrics().get(name, {}).items() if wanted <= set(pairs))

    def control(self, method: str, path: str, body: Any = None, timeout: float = 600) -> Any:
        """One call of the control API under /v1/sku/; raises RunError with the server's message when it refuses."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/sku/{path.lstrip('/')}", data=data, method=method)
        request.add_header("Content-Type", "application/json")
        if self.token:
            request.add_header("X-SKU-Token", self.token)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise RunError(f"{path}: {error.code} {error.read().decode(errors='replace')}") from error

    def ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.root}/health", timeout=5).status == 200
        except OSError:
            return False

    def wait_ready(self, timeout: float) -> None:
        """Block until the server answers.

        Raises:
            ConfigError, RunError: it ended, or did not answer in time; with its last line.
        """
        deadline = time.monotonic() + timeout
        while not self.ready():
            code = self.process.poll()
            if code is not None:
                refused = self.run / ("serve.yaml" + REFUSED)
                if refused.is_file():
                    raise ConfigError(refused.read_text(encoding="utf-8"))
                raise RunError(f"the server ended with code {code}: {self.last_line()}")
            if time.monotonic() > deadline:
                raise RunError(f"the server did not answer within {timeout:.0f} s: {self.last_line()}")
            time.sleep(0.2)

    def last_line(self) -> str:
        if self.log is None:
            return "see its log above"
        lines = self.log.read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if "error:" in line.lower() or "Error" in line]
        return (errors or lines or ["it wrote nothing"])[-1].removeprefix("error: ")[-600:]

    def stop(self) -> None:
        """SIGTERM, a grace period, then SIGKILL for whatever is left of the process group. A second Ctrl-C waits until that is done."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._stop()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
