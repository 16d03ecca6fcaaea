"""`sku compare A B`: compare two evaluations on the same prompts, with paired statistics."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sku_vllm.cli.options import named_files, print_json, sku_command
from sku_vllm.errors import ConfigError

if TYPE_CHECKING:
    from sku_vllm.evaluate.compare import Comparison


@sku_command("compare")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--forget", multiple=True, metavar="NAME=FILE", help="Prompts to send when A and B are arms (URL#MODEL) of a running server.")
@click.option("--judge", default=None, help="SPEC that labels the arms' answers.")
@click.option("--samples", default=1, type=int, help="Answers per prompt from an arm; more than one are sampled at temperature 1.")
@click.option("--max-new-tokens", default=128, type=int, help="Longest answer of an arm.")
@click.option(
    "--output", default=None, type=click.Path(), help="Directory to create: sku_compare.json and differ.jsonl (both answers, mode 0600)."
)
@click.option("--show", default=10, type=int, help="Differing prompts to print.")
@click.option("--seed", default=0, type=int, help="Seed of sampled answers of an arm.")
@click.option("--any-judge", is_flag=True, help="Compare labels of different judges, with a warning.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted comparison of two arms; what they said is in OUTPUT.partial/.")
@click.option("--judge-concurrency", type=click.IntRange(1), help="Answers an openai: judge is asked about at a time.")
@click.option("--judge-timeout", type=float, help="Seconds to wait for an openai: judge.")
def command(
    a: str,
    b: str,
    forget: tuple[str, ...],
    judge: str | None,
    samples: int,
    max_new_tokens: int,
    output: str | None,
    show: int,
    seed: int,
    any_judge: bool,
    resume: bool,
    judge_concurrency: int | None,
    judge_timeout: float | None,
    json_output: bool,
) -> None:
    """Compare two evaluations (directories of sku eval, or judged JSONL files), or two arms of a running server, answer by answer.

    Differences are B minus A. With one answer per prompt the p-value is McNemar's exact test, with several an exact sign-flip test
    clustered by prompt; intervals are score intervals, clustered by prompt. Answers stay in differ.jsonl; only prompts are printed.

    \b
    sku compare measured/base measured/safer --output compared
    sku compare http://host:8000#original http://host:8000#negated \\
      --forget unseen=unseen.jsonl --judge lexicon:words.json
    """
    from sku_vllm.evaluate.compare import compare
    from sku_vllm.output import check_output, output_directory

    arms = [address.startswith(("http://", "https://")) for address in (a, b)]
    if resume and not (any(arms) and output):
        raise ConfigError("--resume: continues a comparison of two arms into --output DIRECTORY; leave it out for measured answers")
    settings: dict[str, Any] = {"a": a, "b": b, "seed": seed}
    if not any(arms):
        if output:
            check_output(output)
        found = compare(a, b, any_judge=any_judge)
        if output:
            with output_directory(output, mode=0o700) as folder:
                _write(folder, found, settings)
    else:
        _check_arms(a, b, arms, forget, judge, samples, max_new_tokens)
        from sku_vllm.data import read_rows
        from sku_vllm.data.rows import rows_digest
        from sku_vllm.evaluate.answers import KEPT_ANSWERS
        from sku_vllm.evaluate.compare_arms import ArmsRequest, compare_arms
        from sku_vllm.evaluate.judging import KEPT_VERDICTS
        from sku_vllm.evaluate.resume import working_directory
        from sku_vllm.judges import with_options

        spec = with_options(str(judge), judge_concurrency, judge_timeout)
        rows = {name: read_rows(path) for name, path in named_files(forget, "--forget").items()}
        settings |= {"forget": list(forget), "judge": judge, "samples": samples, "max_new_tokens": max_new_tokens}
        leftovers = (KEPT_ANSWERS, KEPT_VERDICTS)
        asked, digest = settings | {"output": output}, rows_digest(*rows.values())
        with working_directory(asked, digest, resume=resume, leftovers=leftovers, mode=0o700) as kept:
            found = compare_arms(ArmsRequest(a, b, rows, spec, samples, max_new_tokens, seed), kept)
            if kept:
                _write(kept, found, settings)
    result = _public(found)
    if json_output:
        print_json(result)
    else:
        _show(result, show)


def _public(found: "Comparison") -> dict[str, Any]:
    """What is printed: all but the answers."""
    return {**found.to_json(), "differ": [{key: row[key] for key in ("set", "mode", "prompt", "a", "b")} for row in found.differ]}


def _write(folder: Path, found: "Comparison", settings: dict[str, Any]) -> None:
    """sku_compare.json, and differ.jsonl with the answers that were labelled differently."""
    import json

    from sku_vllm.output import record, write_text

    record(folder, "compare", {**_public(found), "differ": len(found.differ)}, settings)
    write_text(folder / "differ.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.differ), mode=0o600)


def _check_arms(a: str, b: str, arms: list[bool], forget: tuple[str, ...], judge: str | None, samples: int, max_new_tokens: int) -> None:
    from sku_vllm.client.url import http_url

    for address, arm in zip((a, b), arms, strict=True):
        if not arm or "#" not in address or not http_url(address):
            raise ConfigError(f"{address}: expected an arm as URL#MODEL, such as http://127.0.0.1:8000#negated, on both sides")
    if not forget or not judge:
        raise ConfigError("comparing arms needs --forget NAME=FILE (what to ask) and --judge SPEC (who labels the answers)")
    if samples < 1 or max_new_tokens < 1:
        raise ConfigError("--samples and --max-new-tokens must be at least 1")


def _show(result: dict[str, Any], show: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    title = f"B minus A over the same prompts, in %\nA = {result['a']}\nB = {result['b']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=0)  # fits 80 columns
    for name in ("set", "mode", "label", "A", "B", "B − A (95 %)", "only A/B", "p"):
        text = name in ("set", "mode", "label")
        table.add_column(name, justify="left" if text else "right", no_wrap=name != "set", overflow="fold")
    for name, modes in result["sets"].items():
        for mode, labels in modes.items():
            for label, d in labels.items():
                rates = [f"{100 * d[rate]:.1f}" for rate in ("rate_a", "rate_b")]
                gap = f"{100 * d['difference']:+.1f} ({100 * d['low']:+.0f} to {100 * d['high']:+.0f})"
                table.add_row(name, mode, label, *rates, gap, f"{d['only_a']}/{d['only_b']}", f"{d['p_value']:.2g}")
    console.print(table)
    for row in result["differ"][:show]:
        console.print(f"{row['set']}/{row['mode']}: {row['a']} → {row['b']}: {row['prompt']}", markup=False, highlight=False)
    if len(result["differ"]) > show:
        console.print(f"… and {len(result['differ']) - show} more answers differ (--output keeps them all)")
    for warning in result["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    if result["unjudged"]:
        console.print(f"{result['unjudged']} answers were not decided by the judge and were left out", style="yellow")
    if result["unpaired"]:
        console.print(f"{result['unpaired']} answers had no partner and were left out", style="yellow")
