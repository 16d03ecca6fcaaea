"""`sku attack`: does the knowledge come back?"""

from typing import Any

import click

from sku_vllm.cli.options import log, named_files, nearest, print_json, sku_command
from sku_vllm.errors import ConfigError
from sku_vllm.output import check_output

KINDS = ["relearn", "quantize", "rephrase", "prefill", "ban-eos"]


@sku_command("attack")
@click.argument("kinds", nargs=-1, required=True, metavar="KIND…")
@click.option("--model", required=True, help="Model directory or hub id.")
@click.option("--revision", help="Revision of a hub id.")
@click.option("--adapter", type=click.Path(), help="Adapter directory; attacks model − scale·delta.")
@click.option("--scale", type=float, help="Strength of negation (with --adapter; 1.0 unless given).")
@click.option("--base", help="The unedited model, for the perplexity ratio of a fused checkpoint.")
@click.option("--forget", multiple=True, required=True, metavar="NAME=FILE", help="Prompts on which recovery is measured.")
@click.option("--retain", required=True, type=click.Path(), help="The retain set.")
@click.option("--judge", multiple=True, required=True, metavar="SPEC", help="lexicon:FILE, hf:MODEL, openai:URL#MODEL, all:A,B.")
@click.option("--relearn", type=click.Path(), help="Harmful pairs an attacker may have; --fractions of them are trained on.")
@click.option("--benign", type=click.Path(), help="Rows for benign fine-tuning.  [default: the retain rows with answers]")
@click.option("--steps", default="10,20,40", help="Step counts at which relearning is measured.")
@click.option("--fractions", default="0.05,0.1,0.25", help="Shares of the --relearn rows.")
@click.option("--lr", default=1e-4, help="Learning rate of relearning (AdamW, all weights).")
@click.option("--relearn-batch-size", default=8)
@click.option("--quantizer", multiple=True, default=("int8", "int4"), help="int8, int4 or fp8; repeatable.")
@click.option("--prefill-tokens", default=3, help="Tokens of each row's own answer put in front (rows without one: 'Sure, here is how:').")
@click.option("--output", type=click.Path(), help="Directory for sku_attack.json.")
@click.option("--columns", multiple=True, metavar="FIELD=COLUMN", help="Column names of CSV or Parquet rows.")
@click.option("--samples", default=4, help="Sampled answers per forget prompt, beside the greedy one.")
@click.option("--temperature", default=1.0, help="Of the sampled answers.")
@click.option("--max-new-tokens", default=128)
@click.option("--seed", default=0)
@click.option("--batch-size", default=256, help="Answers decoded together.")
@click.option("--dtype", default="auto", help="auto, float32, bfloat16, float16.")
@click.option("--template", help="Prompt template with {prompt}, instead of the tokenizer's own.")
@click.option("--any-base", is_flag=True, help="Take an adapter that was made for another base.")
@click.option("--as-is", is_flag=True, help="Take an adapter that is already negated.")
def command(json_output: bool, kinds: tuple[str, ...], **options: Any) -> None:
    """Measure a model before and under attack. KIND: relearn, quantize, rephrase, prefill, ban-eos, or all.

    \b
    sku attack --model DIR --adapter A --forget unseen=unseen.jsonl --retain test.jsonl --judge lexicon:words.json all --relearn train.jsonl
    """
    chosen = KINDS if "all" in kinds else list(dict.fromkeys(kinds))
    for kind in chosen:
        if kind not in KINDS:
            raise ConfigError(f"attack {kind}: unknown kind{nearest(kind, KINDS)}")
    if options["output"]:
        check_output(options["output"])
    options["forget"] = named_files(options["forget"], "--forget")
    for name, kind in (("steps", int), ("fractions", float)):
        try:
            options[name] = tuple(kind(part) for part in str(options[name]).split(",") if part.strip())
        except ValueError as error:
            raise ConfigError(f"--{name} {options[name]}: {error}; write numbers with commas between them") from error
    from sku_vllm.evaluate.attack_command import run_attack

    result = run_attack(chosen, options, log)
    if json_output:
        print_json(result)
        return
    from sku_vllm.evaluate.tables import print_attacks

    print_attacks(result)
    if options["output"]:
        log(f"{options['output']}: sku_attack.json")
