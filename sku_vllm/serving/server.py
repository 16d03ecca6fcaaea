"""A handle on a running server for the process that started it: wait for it, read its metrics, call its control API, stop it."""

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sku_vllm.client import arm_metrics
from sku_vllm.client.http import ServerRefused, fetch, fetch_json
from sku_vllm.errors import ConfigError, RunError
from sku_vllm.serving.address import Address, read_address
from sku_vllm.serving.launch import REFUSED

GRACE = 20.0  # seconds between SIGTERM and SIGKILL, on top of vLLM's --shutdown-timeout


class Server:
    """A running server.

    url: ends in /v1, as OpenAI clients want it. root: without /v1. run: its private directory. log: the file its output goes to; None
    when it goes to this process's stderr. process: the vLLM process, leader of its own process group.
    """

    def __init__(self, process: subprocess.Popen[bytes], address: tuple[str, int], log: Path | None, run: Path, token: str | None) -> None:
        self.process, self.log, self.run, self.token = process, log, run, token
        self.address = Address(*address)  # until the server has said where it listens

    @property
    def root(self) -> str:
        """See the class."""
        return self.address.root

    @property
    def url(self) -> str:
        """See the class."""
        return self.address.root if self.address.uds else f"{self.address.root}/v1"

    @property
    def alias(self) -> str:
        """The model name that its clients use."""
        return self.address.alias

    @property
    def port(self) -> int:
        """The port it listens on; without meaning for a Unix socket."""
        return self.address.port

    def metrics(self) -> arm_metrics.Metrics:
        """/metrics as {sample name: {sorted label pairs: value}}. Raises RunError when the server does not answer."""
        with self.address.client() as client:
            return arm_metrics.parse(fetch("/metrics", client=client))

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over all label sets that contain `labels`; 0 where there is none yet."""
        wanted = set(labels.items())
        return sum(value for pairs, value in self.metrics().get(name, {}).items() if wanted <= set(pairs))

    def control(self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout: float = 600) -> Any:
        """One call of the control API: `path` is what follows /v1/sku/.

        Raises:
            RunError: with the status and the server's message when it refuses, or does not answer.
        """
        headers = {"X-SKU-Token": self.token} if self.token else {}
        try:
            with self.address.client(timeout) as client:
                return fetch_json(f"/v1/sku/{path.lstrip('/')}", method=method, body=body, headers=headers, client=client)
        except ServerRefused as error:
            raise RunError(f"{path}: {error.status} {error.body}") from error

    def ready(self) -> bool:
        """Whether the server answers where it says it listens."""
        self.address = read_address(self.run) or self.address
        return self.address.answers()

    def wait_ready(self, timeout: float | None) -> None:
        """Block until the server answers.

        Args:
            timeout: seconds; None waits as long as its process lives, however long the weights take to load.

        Raises:
            ConfigError: the server refused its flags. RunError: it ended, or did not answer within `timeout` seconds.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while not self.ready():
            code = self.process.poll()
            if code is not None:
                refused = self.run / ("serve.yaml" + REFUSED)
                if refused.is_file():
                    raise ConfigError(refused.read_text(encoding="utf-8"))
                raise RunError(f"the server ended with code {code}: {self.last_line()}")
            if time.monotonic() > deadline:
                raise RunError(f"the server did not answer at {self.root} within {timeout:.0f} s: {self.last_line()}")
            time.sleep(0.2)

    def last_line(self) -> str:
        """The last line of the server's log that contains an error, or else the last line; at most 600 characters."""
        if self.log is None:
            return "see its log above"
        lines = self.log.read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if "error:" in line.lower() or "Error" in line]
        return (errors or lines or ["it wrote nothing"])[-1].removeprefix("error: ")[-600:]

    def stop(self) -> None:
        """Send SIGTERM, wait for vLLM's --shutdown-timeout and `GRACE` seconds, then SIGKILL the rest of the process group.

        A second Ctrl-C does not interrupt this.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._stop()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(self.address.shutdown + GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
