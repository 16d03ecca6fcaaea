"""The command line options that eval, tune and attack share, and their conversion to the fields of `MeasureRequest`."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import click

from sku_vllm.cli.options import named_files
from sku_vllm.cli.tuned import read_choice, tuned_option
from sku_vllm.evaluate.eval_config import BACKENDS, EvalConfig
from sku_vllm.evaluate.limits import Limits
from sku_vllm.judges import judge_specs, with_options
from sku_vllm.model_spec import DTYPES, ModelSpec

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def model_options(*, adapter_required: bool = False) -> Decorator:
    """`--model --revision --adapter --dtype --any-base --as-is`."""
    return _all(
        click.option("--model", required=True, help="Model directory or hub id."),
        click.option("--revision", help="Revision of a hub id."),
        click.option(
            "--adapter", required=adapter_required, type=click.Path(), help="Adapter directory; the model measured is model − scale·delta."
        ),
        click.option("--dtype", default=ModelSpec("").dtype, help=f"{', '.join(DTYPES[:4])}; auto computes in what is fastest here."),
        click.option("--any-base", is_flag=True, help="Take an adapter that was made for another base."),
        click.option("--as-is", is_flag=True, help="Take an adapter that is already negated: subtracting it puts the harm back."),
    )


def scale_options() -> Decorator:
    """`--scale --tuned --base`: for one edited model, not a search over scales."""
    return _all(
        click.option("--scale", type=float, help="Strength of negation (with --adapter; 1.0 unless given)."),
        tuned_option(),
        click.option("--base", help="The unedited model, for the perplexity ratio of a fused checkpoint."),
    )


def data_options(forget: str) -> Decorator:
    """`--forget --retain --border --judge --columns`; `forget` says what the forget sets are for."""
    return _all(
        click.option("--forget", multiple=True, required=True, metavar="NAME=FILE", help=forget),
        click.option("--retain", required=True, type=click.Path(), help="The retain set."),
        click.option(
            "--border",
            multiple=True,
            metavar="NAME=FILE",
            help="Benign prompts in the style of the forget set: how many are refused; may be given several times.",
        ),
        click.option("--judge", multiple=True, required=True, metavar="SPEC", help=f"{', '.join(judge_specs())}."),
        *judge_server_options(),
        click.option(
            "--columns",
            multiple=True,
            metavar="[SET:]FIELD=COLUMN",
            help="Other column names, for all files (prompt=question) or one (unseen:prompt=goal, retain:response=text).",
        ),
    )


def judge_server_options() -> tuple[Decorator, ...]:
    """`--judge-concurrency --judge-timeout`: how an `openai:` judge is asked."""
    return (
        click.option("--judge-concurrency", type=click.IntRange(1), help="Answers that an openai: judge is asked about at a time; 8."),
        click.option("--judge-timeout", type=float, help="Seconds to wait for a reply of an openai: judge; 60."),
    )


def asking_options() -> Decorator:
    """The fields of EvalConfig as options, --backend --tensor-parallel-size --quantization and --resume."""
    asked = EvalConfig()
    return _all(
        click.option("--samples", default=asked.samples, help="Sampled answers per forget prompt, beside the greedy one."),
        click.option("--temperature", default=asked.temperature, help="Of the sampled answers."),
        click.option("--max-new-tokens", default=asked.max_new_tokens, help="Longest answer."),
        click.option("--seed", default=asked.seed, help="Of the sampled answers."),
        click.option("--batch-size", default=asked.batch_size, help="Most answers decoded together."),
        click.option(
            "--batch-tokens",
            type=int,
            help="Most padded tokens of a batch, prompts and answers.  [default: 16384 on a CPU, 131072 on a GPU]",
        ),
        click.option("--backend", default="transformers", help=f"{' or '.join(BACKENDS)}."),
        click.option("--tensor-parallel-size", default=1, help="GPUs that --backend vllm spreads the model over."),
        click.option(
            "--quantization", help="With --backend vllm: how it quantises the weights as it serves them, such as fp8.", metavar="NAME"
        ),
        click.option("--template", help="Prompt template with {prompt}, instead of the tokenizer's own."),
        click.option("--on-long", default="skip", help="skip or error: what to do about a prompt that fills the model's context."),
        click.option("--resume", is_flag=True, help="Continue an interrupted run of the same inputs from OUTPUT.partial/."),
    )


def limit_options() -> Decorator:
    """The fields of Limits as options `--max-…`."""
    limits = Limits()
    return _all(
        click.option("--max-perplexity-ratio", default=limits.perplexity_ratio, help="Limit on perplexity over the base's."),
        click.option("--max-qa-drop", default=limits.qa_drop, help="Limit on the loss of QA accuracy."),
        click.option("--max-over-refusal", default=limits.over_refusal, help="Limit on refusals of retain prompts beyond the base's."),
        click.option(
            "--max-ended-drop", default=limits.ended_drop, help="Limit on the loss of retain answers that end before --max-new-tokens."
        ),
        click.option(
            "--max-gibberish",
            default=limits.gibberish,
            help="Limit on gibberish in the worst forget set, and on what is added on the retain set.",
        ),
        click.option(
            "--max-harmful",
            type=float,
            help="Limit on harmful answers in the worst forget set, greedy or sampled.  [default: clearly less harm than the base's]",
        ),
        click.option("--max-border-refusal", type=float, help="Limit on refusals in the worst border set beyond the base's."),
    )


def request_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of MeasureRequest, by name, from the values of these options.

    Raises:
        ConfigError: options that contradict each other, or an impossible value.
    """
    adapter, scale = options["adapter"], options.get("scale")
    if options.get("tuned"):
        choice = read_choice(options["tuned"], {"--adapter": adapter, "--scale": scale})
        adapter, scale = choice.adapter, choice.scale
    edit = {name: options[name] for name in ("model", "revision", "dtype", "any_base", "as_is")}
    return {
        "model": ModelSpec(**edit, adapter=adapter, scale=scale, base=options.get("base")),
        "forget": named_files(options["forget"], "--forget"),
        "border": named_files(options["border"], "--border"),
        "config": EvalConfig(**{field.name: options[field.name] for field in fields(EvalConfig)}),
        "judge": [with_options(spec, options["judge_concurrency"], options["judge_timeout"]) for spec in options["judge"]],
        **{name: options[name] for name in ("retain", "columns", "output", "resume", "on_long")},
        **{name: options[name] for name in ("backend", "tensor_parallel_size", "quantization")},
    }


def _all(*options: Decorator) -> Decorator:
    """Combine options into one decorator; `--help` lists them in the order given."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
