"""`sku train --dry-run`: estimate the time and memory of a run from a few real steps.

Open this file to see what is added up; `trial.py` takes the measurements.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from sku_vllm.model import resolve_model
from sku_vllm.train import sharding
from sku_vllm.train.resume import as_begun
from sku_vllm.train.run import Run
from sku_vllm.train.targets import likely, rungs
from sku_vllm.train.train_request import TrainRequest
from sku_vllm.train.trainer import prepare
from sku_vllm.train.trial import Trial
from sku_vllm.train.workload import steps_by_kind

BUDGET_S = 45.0  # loading and measuring together aim at this; steps that are slow even with the fewest rows take longer


def silent(line: str) -> None:
    """Says nothing."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run would take.

    Attributes:
        method: the method's name. steps: optimizer steps. parameters: how many the base has. trainable: how many would train.
        tokens_per_step: mean forward tokens. peak_memory_bytes: as in TrainReport. seconds: of training, without loading.
        packed: whether rows are computed without padding.
    """

    method: str
    parameters: int
    trainable: int
    steps: int
    tokens_per_step: float
    peak_memory_bytes: int
    seconds: float
    packed: bool

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def text(self) -> str:
        """One line for people."""
        return (
            f"{self.method}: {self.parameters:,} parameters, {self.trainable:,} trained; {self.steps} steps of about "
            f"{self.tokens_per_step:.0f} forward tokens ({'packed' if self.packed else 'padded'}); "
            f"about {self.peak_memory_bytes / 2**30:.2f} GiB at the peak and {self.seconds:.0f} s"
        )


def estimate_run(request: TrainRequest, say: Callable[[str], None] = silent) -> Estimate:
    """Load the model, take a few real steps of every kind, the largest among them, and extrapolate; writes nothing.

    `seconds` is for training's forward tokens and for drawing a contrastive method's samples. These are drawn here before the
    harmful adapter is trained, so they are as long as the base's own answers.

    Args:
        say: called with a line about what is measured next, and about what was extrapolated.

    Raises:
        InputError: model, data or settings cannot be used.
    """
    from accelerate import Accelerator

    until = time.monotonic() + BUDGET_S
    say("dry run: reading the rows and loading the model")
    request = as_begun(request)
    path = resolve_model(request.model, request.revision)
    batches = prepare(path, request)
    sharding.check_launch()
    accelerator = Accelerator()
    sharding.shard_on_cpu(accelerator)
    run = Run(path, batches.config, batches, accelerator, batches.template.tokenizer)
    if len(rungs(batches.config, batches.refusals)) > 1:
        say("dry run: guessing where refusals will come from")
        batches.config = batches.config.with_targets(likely(batches, run.passes, run.config, run.bare.gathered))
        say(f"dry run: taking --targets {batches.config.targets}")
        run = Run(path, batches.config, batches, accelerator, batches.template.tokenizer)
    trial = Trial(run)
    tokens, seconds = _measured(run, trial, until, say)
    for line in trial.extrapolated:
        say(f"dry run: extrapolated {line}")
    for line in batches.long.warnings:
        say(f"warning: {line}")
    return Estimate(
        method=batches.config.method,
        parameters=run.parameters,
        trainable=run.trainable,
        steps=run.total,
        tokens_per_step=tokens / run.total,
        peak_memory_bytes=trial.peak(),
        seconds=seconds,
        packed=run.passes.packed,
    )


def _measured(run: Run, trial: Trial, until: float, say: Callable[[str], None]) -> tuple[float, float]:
    """Forward tokens and seconds of all steps and draws. What is left of the time is shared out evenly among what is left to measure."""
    phases = run.phases
    # Steps are taken out of order here, so `Run.step` must not draw samples or end a phase by itself; the loop below does both.
    run.phases = [replace(phase, look_at=None, sample_at=None, fold=None, keep=False) for phase in phases]
    kinds = steps_by_kind(run)
    begins = [sum(earlier.steps for earlier in phases[:number]) for number in range(len(phases))]
    drawn_at = {begin + phase.sample_at for begin, phase in zip(begins, phases, strict=True) if phase.sample_at is not None}
    to_do, done = len(kinds) + len(drawn_at), 0
    tokens = seconds = 0.0

    def share(what: str) -> float:
        nonlocal done
        done += 1
        say(f"dry run: {what} ({done} of {to_do})")
        return max(0.0, until - time.monotonic()) / (to_do - done + 1)

    for number, phase in enumerate(phases):
        for kind, steps in kinds.items():
            if kind.phase != number:
                continue
            if drawn_at & set(steps):
                seconds += trial.draws(share("drawing a few answers"))
            name = f"steps of {', '.join(kind.terms)}{', with the adversary' * kind.attacked}"
            more_tokens, more_seconds = trial.steps(kind, steps, share(name))
            tokens, seconds = tokens + more_tokens, seconds + more_seconds
        run.end_phase(phase, number)
    return tokens, seconds
