"""`sku bench eval`: the answers of `sku eval` against transformers' own `generate`, on the same prompts, model and dtype.

Both decode greedily, the stop tokens forbidden, so that either makes exactly as many tokens. transformers takes the prompts in the order of
the file, in left-padded batches of 16. Rounds alternate, and on a CPU the clock counts CPU seconds, since others share a machine's cores.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click

from sku_vllm.benchmarks.machine import machine
from sku_vllm.cli.options import log, print_json, sku_command
from sku_vllm.model_spec import DTYPES

BATCH = 16  # of transformers' generate
Ids = Sequence[Sequence[int]]


@sku_command("eval")
@click.option("--model", required=True, help="Model directory or hub id.")
@click.option("--prompts", required=True, type=click.Path(), help="Rows whose prompts are answered; FILE#SPLIT takes a part.")
@click.option("--count", default=140, help="Prompts taken, from the first.")
@click.option("--max-new-tokens", default=48, help="Tokens of every answer.")
@click.option("--samples", default=0, help="Sampled answers beside the greedy one; transformers samples as many.")
@click.option("--dtype", default="auto", help=f"{', '.join(DTYPES[:4])}; the same for both.")
@click.option("--rounds", default=3, help="Alternating rounds; the ratio is the median of theirs.")
@click.option("--output", type=click.Path(dir_okay=False), help="Markdown file for the results.")
def command(json_output: bool, output: str | None, **options: Any) -> None:
    """Tokens a second of both, and their ratio."""
    result = {"machine": machine(), **compare(**options)}
    if output:
        Path(output).write_text(markdown(result), encoding="utf-8")
    print_json(result) if json_output else click.echo(markdown(result))


def compare(model: str, prompts: str, count: int, max_new_tokens: int, samples: int, dtype: str, rounds: int) -> dict[str, Any]:
    """Seconds of every round for both, and the median of the rounds' ratios."""
    from sku_vllm.data import PromptTemplate, read_rows
    from sku_vllm.evaluate.transformers_backend import TransformersBackend
    from sku_vllm.model import load_model, load_tokenizer, settle_dtype
    from sku_vllm.model_spec import ModelSpec

    spec = settle_dtype(ModelSpec(model, dtype=dtype))
    loaded, template = load_model(spec), PromptTemplate.of(load_tokenizer(model))
    ids = [template.prompt_ids(row) for row in read_rows(prompts)[:count]]
    stops = list(template.stop_ids)
    backend = TransformersBackend(loaded)
    heat = [0.0] + [1.0] * samples

    def ours() -> int:
        answers = backend.generate(ids, heat, max_new_tokens=max_new_tokens, stop_ids=stops, ban_stop=True)
        return sum(len(answer.ids) for replies in answers for answer in replies)

    def theirs() -> int:
        return generate(loaded, ids, stops, max_new_tokens, samples)

    on_cpu = loaded.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    seconds: dict[str, list[float]] = {"sku": [], "transformers": []}
    for number in range(rounds):
        for name, run in (("sku", ours), ("transformers", theirs)):
            taken, tokens = timed(run, clock)
            assert tokens == len(ids) * len(heat) * max_new_tokens
            seconds[name].append(taken)
        log(f"round {number + 1} of {rounds}: " + ", ".join(f"{name} {values[-1]:.1f} s" for name, values in seconds.items()))
    return {
        "model": Path(model).name,
        "dtype": spec.computed_in,
        "prompts": len(ids),
        "prompt_tokens": sum(map(len, ids)),
        "longest_prompt": max(map(len, ids)),
        "answers": len(ids) * len(heat),
        "new_tokens": len(ids) * len(heat) * max_new_tokens,
        "clock": "CPU seconds" if on_cpu else "seconds",
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "ratio": median(theirs / ours for ours, theirs in zip(seconds["sku"], seconds["transformers"], strict=True)),
    }


def timed(run: Callable[[], int], clock: Callable[[], float]) -> tuple[float, int]:
    """Seconds that a call took by a clock, and what it returned."""
    begun = clock()
    result = run()
    return clock() - begun, result


def generate(model: Any, prompts: Ids, stops: Sequence[int], new: int, samples: int) -> int:
    """transformers' answers to all prompts in batches of 16: greedy ones, then sampled ones; the number of their tokens."""
    import torch

    made = 0
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        longest = max(map(len, batch))
        ids = torch.tensor([[stops[0]] * (longest - len(prompt)) + list(prompt) for prompt in batch], device=model.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch], device=model.device)
        common = {
            "attention_mask": mask,
            "max_new_tokens": new,
            "min_new_tokens": new,
            "eos_token_id": list(stops),
            "pad_token_id": stops[0],
        }
        made += (model.generate(ids, do_sample=False, **common).shape[1] - longest) * len(batch)
        if samples:
            drawn = model.generate(ids, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, num_return_sequences=samples, **common)
            made += (drawn.shape[1] - longest) * len(batch) * samples
    return made


def markdown(result: dict[str, Any]) -> str:
    """A table with a line for each of the two."""
    where, versions = result["machine"], result["machine"]["versions"]
    lines = [
        f"{result['model']} in {result['dtype']}: {result['prompts']} prompts ({result['prompt_tokens']} tokens, the longest "
        f"{result['longest_prompt']}), {result['answers']} answers, {result['new_tokens']} new tokens. "
        f"{where['cpu']}, {where['cores']} cores, "
        f"torch {versions['torch']}, transformers {versions['transformers']}, {where['date']}.",
        "",
        f"| | {result['clock']}, round by round | new tokens a second, median |",
        "|---|---|---|",
    ]
    names = {"sku": "`sku eval`", "transformers": f"transformers' `generate`, batches of {BATCH}"}
    for name, seconds in result["seconds"].items():
        rounds = ", ".join(f"{value:.1f}" for value in seconds)
        lines.append(f"| {names[name]} | {rounds} | {result['new_tokens'] / median(seconds):.0f} |")
    return "\n".join([*lines, "", f"Ratio: **{result['ratio']:.2f}**"]) + "\n"
