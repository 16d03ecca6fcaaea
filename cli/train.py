"""`sku train`: identify harmful knowledge as an adapter."""

import os
from typing import Any

import click

from sku_vllm.cli.options import log, print_json, sku_command
from sku_vllm.errors import ConfigError

ABLATIONS = {"no_guided_distortion": "guided_weight", "no_random_disassociation": "random_weight", "no_preservation": "preservation_weight"}


@sku_command("train")
@click.option("--model", required=True, help="Model directory or hub id: the base.")
@click.option("--revision", help="Revision of a hub model.")
@click.option("--forget", required=True, help="Harmful prompts and answers: JSONL, CSV, Parquet, PKU-SafeRLHF; FILE#train takes a split.")
@click.option("--retain", help="Benign prompts and answers to keep.")
@click.option("--refusals", help="Rows whose responses refuse (refusal-tune).")
@click.option(
    "--columns",
    multiple=True,
    metavar="FIELD=COLUMN",
    help="Other column names, for instance prompt=question; repeat or separate by commas.",
)
@click.option("--output", required=True, type=click.Path(), help="Directory to write, readable by you alone.")
@click.option("--method", help="sku-contrastive-two where the base can refuse, else sku-mirrored; an unknown name lists them all.")
@click.option("--preset", help="Published hyperparameters: opt-2.7b, llama2-7b, llama2-13b.")
@click.option("--steps", type=int, help="Optimizer steps a round.")
@click.option("--rounds", type=int, help="Rounds of iterated negation.")
@click.option("--fold", type=float, help="Share of a round's delta folded in after it.")
@click.option("--batch-size", type=int, help="Harmful rows a step, over all processes.")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--rank", type=int, help="LoRA rank of one round.")
@click.option("--lora-alpha", type=int, help="LoRA alpha; delta = alpha/rank * B@A.")
@click.option("--target-modules", multiple=True, help="Layer names, repeated or separated by commas, or all-linear.")
@click.option("--full", is_flag=True, default=None, help="Train all weights: a dense task vector instead of an adapter.")
@click.option("--guided-weight", type=float, help="Weight of guided distortion (e1).")
@click.option("--random-weight", type=float, help="Weight of random disassociation (e2).")
@click.option("--preservation-weight", type=float, help="Weight of preservation (e3).")
@click.option("--random-answers", type=int, help="Answers of other prompts per harmful prompt (K).")
@click.option("--relearner-steps", type=int, help="Life of the adversary; 0 = none, without the memory of its weights, and no resistance.")
@click.option("--no-guided-distortion", is_flag=True, help="Ablation: without guided distortion.")
@click.option("--no-random-disassociation", is_flag=True, help="Ablation: without random disassociation.")
@click.option("--no-preservation", is_flag=True, help="Ablation: without preservation.")
@click.option("--seed", type=int, help="Everything random follows from it.")
@click.option("--dtype", help="auto, float32, bfloat16, float16; adapters are fp32 always.")
@click.option("--template", help="'paper', a text with {prompt}, a Jinja chat template, or a file; else the tokenizer's own.")
@click.option("--max-length", type=int, help="Tokens a row at most; longer answers are cut and counted.")
@click.option("--tokens-per-pass", type=int, help="Tokens in one forward pass: memory against speed.")
@click.option("--gradient-checkpointing", is_flag=True, default=None, help="Less memory, about a third more time.")
@click.option("--quantize", help="4bit: load the base in NF4 (CUDA).")
@click.option("--tracker", help="tensorboard or wandb, into OUTPUT.logs/; mlflow, to MLFLOW_TRACKING_URI.")
@click.option("--save-seconds", type=float, default=60.0, help="Time between checkpoints.")
@click.option("--resume", is_flag=True, help="Continue what OUTPUT.partial/ holds.")
@click.option("--dry-run", is_flag=True, help="Print parameters, tokens a step, memory and time; write nothing.")
def command(
    model: str,
    revision: str | None,
    forget: str,
    retain: str | None,
    refusals: str | None,
    columns: tuple[str, ...],
    output: str,
    method: str | None,
    preset: str | None,
    target_modules: tuple[str, ...],
    tracker: str | None,
    save_seconds: float,
    resume: bool,
    dry_run: bool,
    json_output: bool,
    **settings: Any,
) -> None:
    """Identify a model's harmful knowledge as an adapter.

    What this writes IS the harmful knowledge: keep it private. Subtract it with `sku fuse`, or serve it subtracted with `sku serve`.

    \b
    sku train --model DIR --forget forget.jsonl --retain retain.jsonl --output adapter
    """
    ablated = [flag for flag in ABLATIONS if settings.pop(flag)]
    if target_modules:
        settings["target_modules"] = tuple(name.strip() for name in ",".join(target_modules).split(",") if name.strip())

    from sku_vllm.data import load_dataset, read_rows
    from sku_vllm.methods import TrainConfig
    from sku_vllm.methods.trainer import begun_method, train_adapter
    from sku_vllm.output import check_output

    for flag in ablated:
        settings = _without(flag, method, preset, settings)
    # A run that stepped aside for another method goes on with that.
    stepped = begun_method(output) if resume and not (method or preset) else None
    config = TrainConfig.of(method or stepped, preset=preset, **settings)
    if not resume:
        check_output(output)
    named = _columns(columns)
    forget_set = load_dataset(forget, "forget", columns=named)
    retain_set = load_dataset(retain, "retain", columns=named) if retain else None
    refusal_rows = read_rows(refusals, need_response=True) if refusals else []

    from sku_vllm.methods.estimate import estimate_run
    from sku_vllm.methods.sampling import NoRefusals

    speaks = os.environ.get("RANK", "0") == "0"  # one of several processes
    if dry_run:
        estimate = estimate_run(model, forget_set, retain_set, config, refusals=refusal_rows, revision=revision)
        if speaks:
            print_json(estimate.to_json()) if json_output else log(estimate.text())
        return
    more = {"refusals": refusal_rows, "revision": revision, "tracker": tracker, "save_seconds": save_seconds}
    try:
        report = train_adapter(model, forget_set, retain_set, output, config, resume=resume, **more)
    except NoRefusals as error:
        if method or preset:
            raise
        log(f"warning: {error}; no method was asked for, so this trains sku-mirrored")
        report = train_adapter(model, forget_set, retain_set, output, TrainConfig.of("sku-mirrored", **settings), **more)
    if not speaks:
        return
    if json_output:
        print_json(report.to_json())
    _say(report)


