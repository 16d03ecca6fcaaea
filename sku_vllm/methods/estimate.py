"""What a run would take, from a few real steps of it."""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from sku_vllm.data import ForgetSet, RetainSet, Row
from sku_vllm.methods import sharding
from sku_vllm.methods.config import TrainConfig
from sku_vllm.methods.method import Phase
from sku_vllm.methods.relearner import CYCLE
from sku_vllm.methods.run import Run
from sku_vllm.methods.sampling import NoRefusals
from sku_vllm.methods.trainer import prepare
from sku_vllm.model import resolve_model

# Steps that are timed of those with the same terms: whole cycles of an adversary, one at least, and more while they take no time.
TIMED, ENOUGH_SECONDS = range(CYCLE, 10 * CYCLE + 1, CYCLE), 2.0
LOOKED_AT = 256  # of those steps, how many have their rows counted
DRAWN = 64  # answers drawn of a contrastive method's: one batch


@dataclass(frozen=True, slots=True)
class Estimate:
    """Parameters, forward tokens a step, bytes at the peak, seconds of training."""

    method: str
    parameters: int
    trainable: int
    steps: int
    tokens_per_step: float
    peak_memory_bytes: int
    seconds: float
    packed: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        return (
            f"{self.method}: {self.parameters:,} parameters, {self.trainable:,} trained; {self.steps} steps of about "
            f"{self.tokens_per_step:.0f} forward tokens ({'packed' if self.packed else 'padded'}); "
            f"about {self.peak_memory_bytes / 2**30:.2f} GiB at the peak and {self.seconds:.0f} s"
        )


def estimate_run(
    model: str | Path,
    forget: ForgetSet,
    retain: RetainSet | None,
    config: TrainConfig,
    *,
    refusals: Sequence[Row] = (),
    revision: str | None = None,
) -> Estimate:
    """Load the model, take a few real steps of every kind, the largest among them, and extrapolate; writes nothing.

    Time is that of training: the tokens of the run's own steps, and the drawing of a contrastive method's samples. Those are drawn here
    before the harmful adapter is trained, so they are as long as the base's own answers.
    """
    from accelerate import Accelerator

    path = resolve_model(model, revision)
    batches = prepare(path, config, forget, retain, refusals)
    sharding.check_launch()
    accelerator = Accelerator()
    sharding.shard_on_cpu(accelerator)
    run = Run(path, batches.config, batches, accelerator, batches.template.tokenizer)
    phases = run.phases
    # Steps are taken out of order here, so what comes between them is called for where it is due.
    run.phases = [replace(phase, sample_at=None, fold=None, keep=False) for phase in phases]
    tokens = seconds = 0.0
    for number, phase in enumerate(phases):
        begin = sum(earlier.steps for earlier in phases[:number])
        for steps in _alike(phase, begin):
            if phase.sample_at == steps.start - begin:
                seconds += _draw(run)
            looked_at = sorted(random.Random(0).sample(steps, min(LOOKED_AT, len(steps))))
            sizes = {at: run.size(at) for at in looked_at}
            size = sum(sizes.values()) / len(sizes) * len(steps)
            tokens += size
            seconds += _seconds_per_token(run, steps) * size
            _step(run, max(sizes, key=sizes.__getitem__))  # decides the peak of memory
        run.end_phase(phase, number)
    return Estimate(
        config.method, run.parameters, run.trainable, run.total, tokens / run.total, run.peak_memory(), seconds, run.passes.packed
    )


def _alike(phase: Phase, begin: int) -> Iterator[range]:
    """A phase's steps, which start at `begin`, in stretches that have the same terms."""
    cuts = {term.begin for term in phase.terms if term.begin < phase.steps}
    for first, end in pairwise(sorted({0, *cuts, phase.steps})):
        yield range(begin + first, begin + end)


def _step(run: Run, at: int) -> dict[str, Any]:
    run.at = at
    return run.step()


def _seconds_per_token(run: Run, steps: range) -> float:
    """Of some steps in a row; one before them warms caches and makes what an optimizer keeps."""
    _step(run, steps[0])
    tokens = seconds = 0.0
    for taken in range(1, TIMED[-1] + 1):
        entry = _step(run, steps[taken % len(steps)])
        tokens, seconds = tokens + entry["tokens"], seconds + entry["seconds"]
        if taken in TIMED and run.agree(seconds > ENOUGH_SECONDS):
            break
    return seconds / tokens


def _draw(run: Run) -> float:
    """Draw a batch of the samples that the steps from here on need; the seconds that all of them would take."""
    wanted = run.config.samples
    run.config = replace(run.config, samples=min(DRAWN, wanted))
    begun = time.perf_counter()
    with suppress(NoRefusals):  # which is for training to find out: the harmful adapter is not trained yet
        run._draw_samples()
    return (time.perf_counter() - begun) * wanted / run.config.samples
