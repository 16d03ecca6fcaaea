"""`sku judge`: label answers that are already in a file."""

import click

from sku_vllm.cli.options import log, print_json, sku_command


@sku_command("judge")
@click.option("--judge", multiple=True, required=True, metavar="SPEC", help="lexicon:FILE, refusal, hf:MODEL, openai:URL#MODEL, all:A,B.")
@click.option("--input", "source", required=True, type=click.Path(), help="Rows with prompt and response: JSONL, CSV or Parquet.")
@click.option("--output", required=True, type=click.Path(), help="The same rows with a label, as JSONL (readable by you only).")
@click.option("--columns", multiple=True, metavar="FIELD=COLUMN", help="Column names of CSV or Parquet rows, for instance response=answer.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run of the same input from OUTPUT.partial/.")
def command(json_output: bool, judge: tuple[str, ...], source: str, output: str, columns: tuple[str, ...], resume: bool) -> None:
    """Add "label" (harmful, refusal, gibberish or benign) to every row; with several judges also each one's "votes".

    \b
    sku judge --judge lexicon:words.json --input answers.jsonl --output verdicts.jsonl
    """
    from sku_vllm.evaluate.judge_file import judge_file

    result = judge_file(judge, source, output, columns=columns, resume=resume)
    if json_output:
        print_json(result)
        return
    from sku_vllm.evaluate.tables import print_labels

    print_labels(result)
    log(f"{output}: {result['n']} rows")
