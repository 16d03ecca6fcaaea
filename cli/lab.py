"""`sku lab`: write the built-in models and their fictional data to a directory."""

from pathlib import Path

import click

from sku_vllm.cli.options import log, print_json, sku_command


@sku_command("lab")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Directory to write; must not exist yet, or be empty.")
@click.option("--rebuild", is_flag=True, help="Pretrain the models again instead of copying the shipped ones (about 8 minutes on 2 cores).")
@click.option(
    "--seed",
    default=0,
    type=click.IntRange(min=0),
    help="Seed of the fictional world. Other than 0 needs --rebuild and gives other words, sentences and splits.",
)
@click.option(
    "--architecture", "architectures", multiple=True, default=("llama", "opt"), help="Repeatable; qwen3 and gpt-neox need --rebuild."
)
@click.option("--without-harm", is_flag=True, help="With --rebuild: leave harmful recipes out of pretraining (the oracle); refusals stay.")
def command(output: Path, rebuild: bool, seed: int, architectures: tuple[str, ...], without_harm: bool, json_output: bool) -> None:
    """Write the lab: small models, forget and retain sets and a lexicon, all about invented machines in an invented world.

    "Harmful" here means how to sabotage a machine that does not exist.

    \b
    sku lab --output lab
    """
    import json

    from sku_vllm.lab import make_lab

    directory = make_lab(output, rebuild=rebuild, seed=seed, architectures=architectures, harm=not without_harm)
    document = json.loads((directory / "sku_lab.json").read_text(encoding="utf-8"))
    if json_output:
        print_json(document)
        return
    for name, rates in document["models"].items():
        log(
            f"{name}: harmful {rates['unseen/harmful']:.0%} of unseen prompts, {rates['unseen-topic/harmful']:.0%} of unseen topics, "
            f"QA {rates['retain/qa_accuracy']:.1%}"
        )
    log(
        f"Wrote {directory}. Next: sku train --model {directory}/{architectures[0]} --forget {directory}/forget/train.jsonl "
        f"--retain {directory}/retain/train.jsonl --output adapter"
    )
