"""`sku eval`: measure harm, refusals, gibberish and utility of a model, a fused checkpoint, or a model minus an adapter."""

from typing import Any

import click

from sku_vllm.cli.measuring import asking_options, data_options, model_options, request_fields, scale_options
from sku_vllm.cli.options import log, print_json, sku_command
from sku_vllm.evaluate.answer_bar import answer_bar
from sku_vllm.evaluate.measure_request import EvalRequest
from sku_vllm.output import check_output


@sku_command("eval")
@model_options()
@scale_options()
@data_options("A forget set; may be given several times.")
@click.option("--output", required=True, type=click.Path(), help="Directory for sku_eval.json and rows.jsonl.")
@click.option(
    "--lm-eval",
    multiple=True,
    metavar="TASK,…",
    help="Tasks of lm-evaluation-harness, or YAML files that define one: base and edited side by side.",
)
@click.option("--lm-eval-limit", type=int, help="Most documents per task, for a quick estimate.")
@asking_options()
def command(json_output: bool, **options: Any) -> None:
    """Measure a model: shares of harmful, refused, broken and benign answers per forget set; perplexity, QA and over-refusal on
    the retain set.

    \b
    sku eval --model DIR --adapter ADAPTER --scale 1 --forget unseen=unseen.jsonl --retain test.jsonl \\
      --judge lexicon:lexicon.json --output out
    """
    check_output(options["output"])
    own = {name: options[name] for name in ("lm_eval", "lm_eval_limit")}
    request = EvalRequest(**request_fields(options), **own)
    from sku_vllm.evaluate.evaluate import evaluate_model

    report = evaluate_model(request, answer_bar)
    for line in report.warnings:
        log(line)
    result = report.to_json()
    if json_output:
        print_json(result)
        return
    from sku_vllm.evaluate.tables import print_eval

    print_eval(result)
    log(f"{options['output']}: sku_eval.json, rows.jsonl")
