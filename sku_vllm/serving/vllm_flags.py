"""Parses vLLM's flags with vLLM's own parser, and refuses combinations that vLLM accepts but that would give wrong answers here.

Open this file when a combination of flags must be refused, or to see why one is.
"""

import os
import socket
import stat
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, NoReturn

from sku_vllm.adapter.vllm_ranks import vllm_rank
from sku_vllm.client.socket_path import SOCKET_PATH
from sku_vllm.errors import ConfigError
from sku_vllm.serving.address import check_not_itself
from sku_vllm.serving.arms import ALIAS, SWAPPED, Arm
from sku_vllm.serving.serve_config import ServeConfig

# Flags that make every data-parallel rank a separate server behind a load balancer outside vLLM.
OTHER_BALANCERS = (
    "data_parallel_external_lb",
    "data_parallel_hybrid_lb",
    "data_parallel_multi_port_external_lb",
    "data_parallel_rank",
    "data_parallel_start_rank",
    "headless",
)


def parse_flags(arguments: list[str]) -> tuple[Namespace, Any]:
    """vLLM's parsed and validated flags, and its model configuration.

    Raises:
        ConfigError: vLLM refuses the flags; its message in one line.
    """
    from pydantic import ValidationError
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from sku_vllm.serving.vllm_compat import serve_flags

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"{message}; sku serve passes every flag it does not know to vLLM")

    cli_env_setup()  # type: ignore[no-untyped-call]  # vLLM's
    modest_cache(arguments)
    try:
        parser = Parser(prog="sku serve")  # type: ignore[no-untyped-call]  # vLLM's
        args = serve_flags().make_arg_parser(parser).parse_args(arguments)
        args.subparser = "serve"
        serve_flags().validate_parsed_serve_args(args)
        check_ray(args)
        engine = AsyncEngineArgs.from_cli_args(args).create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    except ValidationError as error:
        raise ConfigError("vLLM refuses these flags: " + "; ".join(each["msg"] for each in error.errors())) from error
    except (ValueError, TypeError, KeyError, NotImplementedError, OSError) as error:
        raise ConfigError(f"vLLM refuses these flags: {error}") from error
    return args, engine.model_config


