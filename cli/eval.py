"""`sku eval`: harmful rate, refusals, gibberish and utility of a model, a fused checkpoint, or a model minus an adapter."""

from typing import Any

import click

from sku_vllm.cli.options import log, named_files, print_json, sku_command
from sku_vllm.output import check_output


@sku_command("eval")
@click.option("--model", required=True, help="Model directory or hub id.")
@click.option("--revision", help="Revision of a hub id.")
@click.option("--adapter", type=click.Path(), help="Adapter directory; measures model − scale·delta.")
@click.option("--scale", type=float, help="Strength of negation (with --adapter; 1.0 unless given).")
@click.option("--base", help="The unedited model, for the perplexity ratio of a fused checkpoint.")
@click.option("--forget", multiple=True, required=True, metavar="NAME=FILE", help="A forget set; may be given several times.")
@click.option("--retain", required=True, type=click.Path(), help="The retain set.")
@click.option("--judge", multiple=True, required=True, metavar="SPEC", help="lexicon:FILE, refusal, hf:MODEL, openai:URL#MODEL, all:A,B.")
@click.option("--output", required=True, type=click.Path(), help="Directory for sku_eval.json and rows.jsonl.")
@click.option("--columns", multiple=True, metavar="FIELD=COLUMN", help="Column names of CSV or Parquet rows, for instance prompt=question.")
@click.option("--samples", default=4, help="Sampled answers per forget prompt, beside the greedy one.")
@click.option("--temperature", default=1.0, help="Of the sampled answers.")
@click.option("--max-new-tokens", default=128)
@click.option("--seed", default=0)
@click.option("--batch-size", default=256, help="Answers decoded together.")
@click.option("--dtype", default="auto", help="auto, float32, bfloat16, float16.")
@click.option("--backend", default="transformers", help="transformers or vllm.")
@click.option("--template", help="Prompt template with {prompt}, instead of the tokenizer's own.")
@click.option("--lm-eval", multiple=True, metavar="TASK,…", help="Tasks of lm-evaluation-harness, or YAML files that define one: base and edited side by side.")
@click.option("--lm-eval-limit", type=int, help="Documents per task, for a first look.")
@click.option("--any-base", is_flag=True, help="Take an adapter that was made for another base.")
@click.option("--as-is", is_flag=True, help="Take a negated adapter (its harm is subtracted twice over: know why).")
@click.option("--resume", is_flag=True, help="Continue an interrupted run of the same inputs from OUTPUT.partial/.")
def command(json_output: bool, **options: Any) -> None:
    """Measure a model: shares of harmful, refused, broken and benign answers per forget set; perplexity, QA and over-refusal on the retain set.

    \b
    sku eval --model DIR --adapter ADAPTER --scale 1 --forget unseen=unseen.jsonl --retain test.jsonl --judge lexicon:lexicon.json --output out
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
