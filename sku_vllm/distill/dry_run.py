"""`sku distill --dry-run`: estimate the time and compute of a distillation from a few real steps, on rows that need no drawing."""

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerate import Accelerator

from sku_vllm.data import PromptTemplate
from sku_vllm.distill.distill import prepare
from sku_vllm.distill.distill_report import compute_of, share_of
from sku_vllm.distill.distill_request import DistillRequest
from sku_vllm.distill.lessons import Lessons, pieces_of_text, stand_ins
from sku_vllm.model import load_tokenizer, resolve_model
from sku_vllm.train.memory import peak_memory, reset_peak

TRIED = 3  # steps; the first one, which warms caches up, is not counted


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a distillation would take: `seconds` of its steps without drawing answers; `compute` and its share as in DistillReport."""

    parameters: int
    steps: int
    tokens_per_step: float
    compute: int
    pretraining_share: float | None
    peak_memory_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def text(self) -> str:
        """One line for people."""
        share = "" if self.pretraining_share is None else f", {self.pretraining_share:.0%} of pretraining"
        return (
            f"{self.parameters:,} parameters; {self.steps} steps of {self.tokens_per_step:.0f} tokens: {self.compute:,} forward tokens"
            f"{share}; about {self.peak_memory_bytes / 2**30:.2f} GiB at the peak; {self.seconds:.0f} s besides drawing answers"
        )


def estimate_distillation(request: DistillRequest) -> Estimate:
    """Take a few real steps on stand-ins for the rows, and extrapolate; writes nothing.

    Raises:
        InputError: teacher, data or settings cannot be used.
    """
    path = resolve_model(request.teacher, request.revision)
    template = PromptTemplate.of(load_tokenizer(path), request.config.template)
    rows = stand_ins(request, template) + pieces_of_text(request.text, template, request.config.max_length)
    accelerator = Accelerator()
    reset_peak(accelerator.device)
    short = replace(request, config=replace(request.config, steps=TRIED))
    run = prepare(short, path, accelerator, lessons=Lessons(rows))
    run.step()
    warm, begun = run.tokens, time.perf_counter()
    while not run.done:
        run.step()
    steps = request.config.steps
    each = (run.tokens - warm) / (TRIED - 1)
    drawn = round(request.config.samples * each / request.config.batch_size)
    compute = compute_of(round(steps * each), drawn)
    return Estimate(
        parameters=sum(parameter.numel() for parameter in run.names),
        steps=steps,
        tokens_per_step=each,
        compute=compute,
        pretraining_share=share_of(compute, request.pretraining_tokens),
        peak_memory_bytes=peak_memory(accelerator.device),
        seconds=round(steps * (time.perf_counter() - begun) / (TRIED - 1), 1),
    )
