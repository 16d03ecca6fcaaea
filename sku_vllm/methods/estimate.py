"""What a run would take, from a few real steps of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sku_vllm.data import ForgetSet, PromptTemplate, RetainSet, Row
from sku_vllm.methods import METHODS
from sku_vllm.methods.batches import Batches
from sku_vllm.methods.config import TrainConfig
from sku_vllm.methods.run import Run
from sku_vllm.model import load_tokenizer, resolve_model

PROBES = 3  # steps of a phase that are timed, beside the largest
LOOKED_AT = 256  # steps of a phase whose rows are counted


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
    """Load the model, take a few real steps of every phase, the largest among them, and extrapolate; writes nothing.

    Time is that of the tokens of the run's own steps; the drawing of a contrastive method's samples is not in it.
    """
    from accelerate import Accelerator

    path = resolve_model(model, revision)
    tokenizer = load_tokenizer(path)
    template = PromptTemplate.of(tokenizer, config.template)
    batches = Batches(config, template, forget, retain, refusals)
    batches.check({term.rows for phase in METHODS[config.method].phases(config) for term in phase.terms})
    run = Run(path, config, batches, Accelerator(), tokenizer)
    tokens = seconds = 0.0
    begin = 0
    for number, phase in enumerate(run.phases):
        run.stand_in(phase, begin)
        looked_at = range(begin, begin + phase.steps, max(1, phase.steps // LOOKED_AT))
        sizes = {at: run.size(at) for at in looked_at}
        # The first step of a run also warms caches and allocators; the largest decides the peak of memory.
        entries = [run.probe(at) for at in [*looked_at[:PROBES], max(sizes, key=sizes.__getitem__)]]
        rate = sum(entry["seconds"] for entry in entries[1:]) / sum(entry["tokens"] for entry in entries[1:])
        size = sum(sizes.values()) / len(sizes) * phase.steps
        tokens += size
        seconds += rate * size
        begin += phase.steps
        if number + 1 < len(run.phases):
            run.end_phase(phase, number)
    return Estimate(
        config.method, run.parameters, run.trainable, run.total, tokens / run.total, run.peak_memory(), seconds, run.passes.packed
    )
