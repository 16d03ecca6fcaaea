"""`sku judge`: label answers that are already in a file."""

import click

from sku_vllm.cli.options import log, print_json, sku_command
from sku_vllm.judges import judge_specs, with_options


@sku_command("judge")
@click.option("--judge", multiple=True, required=True, metavar="SPEC", help=f"{', '.join(judge_specs())}.")
@click.option("--judge-concurrency", type=click.IntRange(1), help="Answers that an openai: judge is asked about at a time; 8.")
@click.option("--judge-timeout", type=float, help="Seconds to wait for a reply of an openai: judge; 60.")
@click.option("--input", "source", required=True, type=click.Path(), help="Rows with answers: any form that train and eval read.")
@click.option("--output", required=True, type=click.Path(), help="The same rows with a label, as JSONL (readable by you only).")
@click.option("--columns", multiple=True, metavar="FIELD=COLUMN", help="Other column names, for instance response=text.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run of the same input from OUTPUT.partial/.")
def command(
    json_output: bool,
    judge: tuple[str, ...],
    judge_concurrency: int | None,
    judge_timeout: float | None,
    source: str,
    output: str,
    columns: tuple[str, ...],
    resume: bool,
) -> None:
    """Add "label" (harmful, refusal, gibberish or benign) to every row, in order and with all its columns, and "reason" where there is
    one; with several judges also each one's "votes". A column that has such a name already becomes given_NAME.

    \b
    sku judge --judge lexicon:words.json --input answers.jsonl --output verdicts.jsonl
    """
    from sku_vllm.evaluate.judge_file import judge_file

    specs = [with_options(spec, judge_concurrency, judge_timeout) for spec in judge]
    result = judge_file(specs, source, output, columns=columns, resume=resume)
    if json_output:
        print_json(result)
        return
    from sku_vllm.evaluate.tables import print_labels

    print_labels(result)
    log(f"{output}: {result['n']} rows")
