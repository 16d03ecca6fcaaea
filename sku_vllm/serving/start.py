"""Starts a server in its own process group, after checking everything that can be checked first, and cleans up when it ends.

`sku serve`, the demo, the benchmarks and the tests all use `serve`.
"""

import os
import shutil
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sku_vllm.errors import ConfigError
from sku_vllm.serving.address import check_not_itself
from sku_vllm.serving.arm_adapter import served_rank
from sku_vllm.serving.arms import ALIAS
from sku_vllm.serving.audit import AuditLog, audit_path
from sku_vllm.serving.private_directory import private_directory
from sku_vllm.serving.serve_config import VARIABLE, ServeConfig
from sku_vllm.serving.server import Server


@contextmanager
def serve(
    config: ServeConfig,
    flags: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    log: Path | None = None,
    quiet: bool = True,
    env: Mapping[str, str] | None = None,
    timeout: float | None = 600,
) -> Iterator[Server]:
    """Start a server, wait until it answers, and stop it when the block ends; its private directory is then removed.

    Args:
        config: arms, judge and rules.
        flags: vLLM's own, such as ("--dtype", "float32").
        port: 0 chooses a free one.
        log: a file for the server's output. Without one it goes to the private directory, or, unless `quiet`, to stderr.
        env: environment variables of the server, in addition to this process's.
        timeout: seconds within which it must answer; None waits as long as its process lives.

    Raises:
        InputError: before the engine starts, for arms, adapters, judge, port or flags that cannot work.
        RunError: the engine did not come up.
    """
    run, lock = private_directory()
    try:
        log = log or (run / "server.log" if quiet else None)
        if config.run is None:
            config.run = str(run)
        arm_flags = prepare(config)
        port = port or free_port(host)
        if not any(flag.partition("=")[0] == "--uds" for flag in flags):
            check_port(host, port)
            for arm in config.parsed_arms().values():
                check_not_itself(arm, Namespace(host=host, port=port))
        config.dump(run / "serve.yaml")
        if config.state:
            config.dump(Path(config.state) / "serve.yaml")
        command = [*_command(config), "--host", host, "--port", str(port), *arm_flags, *flags]
        with open(log, "wb") if log else _inherited() as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, env=_environment(config, run, env or {}), start_new_session=True, pass_fds=[lock]
            )
            server = Server(process, (host, port), log, run, config.token)
            try:
                server.wait_ready(timeout)
                yield server
            finally:
                server.stop()
    finally:
        shutil.rmtree(run, ignore_errors=True)
        os.close(lock)


def _command(config: ServeConfig) -> list[str]:
    """The command line of the server process, with the flags that are always given."""
    revision = ["--revision", config.revision] if config.revision else []
    extension = "sku_vllm.serving.worker_extension.SkuWorkerExtension"
    module = [sys.executable, "-m", "sku_vllm.serving.launch"]
    names = config.alias or [ALIAS]
    return [*module, "--model", config.model, *revision, "--served-model-name", *names, "--worker-extension-cls", extension]


def _environment(config: ServeConfig, run: Path, extra: Mapping[str, str]) -> dict[str, str]:
    plugins = os.environ.get("VLLM_PLUGINS")
    names = [*plugins.split(","), "sku"] if plugins else ["sku"]
    environment = {**os.environ, **extra, VARIABLE: str(run / "serve.yaml"), "VLLM_PLUGINS": ",".join(dict.fromkeys(names))}
    if config.adapter_root:  # without it vLLM never asks a resolver
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    return environment


@contextmanager
def _inherited() -> Iterator[IO[bytes] | int | None]:
    """Yield this process's stderr for the server's output: stdout is for the JSON object of --json."""
    yield sys.stderr.fileno()


def prepare(config: ServeConfig) -> list[str]:
    """Check model, judge, state and adapters, write the arms' adapters, and say which vLLM flags they need.

    Raises:
        InputError: one line that names what cannot work.
    """
    from sku_vllm.judges import load_judge
    from sku_vllm.serving.initial_state import prepare_state, ranks_of_arms
    from sku_vllm.serving.state import StateFile

    if Path(config.model).is_dir() and not (Path(config.model) / "config.json").is_file():
        raise ConfigError(f"--model {config.model}: has no config.json; give a Hugging Face model directory")
    if not Path(config.model).is_dir() and ("/" not in config.model or config.model.startswith((".", "/"))):
        raise ConfigError(f"--model {config.model}: no such directory; give a Hugging Face model directory or a hub id such as org/name")
    if config.judge:
        load_judge(config.judge, live=True)
    AuditLog(audit_path(config)).check()
    prepare_state(config, StateFile(config.state or config.run or ""))
    config.reset_state = False  # the state was reset just now; the server's processes must not reset it again
    ranks = list(ranks_of_arms(config).values())
    if not ranks and not config.adapter_root:
        return []
    if config.adapter_root:
        return ["--enable-lora", "--max-loras", str(len(ranks) + 4), "--max-lora-rank", str(max(64, served_rank(ranks)))]
    # One slot always stays free, since vLLM on CPU else answers the base's requests with the last adapter; one more is for replacing.
    return ["--enable-lora", "--max-loras", str(len(ranks) + 2), "--max-lora-rank", str(served_rank(ranks))]


def free_port(host: str) -> int:
    """A port of this address that nobody listens on at this moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Raise ConfigError now, before the engine starts, when the server cannot listen on this address and port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port {port} on {host}: {error}; choose another one, or stop what listens there") from error
