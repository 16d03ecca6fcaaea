"""Options of the commands that put questions to a model: eval, tune and attack."""

from collections.abc import Callable

import click

Decorator = Callable[[Callable], Callable]


def model_options(*, adapter_required: bool = False) -> Decorator:
    """`--model --revision --adapter --dtype --any-base --as-is`."""
    return _all(
        click.option("--model", required=True, help="Model directory or hub id."),
        click.option("--revision", help="Revision of a hub id."),
        click.option("--adapter", required=adapter_required, type=click.Path(), help="Adapter directory; works on model − scale·delta."),
        click.option("--dtype", default="auto", help="auto, float32, bfloat16, float16."),
        click.option("--any-base", is_flag=True, help="Take an adapter that was made for another base."),
        click.option("--as-is", is_flag=True, help="Take an adapter that is already negated: subtracting it puts the harm back."),
    )


def scale_options() -> Decorator:
    """`--scale --base`: for one edited model, not a search over scales."""
    return _all(
        click.option("--scale", type=float, help="Strength of negation (with --adapter; 1.0 unless given)."),
        click.option("--base", help="The unedited model, for the perplexity ratio of a fused checkpoint."),
    )


def data_options(forget: str) -> Decorator:
    """`--forget --retain --judge --columns`; `forget` says what the forget sets are for."""
    return _all(
        click.option("--forget", multiple=True, required=True, metavar="NAME=FILE", help=forget),
        click.option("--retain", required=True, type=click.Path(), help="The retain set."),
        click.option(
            "--judge", multiple=True, required=True, metavar="SPEC", help="lexicon:FILE, refusal, hf:MODEL, openai:URL#MODEL, all:A,B.",
        ),
        click.option(
            "--columns", multiple=True, metavar="FIELD=COLUMN", help="Column names of CSV or Parquet rows, for instance prompt=question.",
        ),
    )


def asking_options() -> Decorator:
    """The fields of EvalConfig, and --resume for what they take long to measure."""
    return _all(
        click.option("--samples", default=4, help="Sampled answers per forget prompt, beside the greedy one."),
        click.option("--temperature", default=1.0, help="Of the sampled answers."),
        click.option("--max-new-tokens", default=128, help="Longest answer."),
        click.option("--seed", default=0, help="Of the sampled answers."),
        click.option("--batch-size", default=256, help="Answers decoded together."),
        click.option("--template", help="Prompt template with {prompt}, instead of the tokenizer's own."),
        click.option("--resume", is_flag=True, help="Continue an interrupted run of the same inputs from OUTPUT.partial/."),
    )


def _all(*options: Decorator) -> Decorator:
    """One decorator of several; `--help` lists them in the order given."""

    def decorate(function: Callable) -> Callable:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
