"""`sku distill`: distil an unlearned model into a damaged copy of itself. What a flag means is in `distill/distill_config.py`."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sku_vllm.cli.options import log, print_json, sku_command
from sku_vllm.errors import DataError

if TYPE_CHECKING:
    from sku_vllm.distill import DistillReport, DistillRequest


@sku_command("distill")
@click.option(
    "--teacher", required=True, help="The unlearned model: a directory that sku fuse wrote, another model directory, or a hub id."
)
@click.option("--revision", help="Revision of a hub id.")
@click.option("--forget", required=True, help="Rows whose prompts the teacher answers; the answers in the file are never read.")
@click.option("--retain", required=True, help="Rows whose prompts the teacher answers.")
@click.option("--columns", multiple=True, metavar="FIELD=COLUMN", help="Other column names; repeat or separate by commas.")
@click.option(
    "--text", "texts", multiple=True, type=click.Path(dir_okay=False), help="UTF-8 text to keep the teacher's predictions of; repeatable."
)
@click.option(
    "--judge", metavar="SPEC", help="Leave out answers of the teacher that this judge calls harmful. Default: keep only refusals."
)
@click.option("--output", required=True, type=click.Path(), help="Directory to write; must not exist or be empty.")
@click.option("--alpha", type=float, default=0.6, help="Share of the teacher's weights that the student begins with; the rest is noise.")
@click.option("--layer-alphas", type=click.Path(dir_okay=False), help="JSON file {regular expression: alpha}: other shares by weight name.")
@click.option("--noise-std", type=float, default=0.02, help="Standard deviation of that noise.")
@click.option("--fresh", is_flag=True, help="Begin with fresh weights instead: no trace of the teacher's, and the most steps needed.")
@click.option("--steps", type=int, default=1200, help="Optimizer steps.")
@click.option("--batch-size", type=int, default=96, help="Rows a step, over all processes.")
@click.option("--lr", type=float, default=1e-3, help="Peak learning rate.")
@click.option("--samples", type=int, default=6000, help="Answers drawn from the teacher: half of them to prompts that it makes up.")
@click.option("--sample-tokens", type=int, default=48, help="Most tokens of a drawn answer.")
@click.option("--seed", type=int, default=0, help="Seed of all random numbers.")
@click.option("--dtype", default="auto", help="What both models compute in; auto is float32. The checkpoint keeps the teacher's dtype.")
@click.option("--template", help="'paper', a text with {prompt}, a Jinja chat template, or a file; else the tokenizer's own.")
@click.option("--max-length", type=int, default=512, help="Most tokens per row.")
@click.option("--tokens-per-pass", type=int, default=4096, help="Tokens in one forward pass: more is faster and needs more memory.")
@click.option("--pretraining-tokens", type=int, help="Tokens the model was pretrained on: also report compute as a share of that.")
@click.option("--save-seconds", type=float, default=60.0, help="Time between checkpoints.")
@click.option("--resume", is_flag=True, help="Continue what OUTPUT.partial/ holds.")
@click.option("--dry-run", is_flag=True, help="Print tokens, compute, memory and time; write nothing.")
def command(dry_run: bool, json_output: bool, **given: Any) -> None:
    """Distil an unlearned model into a damaged copy of itself, so that relearning finds nothing to bring back.

    \b
    sku distill --teacher safer --forget forget.jsonl --retain retain.jsonl --text text.txt --output erased
    """
    request = _request(given)
    first_rank = os.environ.get("RANK", "0") == "0"  # of several processes only the first prints
    if dry_run:
        from sku_vllm.distill.dry_run import estimate_distillation

        estimate = estimate_distillation(request)
        if first_rank:
            print_json(estimate.to_json()) if json_output else log(estimate.text())
        return

    from sku_vllm.distill import distill_checkpoint

    with _bar(first_rank) as progress:
        report = distill_checkpoint(request, progress)
    if not first_rank:
        return
    if json_output:
        print_json(report.to_json())
    else:
        _say(report)


def _request(given: dict[str, Any]) -> "DistillRequest":
    """The request of these flags: those named as a field of DistillConfig go there, files are read, the rest are fields of the request."""
    from sku_vllm.data import Columns, read_rows
    from sku_vllm.distill import DistillConfig, DistillRequest
    from sku_vllm.fuse import read_layer_scales
    from sku_vllm.output import check_output

    if alphas := given["layer_alphas"]:
        given["layer_alphas"] = read_layer_scales(alphas, "--layer-alphas")
    else:
        del given["layer_alphas"]
    config = DistillConfig(**{field.name: given.pop(field.name) for field in dataclasses.fields(DistillConfig) if field.name in given})
    if not given["resume"]:
        check_output(given["output"])
    sets = ("forget", "retain")
    columns = Columns(given.pop("columns"), sets)
    rows: dict[str, Any] = {flag: read_rows(given.pop(flag), columns=columns.of(flag), safe=flag == "retain") for flag in sets}
    columns.check()
    return DistillRequest(**rows, text=[_text(file) for file in given.pop("texts")], config=config, **given)


def _text(file: str) -> str:
    """The content of a `--text` file. Raises DataError."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"--text {file}: {error.strerror}; name a UTF-8 text file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--text {file}: is not UTF-8 at byte {error.start}; convert it, for instance with iconv -t UTF-8") from error
    if not text.strip():
        raise DataError(f"--text {file}: is empty; leave it out")
    return text


def _say(report: "DistillReport") -> None:
    start = "fresh weights" if report.alpha is None else f"alpha {report.alpha:g}"
    share = "" if report.pretraining_share is None else f", {report.pretraining_share:.0%} of pretraining"
    log(
        f"{report.output}: {report.steps} steps from {start} in {report.seconds:.0f} s; KL to the teacher {report.first_loss:.3f} → "
        f"{report.loss:.3f} nats a token; compute of {report.compute:,} forward tokens{share}"
    )
    if left := sum(report.left_out.values()):
        log(
            f"{left} of the teacher's answers were not learned from: {', '.join(f'{n} {kind}' for kind, n in report.left_out.items() if n)}"
        )
    log(f"next: sku verify {report.output}; sku eval --model {report.output} …; sku attack --model {report.output} … relearn")


@contextmanager
def _bar(shown: bool) -> Iterator[Callable[[str, int, int, float | None], None]]:
    """A bar on a terminal; in a log a line for what begins and for every tenth of the steps."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(*Progress.get_default_columns(), console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task, said = bar.add_task("distil", total=None), ("", 0)

        def tell(what: str, done: int, total: int, loss: float | None) -> None:
            nonlocal said
            tail = "" if loss is None else f", KL {loss:.3f}"
            bar.update(task, completed=done, total=total, description=f"{what}{tail}")
            if shown and not console.is_terminal and done and said != (what, done * 10 // total):
                said = what, done * 10 // total
                log(f"{what}: {done} of {total}{tail}")

        yield tell
