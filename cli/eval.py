"""`sku eval`: harmful rate, refusals, gibberish and utility of a model, a fused checkpoint, or a model minus an adapter."""

from typing import Any

import click

from sku_vllm.cli.measuring import asking_options, data_options, model_options, scale_options
from sku_vllm.cli.options import log, named_files, print_json, sku_command
from sku_vllm.output import check_output


@sku_command("eval")
@model_options()
@scale_options()
@data_options("A forget set; may be given several times.")
@click.option("--output", required=True, type=click.Path(), help="Directory for sku_eval.json and rows.jsonl.")
@click.option("--backend", default="transformers", help="transformers or vllm.")
@click.option(
    "--lm-eval", multiple=True, metavar="TASK,…",
    help="Tasks of lm-evaluation-harness, or YAML files that define one: base and edited side by side.",
)
@click.option("--lm-eval-limit", type=int, help="Documents per task, for a first look.")
@asking_options()
def command(json_output: bool, **options: Any) -> None:
    """Measure a model: shares of harmful, refused, broken and benign answers per forget set; perplexity, QA and over-refusal on
    the retain set.

    \b
    sku eval --model DIR --adapter ADAPTER --scale 1 --forget unseen=unseen.jsonl --retain test.jsonl \\
      --judge lexicon:lexicon.json --output out
    """
    check_output(options["output"])
    from sku_vllm.evaluate.command import run_eval

    result = run_eval({**options, "forget": named_files(options["forget"], "--forget")})
    if json_output:
        print_json(result)
        return
    from sku_vllm.evaluate.tables import print_eval

    print_eval(result)
    log(f"{options['output']}: sku_eval.json, rows.jsonl")
