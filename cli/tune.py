"""`sku tune`: choose the scale that does the least harm within limits on utility."""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from sku_vllm.cli.measuring import asking_options, data_options, model_options
from sku_vllm.cli.options import log, named_files, print_json, sku_command
from sku_vllm.errors import ConfigError, NegativeResult
from sku_vllm.evaluate.limits import SCALES
from sku_vllm.output import check_output


@sku_command("tune", no="no scale stays within the limits")
@model_options(adapter_required=True)
@data_options("A forget set to choose on; may be given several times.")
@click.option("--max-perplexity-ratio", default=1.01, help="Limit on perplexity over the base's.")
@click.option("--max-qa-drop", default=0.01, help="Limit on the loss of QA accuracy.")
@click.option("--max-over-refusal", default=0.01, help="Limit on refusals of retain prompts.")
@click.option("--max-gibberish", default=0.05, help="Limit on gibberish in the worst forget set, greedy or sampled.")
@click.option("--scales", multiple=True, metavar="S,S,…", help=f"Scales to measure.  [default: {','.join(map(str, SCALES))}]")
@click.option("--per-layer", is_flag=True, help="Then scale each third of the layers; writes the scaled adapter to OUTPUT/adapter.")
@click.option("--test-forget", multiple=True, metavar="NAME=FILE", help="Measure the choice once more on this set (with --test-retain).")
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
    if bool(options["test_forget"]) != bool(options["test_retain"]):
        raise ConfigError("--test-forget and --test-retain belong together; give both or neither")
    options["forget"] = named_files(options["forget"], "--forget")
    options["test_forget"] = named_files(options["test_forget"], "--test-forget")
    options["scales"] = _numbers(options["scales"])
    from sku_vllm.evaluate.tune_command import run_tune

    result = run_tune(options, log)
    if json_output:
        print_json(result)
    else:
        from sku_vllm.evaluate.curve import print_curve

        print_curve(result["base"], result["curve"], result["scale"])
    if not result["qualifies"]:
        raise NegativeResult("no scale stays within the limits; " + _nearest_miss(result["curve"]))
    if warning := fading(result["scale"], result["curve"]):
        log(warning)
    if not json_output:
        log(f"scale {result['scale']:g}" + (f"; {options['output']}: sku_tune.json, curve.svg" if options["output"] else ""))


def fading(scale: float, curve: Sequence[Mapping[str, Any]]) -> str | None:
    """What to know of a scale below the trained one: it was chosen without an attack, and resistance is lost before anything else is."""
    if scale >= 1:
        return None
    trained = next((point["excess"] for point in curve if point["scale"] == 1), {})
    why = f" (scale 1: {_broken(trained)})" if trained else ""
    return (
        f"warning: {scale:g} is below the trained scale{why}; prefilled openings and relearning bring more back there, which tune does not "
        f"measure: look with sku attack prefill relearn --scale {scale:g}, or train with a larger --preservation-weight"
    )


def _numbers(values: tuple[str, ...]) -> list[float] | None:
    try:
        return [float(text) for value in values for text in str(value).split(",") if text.strip()] or None
    except ValueError as error:
        raise ConfigError(f"--scales {','.join(map(str, values))}: {error}; write numbers, for instance --scales 0.5,1.0") from error


def _nearest_miss(curve: list[dict[str, Any]]) -> str:
    """The scale with the fewest limits broken, and which: what to loosen, or to retrain for."""
    best = min(curve, key=lambda point: len(point["excess"]))
    return f"nearest is {best['scale']:g} ({_broken(best['excess'])}); loosen --max-… or train with more preservation"


def _broken(excess: Mapping[str, Sequence[float]]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {found:.4g} > {limit:g}" for name, (found, limit) in excess.items())
