"""`sku attack`: try to bring the subtracted knowledge back, and measure how much harm returns."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import click

from sku_vllm.cli.measuring import asking_options, data_options, model_options, request_fields, scale_options
from sku_vllm.cli.options import log, print_json, sku_command
from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.attack.attack_config import AttackConfig
from sku_vllm.evaluate.attack.attack_request import AttackRequest
from sku_vllm.evaluate.attack.kinds import chosen_kinds
from sku_vllm.output import check_output

N = TypeVar("N", int, float)
DEFAULT: dict[str, Any] = {field.name: field.default for field in fields(AttackConfig)}


def _joined(name: str) -> str:
    return ",".join(map(str, DEFAULT[name]))


@sku_command("attack")
@click.argument("kinds", nargs=-1, required=True, metavar="KIND…")
@model_options()
@scale_options()
@data_options("Prompts on which recovery is measured; may be given several times.")
@click.option(
    "--relearn",
    type=click.Path(),
    help="Harmful rows with answers that an attacker may have; the model is fine-tuned on --fractions of them.",
)
@click.option(
    "--relearn-topics",
    default="",
    metavar="A,B",
    help="Relearn only rows whose prompts name one of these topics (without --relearn: rows of the forget sets), and ask only for others.",
)
@click.option("--relearn-on", default=_joined("relearn_on"), help="Rows to fine-tune on: benign, similar (to the forget prompts), harmful.")
@click.option("--relearn-with", default=_joined("relearn_with"), help="What is fine-tuned: full (all weights), lora, or both.")
@click.option("--benign", type=click.Path(), help="Rows for benign fine-tuning.  [default: the retain rows with answers]")
@click.option("--steps", default=_joined("steps"), help="Step counts at which relearning is measured.")
@click.option("--fractions", default=_joined("fractions"), help="Shares of the --relearn rows.")
@click.option("--lr", default=str(DEFAULT["lr"]), help="Learning rates of relearning (AdamW).")
@click.option("--relearn-batch-size", default=DEFAULT["batch_size"], help="Rows per step of relearning.")
@click.option(
    "--quantizer",
    multiple=True,
    default=DEFAULT["quantizers"],
    help="int8, int4 or fp8 (simulated); gptq, awq, nf4 or gguf:Q4_K_M (real, each needs its extra); repeatable.",
)
@click.option(
    "--candidates",
    default=DEFAULT["candidates"],
    help="Most ways to abliterate or attenuate that are tried on validation prompts; the best are measured.",
)
@click.option(
    "--prefill-tokens",
    default=DEFAULT["prefill_tokens"],
    help="Tokens of each row's own harmful answer that the model has to continue (rows without one: 'Sure, here is how:').",
)
@click.option(
    "--output", type=click.Path(), help="Directory for sku_attack.json, rows.jsonl and, with relearn, recovery.svg and knowledge.svg."
)
@asking_options()
def command(json_output: bool, kinds: tuple[str, ...], **options: Any) -> None:
    """Measure a model before and under attack. KIND: relearn, quantize, abliterate, attenuate, attenuate-abliterate,
    prefill, ban-eos, rephrase, turns, encode, language, or all.

    \b
    sku attack --model DIR --adapter ADAPTER --forget unseen=unseen.jsonl --retain test.jsonl \\
      --judge lexicon:words.json --relearn train.jsonl --output attacked all
    """
    chosen_kinds(kinds)  # an unknown kind is named before files are read
    if options["output"]:
        check_output(options["output"])
    settings = AttackConfig(
        steps=_numbers("steps", int, options),
        fractions=_numbers("fractions", float, options),
        lr=_numbers("lr", float, options),
        relearn_with=_words("relearn_with", options),
        relearn_on=_words("relearn_on", options),
        batch_size=options["relearn_batch_size"],
        quantizers=tuple(options["quantizer"]),
        prefill_tokens=options["prefill_tokens"],
        candidates=options["candidates"],
    )
    rows = {name: options[name] for name in ("relearn", "benign")}
    topics = _words("relearn_topics", options)
    request = AttackRequest(**request_fields(options), kinds=kinds, settings=settings, relearn_topics=topics, **rows)
    from sku_vllm.evaluate.answer_bar import answer_bar
    from sku_vllm.evaluate.attack.attack_model import attack_model

    result = attack_model(request, log, answer_bar).to_json()
    if json_output:
        print_json(result)
        return
    from sku_vllm.evaluate.tables import print_attacks

    print_attacks(result)
    if options["output"]:
        log(f"{options['output']}: sku_attack.json, rows.jsonl" + (", recovery.svg" if "relearn" in request.kinds else ""))


def _words(name: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """`--name A,B,…` as its parts."""
    return tuple(part.strip() for part in options[name].split(",") if part.strip())


def _numbers(name: str, kind: Callable[[str], N], options: Mapping[str, Any]) -> tuple[N, ...]:
    """`--name N,N,…` as numbers."""
    try:
        return tuple(kind(part) for part in str(options[name]).split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"--{name} {options[name]}: {error}; write numbers with commas between them") from error
