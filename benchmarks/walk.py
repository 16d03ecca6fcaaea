"""What a reader has to open to follow one value through a command: `python -m sku_vllm.benchmarks.walk WALK` records it on the lab.

Open it to follow another value; docs/architecture.md shows the lists, and walk_recorder.py makes them.
"""

import json
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import click

from sku_vllm.benchmarks.walk_recorder import Step, Value, counts, listing, record_walk

SCALE = 0.8125  # a number that no other setting has
ROWS = 6  # of either set: what all of them go through, one goes through


def follow(command: list[str], value: Value) -> list[Step]:
    """The walk of a value through `sku COMMAND…`, run in this process; what it prints goes to stderr."""
    from sku_vllm.cli import sku

    with redirect_stdout(sys.stderr):
        return record_walk(lambda: sku.main(command, standalone_mode=False), value)


def row_of(place: Path, asked: Path) -> Value:
    """The first forget row of an evaluation: its prompt, its answer in the file and the model's, and the token ids of each."""
    from transformers import AutoTokenizer

    first, judged = (
        json.loads(file.read_text(encoding="utf-8").splitlines()[0]) for file in (place / "unseen.jsonl", asked / "rows.jsonl")
    )
    texts = (first["prompt"], first["response"], judged["response"])
    tokenizer = AutoTokenizer.from_pretrained(place / "lab/llama")
    return Value(texts=texts, tokens=tuple(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts))


def _prepare(place: Path) -> Path:
    """`place` with a lab, an adapter for its Llama and short sets; one step of training is enough, since only the way of a value counts."""
    lab, adapter = place / "lab", place / "adapter"
    if not lab.is_dir():
        _sku(["lab", "--output", str(lab)])
    if not adapter.is_dir():
        rows = [f"--{name}={lab / name / 'train.jsonl'}" for name in ("forget", "retain")]
        method = ["--method", "task-vector", "--steps", "1"]
        _sku(["train", "--model", str(lab / "llama"), *rows, *method, "--output", str(adapter)])
    for file in ("forget/unseen.jsonl", "retain/test.jsonl"):
        lines = (lab / file).read_text(encoding="utf-8").splitlines(keepends=True)
        (place / Path(file).name).write_text("".join(lines[:ROWS]), encoding="utf-8")
    return place


def _sku(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "sku_vllm.cli", *arguments], check=True, stdout=sys.stderr)


def _edited(place: Path, *more: str) -> list[str]:
    return ["--adapter", str(place / "adapter"), "--scale", str(SCALE), *more]


def _evaluate(place: Path) -> list[str]:
    """`sku eval` of the lab's Llama without an output: greedy answers, by transformers."""
    rows = ["--forget", f"unseen={place / 'unseen.jsonl'}", "--retain", str(place / "test.jsonl")]
    how = ["--judge", f"lexicon:{place / 'lab/lexicon.json'}", "--samples", "0", "--max-new-tokens", "32", "--dtype", "float32"]
    return ["eval", "--model", str(place / "lab/llama"), *_edited(place, *rows, *how)]


def row_walk(place: Path, output: Path) -> list[Step]:
    """A forget row, from its file to `rows.jsonl`, through `sku eval`."""
    command = _evaluate(place)
    if not (place / "asked").is_dir():
        _sku([*command, "--output", str(place / "asked")])
    return follow([*command, "--output", str(output / "evaluated")], row_of(place, place / "asked"))


def fuse_walk(place: Path, output: Path) -> list[Step]:
    """`--scale` of `sku fuse`, from the flag to the tensor it multiplies; followed alone and times the adapter's scaling."""
    config = json.loads((place / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    command = ["fuse", "--model", str(place / "lab/llama"), *_edited(place, "--output", str(output / "fused"))]
    return follow(command, Value(numbers=(SCALE, SCALE * config["lora_alpha"] / config["r"])))


def eval_walk(place: Path, output: Path) -> list[Step]:
    """`--scale` of `sku eval`, from the flag to PEFT's layers."""
    steps = follow([*_evaluate(place), "--output", str(output / "evaluated")], Value(numbers=(SCALE,)))
    last = max(number for number, step in enumerate(steps) if step.function == "set_scale")
    return steps[: last + 1]


WALKS = {"row": row_walk, "fuse": fuse_walk, "eval": eval_walk}


@click.command()
@click.argument("name", metavar="WALK", type=click.Choice(list(WALKS)))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a list.")
@click.option("--without", multiple=True, metavar="FILE[:FUNCTION]", help="Leave out a file's functions, or one of them; repeatable.")
@click.option("--place", type=click.Path(path_type=Path), help="Directory for the lab and an adapter, which are used again if it has them.")
def command(name: str, as_json: bool, without: tuple[str, ...], place: Path | None) -> None:
    """Record one WALK: `row`, a forget row through `sku eval`; `fuse`, `--scale` of `sku fuse`; `eval`, `--scale` of `sku eval`."""
    with tempfile.TemporaryDirectory() as temporary:
        walked = WALKS[name](_prepare(place or Path(temporary)), Path(temporary))
    steps = [step for step in walked if not {step.file, f"{step.file}:{step.function}"} & {*without}]
    if as_json:
        click.echo(json.dumps({**counts(steps), "steps": [[step.file, step.function] for step in steps]}))
        return
    click.echo(listing(steps))
    click.echo(", ".join(f"{count} {what}" for what, count in counts(steps).items()))


if __name__ == "__main__":
    command()
