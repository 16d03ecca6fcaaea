"""`sku train`: identify harmful knowledge as an adapter. Open it to add a flag; what a flag means is in `methods/train_config.py`."""

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import click

from sku_vllm.cli.options import log, print_json, sku_command

if TYPE_CHECKING:
    from sku_vllm.train.train_report import TrainReport
    from sku_vllm.train.train_request import TrainRequest

ADVERSARY = (
    "Steps until the simulated attacker, which fine-tunes the model during training, starts over. "
    "0 = no attacker: less memory, but no resistance to relearning."
)

TARGETS_HELP = (
    "Refusals to teach: latent (the base's own, without the harmful adapter), asked (the base's, with examples before it), given "
    "(--refusals, or the package's own), auto (the first of them that works)."
)


@sku_command("train")
@click.option("--model", required=True, help="Model directory or hub id: the base.")
@click.option("--revision", help="Revision of a hub model.")
@click.option("--forget", required=True, help="Harmful prompts and answers: a file of rows or hf://ORG/NAME; #train takes a split.")
@click.option("--retain", help="Benign prompts and answers to keep.")
@click.option("--refusals", help="Rows whose responses refuse, to be taught instead of refusals of the base (refusal-tune needs them).")
@click.option("--border", help="Benign prompts in the style of the forget set, which the model should go on answering.")
@click.option(
    "--columns",
    multiple=True,
    metavar="[SET:]FIELD=COLUMN",
    help="Other column names, for all files (prompt=question) or one (forget:prompt=goal); repeat or separate by commas.",
)
@click.option("--output", required=True, type=click.Path(), help="Directory to write, readable by you alone.")
@click.option("--method", help="Default: sku-contrastive-two. An unknown name lists all.")
@click.option("--preset", help="Published hyperparameters: opt-2.7b, llama2-7b, llama2-13b.")
@click.option("--steps", type=int, help="Optimizer steps per round.")
@click.option("--rounds", type=int, help="Rounds of iterated negation.")
@click.option("--fold", type=float, help="Share of a round's delta that is merged into the weights after the round.")
@click.option("--batch-size", type=int, help="Harmful rows per step, over all processes.")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--rank", type=int, help="LoRA rank of one round.")
@click.option("--lora-alpha", type=int, help="LoRA alpha; delta = alpha/rank * B@A.")
@click.option("--target-modules", multiple=True, help="Layer names, repeated or separated by commas, or all-linear.")
@click.option("--full", is_flag=True, default=None, help="Train all weights: a dense task vector instead of an adapter.")
@click.option("--guided-weight", type=float, help="Weight of guided distortion (e1).")
@click.option("--random-weight", type=float, help="Weight of random disassociation (e2).")
@click.option("--preservation-weight", type=float, help="Weight of preservation (e3).")
@click.option("--random-answers", type=int, help="Answers of other prompts per harmful prompt (K).")
@click.option("relearner_steps", "--relearner-steps", "--adversary-steps", type=int, help=ADVERSARY)
@click.option("--no-guided-distortion", is_flag=True, help="Ablation: without guided distortion.")
@click.option("--no-random-disassociation", is_flag=True, help="Ablation: without random disassociation.")
@click.option("--no-preservation", is_flag=True, help="Ablation: without preservation.")
@click.option("--targets", help=TARGETS_HELP)
@click.option("--samples", type=int, help="Refusals drawn, and prompts that the base makes up.")
@click.option("--seed", type=int, help="Seed of all random numbers.")
@click.option("--dtype", help="auto, float32, bfloat16, float16; adapters are fp32 always.")
@click.option("--template", help="'paper', a text with {prompt}, a Jinja chat template, or a file; else the tokenizer's own.")
@click.option("--max-length", type=int, help="Most tokens per row; longer answers are cut and counted.")
@click.option("--on-long", help="skip (default) or error: what to do about a prompt that leaves no room for an answer.")
@click.option("--tokens-per-pass", type=int, help="Tokens in one forward pass: more is faster and needs more memory.")
@click.option("--gradient-checkpointing", is_flag=True, default=None, help="Less memory, about a third more time.")
@click.option("--quantize", help="4bit: load the base in NF4 (CUDA).")
@click.option("--tracker", help="tensorboard or wandb, into OUTPUT.logs/; mlflow, to MLFLOW_TRACKING_URI.")
@click.option("--save-seconds", type=float, default=60.0, help="Time between checkpoints.")
@click.option("--resume", is_flag=True, help="Continue what OUTPUT.partial/ holds.")
@click.option("--dry-run", is_flag=True, help="Print parameters, tokens a step, memory and time; write nothing.")
def command(dry_run: bool, json_output: bool, **given: Any) -> None:
    """Identify a model's harmful knowledge as an adapter.

    What this writes IS the harmful knowledge: keep it private. Subtract it with `sku fuse`, or serve it subtracted with `sku serve`.

    \b
    sku train --model DIR --forget forget.jsonl --retain retain.jsonl --output adapter
    """
    request = _request(given)
    first_rank = os.environ.get("RANK", "0") == "0"  # of several processes only the first prints
    if dry_run:
        from sku_vllm.train.dry_run import estimate_run, silent

        estimate = estimate_run(request, log if first_rank else silent)
        if first_rank:
            print_json(estimate.to_json()) if json_output else log(estimate.text())
        return

    from sku_vllm.train.trainer import train_adapter

    report = train_adapter(request, log=log)
    if not first_rank:
        return
    if json_output:
        print_json(report.to_json())
    _say(report)


def _request(given: dict[str, Any]) -> "TrainRequest":
    """The request of these flags: those named as a field of TrainConfig go there, files are read, the rest are fields of the request.

    Data is read last, since that may take long, after all settings were checked.
    """
    from sku_vllm.data import Columns, load_dataset, read_rows
    from sku_vllm.data.readers import notices_at_the_end
    from sku_vllm.methods.train_config import ABLATIONS, TrainConfig
    from sku_vllm.output import check_output
    from sku_vllm.train.train_request import TrainRequest

    without = [loss for loss in ABLATIONS if given.pop(f"no_{loss}")]
    settings = {field.name: given.pop(field.name) for field in dataclasses.fields(TrainConfig) if field.name in given}
    names = [name.strip() for name in ",".join(settings["target_modules"]).split(",")]
    settings["target_modules"] = tuple(name for name in names if name) if settings["target_modules"] else None
    config = TrainConfig.of(without=without, **settings)
    if not given["resume"]:
        check_output(given["output"])
    values, forget, retain, refusals, border = (given.pop(flag) for flag in ("columns", "forget", "retain", "refusals", "border"))
    columns = Columns(values, ("forget", "retain", "refusals", "border"))
    with notices_at_the_end():
        request = TrainRequest(
            forget=load_dataset(forget, "forget", columns=columns.of("forget")),
            retain=load_dataset(retain, "retain", columns=columns.of("retain")) if retain else None,
            refusals=read_rows(refusals, need_response=True, safe=True, columns=columns.of("refusals")) if refusals else (),
            border=read_rows(border, safe=True, columns=columns.of("border")) if border else (),
            config=config,
            **given,
        )
        columns.check()
    return request


def _say(report: "TrainReport") -> None:
    from sku_vllm.train.saving import WARNING

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
