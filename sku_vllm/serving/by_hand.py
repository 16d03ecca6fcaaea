"""A vLLM started by hand (`VLLM_PLUGINS=sku vllm serve …`): its arms are checked before its engine starts, as `sku serve` checks its own.

vLLM asks the plugin's endpoint part only once the engine runs, minutes later. Open this file to check more, or to see when it is checked.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any

from sku_vllm.errors import SkuError
from sku_vllm.serving.private_directory import PREFIX
from sku_vllm.serving.serve_config import VARIABLE, read_config

FLAGS = "vllm.engine.arg_utils"  # vLLM's module that turns flags into the engine's configuration, and that loads plugins before that


def wanted() -> bool:
    """Whether this process may become a server with arms that nobody has checked yet: not one of `sku serve`, nor a worker."""
    named = os.environ.get(VARIABLE)
    asked = named is not None or "sku" in os.environ.get("VLLM_PLUGINS", "").split(",")
    return asked and FLAGS in sys.modules and not Path(named or "").parent.name.startswith(PREFIX)


def check_before_engine() -> None:
    """Let vLLM's OpenAI server check the arms as soon as its flags are known, and end with one line and exit code 2 if it has to."""
    engine_args = sys.modules[FLAGS].EngineArgs
    inner = engine_args.create_engine_config
    if hasattr(inner, "sku"):
        return

    @functools.wraps(inner)
    def create_engine_config(self: Any, *arguments: Any, **options: Any) -> Any:
        made = inner(self, *arguments, **options)
        context = options.get("usage_context") or next(iter(arguments), None)
        if getattr(context, "value", None) == "OPENAI_API_SERVER":
            try:
                check(self, made.model_config)
            except SkuError as error:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
                raise SystemExit(error.exit_code) from None
        return made

    create_engine_config.sku = True  # type: ignore[attr-defined]
    engine_args.create_engine_config = create_engine_config


def check(args: Any, model_config: Any) -> None:
    """Check the configuration's arms against vLLM's `EngineArgs`. Where the server listens is not in them, and checked later.

    Raises:
        SkuError: names the file, the arm or the flag that has to change.
    """
    from sku_vllm.serving.initial_state import ranks_of_arms  # here, since every process of every vLLM imports this file
    from sku_vllm.serving.vllm_flags import check_adapters, check_names, check_rank

    config = read_config()
    check_names(args, config)
    check_adapters(args, config, model_config)
    check_rank(args, ranks_of_arms(config))