def _without(flag: str, method: str | None, preset: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with one term's weight 0; an ablation of a term that the method does not have is a mistake."""
    from sku_vllm.methods import METHODS, TrainConfig

    less = settings | {ABLATIONS[flag]: 0.0}
    whole, rest = (TrainConfig.of(method, preset=preset, **given) for given in (settings | {ABLATIONS[flag]: None}, less))
    weighed = [{(term.name, term.weight) for phase in METHODS[one.method].phases(one) for term in phase.terms} for one in (whole, rest)]
    if weighed[0] == weighed[1]:
        raise ConfigError(f"--{flag.replace('_', '-')}: there is none in --method {whole.method}; drop the flag")
    return less


def _say(report: Any) -> None:
    from sku_vllm.methods.saving import WARNING

    if report.finished_before:
        log(f"{report.output}: already finished ({report.steps} steps); nothing left to resume")
        return
    if report.cut_answers:
        log(f"warning: {report.cut_answers} answers were cut by the length limit; raise --max-length to train on all of them")
    for name, rise in (report.risen or {}).items():
        log(f"warning: {name} ended {rise:.1f} nats above where it began: training made it worse; lower --lr or the other weights")
    losses = ", ".join(f"{name} {value:.3f}" for name, value in report.losses.items())
    rate = report.tokens / max(report.seconds, 1e-9)
    log(f"{report.output}: {report.method}, {report.steps} steps in {report.seconds:.0f} s ({rate:.0f} tokens/s); {losses}")
    if report.fold_error:
        log(f"ranks of the rounds recompressed to {report.rank} at relative error {report.fold_error:.2g}")
    log(f"warning: {WARNING}")


def _columns(given: tuple[str, ...]) -> dict[str, str] | None:
    if not given:
        return None
    text = ",".join(given)
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(separator and field.strip() and name.strip() for field, separator, name in pairs):
        raise ConfigError(f"--columns {text}: expected FIELD=COLUMN pairs, for instance prompt=question,response=answer")
    return {field.strip(): name.strip() for field, _, name in pairs}
