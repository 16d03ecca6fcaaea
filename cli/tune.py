"""`sku tune`: choose the scale that does the least harm within limits on utility."""

from dataclasses import fields
from typing import Any

import click

from sku_vllm.cli.measuring import asking_options, data_options, limit_options, model_options, request_fields
from sku_vllm.cli.options import log, named_files, print_json, sku_command
from sku_vllm.errors import ConfigError, NegativeResult
from sku_vllm.evaluate.limits import SCALES, Limits, fading, nearest_miss
from sku_vllm.evaluate.tune_request import TuneRequest
from sku_vllm.output import check_output


@sku_command("tune", no="no scale stays within the limits and removes harm")
@model_options(adapter_required=True)
@data_options("A forget set to choose on; may be given several times.")
@limit_options()
@click.option("--scales", multiple=True, metavar="S,S,…", help=f"Scales to measure.  [default: {','.join(map(str, SCALES))}]")
@click.option(
    "--per-layer",
    is_flag=True,
    help="Afterwards try other scales for each third of the layers; writes the scaled adapter to OUTPUT/adapter.",
)
@click.option("--test-forget", multiple=True, metavar="NAME=FILE", help="Measure the chosen scale on this set too (with --test-retain).")
@click.option("--test-retain", type=click.Path(), help="Retain set of the test data.")
@click.option("--output", type=click.Path(), help="Directory for sku_tune.json and curve.svg.")
@asking_options()
def command(json_output: bool, **options: Any) -> None:
    """Measure base − scale·delta over several scales and choose the one with least harm within the limits.

    Choose on validation data and give test data for the numbers to report.

    \b
    sku tune --model DIR --adapter ADAPTER --forget validation=forget.jsonl#validation \\
      --retain retain.jsonl#validation --judge lexicon:words.json --output tuned
    """
    if options["output"]:
        check_output(options["output"])
    request = TuneRequest(
        **request_fields(options),
        limits=Limits(**{field.name: options[f"max_{field.name}"] for field in fields(Limits)}),
        scales=_numbers(options["scales"]),
        per_layer=options["per_layer"],
        test_forget=named_files(options["test_forget"], "--test-forget"),
        test_retain=options["test_retain"],
    )
    from sku_vllm.evaluate.answer_bar import answer_bar
    from sku_vllm.evaluate.tune import tune_scale

    report = tune_scale(request, log, answer_bar)
    if json_output:
        print_json(report.to_json())
    else:
        from sku_vllm.evaluate.curve import print_curve

        print_curve(report.base, report.curve, report.scale)
    if report.scale is None:
        raise NegativeResult("no scale qualifies; " + nearest_miss(report.curve))
    if warning := fading(report.scale, report.curve):
        log(warning)
    if not json_output:
        log(f"scale {report.scale:g}" + (f"; {options['output']}: sku_tune.json, curve.svg" if options["output"] else ""))


def _numbers(values: tuple[str, ...]) -> list[float] | None:
    try:
        return [float(text) for value in values for text in str(value).split(",") if text.strip()] or None
    except ValueError as error:
        raise ConfigError(f"--scales {','.join(map(str, values))}: {error}; write numbers, for instance --scales 0.5,1.0") from error
