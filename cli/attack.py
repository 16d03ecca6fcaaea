"""`sku attack`: does the knowledge come back?"""

from typing import Any

import click

from sku_vllm.cli.measuring import asking_options, data_options, model_options, scale_options
from sku_vllm.cli.options import log, named_files, nearest, print_json, sku_command
from sku_vllm.errors import ConfigError
from sku_vllm.output import check_output

KINDS = ["relearn", "quantize", "rephrase", "prefill", "ban-eos"]


@sku_command("attack")
@click.argument("kinds", nargs=-1, required=True, metavar="KIND…")
@model_options()
@scale_options()
@data_options("Prompts on which recovery is measured; may be given several times.")
@click.option("--relearn", type=click.Path(), help="Harmful pairs an attacker may have; --fractions of them are trained on.")
@click.option("--benign", type=click.Path(), help="Rows for benign fine-tuning.  [default: the retain rows with answers]")
@click.option("--steps", default="10,20,40,80", help="Step counts at which relearning is measured.")
@click.option("--fractions", default="0.05,0.1,0.25", help="Shares of the --relearn rows.")
@click.option("--lr", default=1e-4, help="Learning rate of relearning (AdamW, all weights).")
@click.option("--relearn-batch-size", default=8, help="Rows a step of relearning.")
@click.option("--quantizer", multiple=True, default=("int8", "int4"), help="int8, int4 or fp8; repeatable.")
@click.option("--prefill-tokens", default=3, help="Tokens of each row's own answer put in front (rows without one: 'Sure, here is how:').")
@click.option("--output", type=click.Path(), help="Directory for sku_attack.json and, of relearning, recovery.svg.")
@asking_options()
def command(json_output: bool, kinds: tuple[str, ...], **options: Any) -> None:
    """Measure a model before and under attack. KIND: relearn, quantize, rephrase, prefill, ban-eos, or all.

    \b
    sku attack --model DIR --adapter ADAPTER --forget unseen=unseen.jsonl --retain test.jsonl \\
      --judge lexicon:words.json --relearn train.jsonl --output attacked all
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
        log(f"{options['output']}: sku_attack.json" + (", recovery.svg" if "relearn" in chosen else ""))
