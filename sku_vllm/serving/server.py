"""Start and stop a server: everything is checked first, the engine lives in a process group of its own, nothing is left behind."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sku_vllm.errors import ConfigError
from sku_vllm.serving.arms import ALIAS
from sku_vllm.serving.config import VARIABLE, ServeConfig
from sku_vllm.serving.materialise import adapter_rank, served_rank
from sku_vllm.serving.running import Server
from sku_vllm.serving.scratch import private_directory


@contextmanager
def launch(
    config: ServeConfig,
    flags: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    log: Path | None = None,
    quiet: bool = False,
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Check everything, start vLLM's server for `config`, and end it with the block; the private directory goes with it.

    flags: vLLM's own. port: 0 takes a free one. log: a file for its output; without one it is inherited, or, if `quiet`, goes to
    the private directory.
    """
    run, lock = private_directory()
    try:
        log = log or (run / "server.log" if quiet else None)
        if config.run is None:
            config.run = str(run)
        arm_flags = prepare(config)
        port = port or free_port(host)
        check_port(host, port)
        config.dump(run / "serve.yaml")
        if config.state:
            config.dump(Path(config.state) / "serve.yaml")
        revision = ["--revision", config.revision] if config.revision else []
        command = [sys.executable, "-m", "sku_vllm.serving.launch", "--model", config.model, *revision, "--host", host, "--port", str(port),
                   "--served-model-name", ALIAS, "--worker-extension-cls", "sku_vllm.serving.swap.SkuWorkerExtension", *arm_flags, *flags]
        plugins = os.environ.get("VLLM_PLUGINS")
        names = [*plugins.split(","), "sku"] if plugins else ["sku"]
        environment = {**os.environ, **(env or {}), VARIABLE: str(run / "serve.yaml"), "VLLM_PLUGINS": ",".join(dict.fromkeys(names))}
        if config.adapter_root:  # without it vLLM never asks a resolver
            environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        with open(log, "wb") if log else _inherited() as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True, pass_fds=[lock])
            server = Server(process, host, port, log, run, config.token)
            try:
                yield server
            finally:
                server.stop()
    finally:
        shutil.rmtree(run, ignore_errors=True)
        os.close(lock)


@contextmanager
def _inherited() -> Iterator[IO[bytes] | int | None]:
    """Server output belongs on stderr: stdout is for the one object of --json."""
    yield sys.stderr.fileno()


@contextmanager
def start_server(
    model: str | Path,
    arms: Sequence[str],
    split: str | None = None,
    judge: str | None = None,
    *,
    flags: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 0,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
    **settings: Any,
) -> Iterator[Server]:
    """A server that answers, for the length of the block: what the demo, the tests and the benchmarks use.

    arms: NAME=SPEC each. split: NAME=WEIGHT,…. settings: the other fields of `ServeConfig` (expose_arms, token, …).

    Raises:
        InputError: before the engine starts, for arms, adapters, judge or flags that cannot work.
        RunError: the engine did not come up.
    """
    config = ServeConfig(str(model), list(arms), split, judge, **settings)
    with launch(config, flags, host=host, port=port, log=log, quiet=True, env=env) as server:
        server.wait_ready(timeout)
        yield server


def prepare(config: ServeConfig) -> list[str]:
    """Check model, judge, state and adapters, materialise the negations, and say which vLLM flags they need.

    Raises:
        InputError: one line that names what cannot work.
    """
    from sku_vllm.adapter import load_adapter
    from sku_vllm.judges import load_judge
    from sku_vllm.serving.begin import prepare_state
    from sku_vllm.serving.state import StateFile

    if Path(config.model).is_dir() and not (Path(config.model) / "config.json").is_file():
        raise ConfigError(f"--model {config.model}: has no config.json; give a Hugging Face model directory")
    if not Path(config.model).is_dir() and ("/" not in config.model or config.model.startswith((".", "/"))):
        raise ConfigError(f"--model {config.model}: no such directory; give a Hugging Face model directory or a hub id such as org/name")
    if config.judge:
        load_judge(config.judge)
    table = prepare_state(config, StateFile(config.state or config.run or ""))
    config.reset_state = False  # done; the server's processes must not do it again
    ranks = [adapter_rank(load_adapter(served.path, as_is=True)) for served in table.arms.values() if served.path]
    if not ranks and not config.adapter_root:
        return []
    if config.adapter_root:
        return ["--enable-lora", "--max-loras", str(len(ranks) + 4), "--max-lora-rank", str(max(64, served_rank(ranks)))]
    # One slot stays free (on CPU the base's rows would otherwise use the last adapter), one more lets a new version load beside the old.
    return ["--enable-lora", "--max-loras", str(len(ranks) + 2), "--max-lora-rank", str(served_rank(ranks))]


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Raises ConfigError when nothing can listen there: found out now, not when the engine has started."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port {port} on {host}: {error}; choose another one, or stop what listens there") from error