def modest_cache(arguments: list[str]) -> None:
    """On CPU, unless a flag says otherwise, use a quarter of the free memory for the KV cache, 1 to 4 GiB.

    vLLM's own default is a share of the whole memory, and it refuses to start where other programs use some of it.
    """
    import psutil

    chosen = any(flag.replace("_", "-").startswith(("--gpu-memory-utilization", "--kv-cache-memory")) for flag in arguments)
    if on_cpu() and not chosen:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(min(4, max(1, psutil.virtual_memory().available // 2**32))))


def check_flags(args: Namespace, config: ServeConfig, model_config: Any) -> None:
    """Refuse what vLLM accepts but would serve wrongly or crash with.

    Raises:
        ConfigError: names the flag and the reason.
    """
    check_adapters(args, config, model_config)
    check_names(args, config)
    for arm in config.parsed_arms().values():
        check_not_itself(arm, args)
    check_processes(args, config, bool(adapters_of(config) or config.adapter_root))


def adapters_of(config: ServeConfig) -> int:
    """How many of the arms are adapters in the engine."""
    return sum(arm.kind == "lora" for arm in config.parsed_arms().values())


def check_adapters(args: Any, config: ServeConfig, model_config: Any) -> None:
    """Refuse flags with which the arms' adapters cannot be loaded, or would be mixed up. args: vLLM's flags, or its `EngineArgs`.

    Raises:
        ConfigError: names the flag and the reason.
    """
    adapters = adapters_of(config)
    if adapters and not args.enable_lora:
        raise ConfigError(
            f"--enable-lora: is off, and lora: arms need it; give --enable-lora --max-loras {adapters + 2} --max-lora-rank 64, or what "
            "their rank is"
        )
    if adapters and (args.max_loras or 1) < adapters + 1:
        raise ConfigError(
            f"--max-loras {args.max_loras}: {adapters} adapters need at least {adapters + 1} slots; with every slot taken, "
            "vLLM on CPU answers requests for the base with the last adapter"
        )
    if args.enable_lora and model_config.get_num_experts() > 0 and on_cpu():
        raise ConfigError(
            f"--model {args.model}: is a mixture of experts, for which vLLM's CPU build has no adapter kernel (it calls Triton's); "
            "fuse the adapter and serve the result as an upstream: arm, or start with the base alone and swap"
        )


def served_names(args: Namespace, config: ServeConfig) -> tuple[str, ...]:
    """The model names that clients use for the split: `alias` of the configuration, else vLLM's --served-model-name.

    Without either it is `sku`, and where vLLM was started by hand also the model's own name, which its clients already use.
    """
    given = getattr(args, "served_model_name", None)
    names = config.alias or ([given] if isinstance(given, str) else given) or [ALIAS, args.model]
    return tuple(dict.fromkeys(names))


def check_names(args: Namespace, config: ServeConfig) -> None:
    """Refuse aliases that name an arm, or that contradict --served-model-name.

    Raises:
        ConfigError: names the alias.
    """
    given = getattr(args, "served_model_name", None)
    if config.alias and given and list(given) != config.alias and list(given) != [ALIAS]:
        raise ConfigError(f"--alias {', '.join(config.alias)}: --served-model-name says {', '.join(given)}; give one of the two")
    for name in served_names(args, config):
        if name in config.parsed_arms() or name in (SWAPPED, ""):
            raise ConfigError(f"--served-model-name {name!r}: is the name of an arm; clients could not tell the two apart; choose another")


def check_rank(args: Any, ranks: Mapping[Arm, int]) -> None:
    """Refuse a --max-lora-rank that is too small for the arms' adapters, with which vLLM would fail once its engine runs.

    Raises:
        ConfigError: names the arm with the highest rank, its adapter, and the flag that holds them all.
    """
    if getattr(args, "enable_lora", False) and ranks:
        arm = max(ranks, key=lambda each: ranks[each])
        if ranks[arm] > int(args.max_lora_rank):
            raise ConfigError(too_high(arm, ranks[arm], args.max_lora_rank))


def too_high(arm: Arm, rank: int, limit: Any) -> str:
    """Why an adapter does not fit a server, and the flag with which it would."""
    return f"--max-lora-rank {limit}: arm {arm.name}: {arm.source} has rank {rank}; start the server with --max-lora-rank {vllm_rank(rank)}"


def check_socket(args: Namespace) -> None:
    """Remove the Unix socket that a server which was killed has left at --uds, where vLLM could not listen.

    Raises:
        ConfigError: a server answers there, the path is something else than a socket, or no socket can be made there.
    """
    uds = getattr(args, "uds", None)
    if not uds:
        return None
    if len(os.fsencode(uds)) > SOCKET_PATH:
        raise ConfigError(f"--uds {uds}: a socket's path has {SOCKET_PATH} bytes at most; name a shorter one, or one from this directory")
    place = os.path.dirname(uds) or "."
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"--uds {uds}: {place} is no directory that this user may write to; make it, or name another path")
    if not os.path.lexists(uds):
        return None
    if not stat.S_ISSOCK(os.lstat(uds).st_mode):
        raise ConfigError(f"--uds {uds}: is not a socket; name a path that does not exist")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(uds)
        except ConnectionRefusedError:
            return os.unlink(uds)
    raise ConfigError(f"--uds {uds}: a server listens there; stop it, or name another path")


def check_processes(args: Namespace, config: ServeConfig, adapters: bool) -> None:
    """Check the flags on how many processes serve and where they run. Raises ConfigError as `check_flags`."""
    _check_several(args, config)
    for flag in OTHER_BALANCERS:
        if getattr(args, flag, None) not in (None, False):
            raise ConfigError(
                f"--{flag.replace('_', '-')}: every rank would be a server of its own, with weights, adapters and verdicts of its own; "
                "start one sku serve per rank behind your balancer, or leave the balancing to vLLM (--data-parallel-size alone)"
            )
    _check_elsewhere(args, config, adapters)


def _check_several(args: Namespace, config: ServeConfig) -> None:
    """Several API servers need a shared state directory, and cannot load adapters at run time."""
    several = (args.api_server_count or args.data_parallel_size or 1) > 1
    if several and os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").lower() in ("1", "true"):
        raise ConfigError(
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING with several API servers: their adapter ids collide "
            "and one adapter is served as another; unset one of the two"
        )
    if several and not (config.state or config.run):
        raise ConfigError("--api-server-count above 1 needs --state DIR, which the servers share")


def _check_elsewhere(args: Namespace, config: ServeConfig, adapters: bool) -> None:
    """Workers on other machines need to see the adapters' directory."""
    elsewhere = [
        flag
        for flag, value in (("distributed_executor_backend", "ray"), ("data_parallel_backend", "ray"))
        if getattr(args, flag, None) == value
    ] + ["nnodes"] * ((getattr(args, "nnodes", 1) or 1) > 1)
    if elsewhere and adapters and not config.state:
        raise ConfigError(
            f"--{elsewhere[0].replace('_', '-')} {getattr(args, elsewhere[0])}: workers on other machines cannot read the adapters, "
            "which lie in a private directory of this one; give --state DIR that every machine mounts, or serve fused weights"
        )


def on_cpu() -> bool:
    """Whether this vLLM runs on the CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def check_ray(args: Namespace) -> None:
    """Raise ConfigError where a flag asks for Ray on a platform for which vLLM knows no Ray resource (CPU).

    vLLM itself would fail only after starting a part of the engine.
    """
    from vllm.platforms import current_platform

    for flag in ("distributed_executor_backend", "data_parallel_backend"):
        if getattr(args, flag, None) == "ray" and not current_platform.ray_device_key:
            raise ConfigError(
                f"--{flag.replace('_', '-')} ray: vLLM does not run on Ray on this platform ({current_platform.device_name}); "
                "leave it out, and vLLM starts its workers on this machine itself"
            )
