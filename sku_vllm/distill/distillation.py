"""One distillation in memory: teacher, student, optimizer and counts. Open this file to follow one step.

The student learns KL(teacher ‖ student) on every token of the teacher's answers (losses.kl_from_base), in the passes that training uses.
"""

import math
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from sku_vllm.data import Encoded
from sku_vllm.distill.distill_config import DistillConfig
from sku_vllm.distill.lessons import Lessons, shuffled
from sku_vllm.errors import ConfigError, DivergenceError
from sku_vllm.methods import losses
from sku_vllm.methods.method import Side, Term
from sku_vllm.train.checkpointing import TrainingState, optimizer_tensors, restore_optimizer
from sku_vllm.train.forward import Forward
from sku_vllm.train.objective import Objective, total
from sku_vllm.train.passes import rows_of_process, split_into_passes

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

TERM = Term("kl", 1.0, "self_generated", Side.SERVED, losses.kl_from_base, references=(Side.BASE,))
CLIP = 1.0


class Distillation:
    """Everything a step changes, and the step itself.

    Attributes:
        config, lessons, accelerator: what it was made with. student: the model that learns. names: its parameters and their names.
        at: steps done so far. tokens: tokens that student and teacher have each computed. seconds: of all steps. losses: each step's KL.
    """

    def __init__(
        self, config: DistillConfig, lessons: Lessons, teacher: "PreTrainedModel", student: "PreTrainedModel", accelerator: "Accelerator"
    ) -> None:
        """Raises ConfigError for fewer rows a step than processes."""
        if accelerator.num_processes > config.batch_size:
            raise ConfigError(
                f"--batch-size {config.batch_size}: counts rows over all {accelerator.num_processes} processes, and each needs one; "
                f"give at least {accelerator.num_processes}"
            )
        self.config, self.lessons, self.accelerator, self.student = config, lessons, accelerator, student
        self.passes = Forward(student, teacher.requires_grad_(False))
        self.passes.choose_packing([row.ids for row in lessons.rows])
        self.names = {parameter: name for name, parameter in student.named_parameters()}
        self.bare = Objective(self.passes, train_head=True)
        self.objective = accelerator.prepare(self.bare)
        # Not prepared by accelerate: nothing in it needs to be, and its state is saved by parameter name.
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.at = self.tokens = 0
        self.seconds = 0.0
        self.losses: list[float] = []

    @property
    def done(self) -> bool:
        """Whether every step has been taken."""
        return self.at >= self.config.steps

    def batch(self, step: int) -> list[Encoded]:
        """The rows of a step, over all processes; they depend on seed and step alone."""
        rows = self.lessons.rows
        return [rows[number] for number in shuffled(len(rows), self.config.seed, step, self.config.batch_size)]

    def step(self) -> float:
        """Take one optimizer step; returns its KL, the mean over answer tokens in nats.

        Raises:
            DivergenceError: the loss or the gradient is not finite; the step is not taken.
        """
        begun = time.perf_counter()
        rows = self.batch(self.at)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.at)
        loss = self._gradients(rows)
        norm = float(self.accelerator.clip_grad_norm_(self.student.parameters(), CLIP))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergenceError(f"step {self.at + 1} of {self.config.steps}: the loss or its gradient is not finite; lower --lr")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.at += 1
        self.tokens += sum(max(1, len(row.ids) - 1) for row in rows)
        self.seconds += time.perf_counter() - begun
        self.losses.append(loss)
        return loss

    def _gradients(self, rows: list[Encoded]) -> float:
        """Accumulate the gradients of this process's share of the rows; the loss over all processes."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        totals = {TERM.name: total(TERM, rows)}
        mine = rows_of_process({TERM.rows: rows}, rank, world)
        passes = split_into_passes([TERM], mine, self.config.tokens_per_pass, packed=self.passes.packed)
        value = torch.zeros((), device=self.accelerator.device)
        for pieces in passes:
            # Gradients are averaged over processes, once a step; a part is already divided by the whole step's total.
            with nullcontext() if pieces is passes[-1] else self.accelerator.no_sync(self.objective):
                references = self.bare.references(pieces, [TERM])
                part = self.objective(pieces, [TERM], totals, references)[TERM.name]
                self.accelerator.backward(part * world)
            value += part.detach().float()
        return float(self.accelerator.reduce(value) if world > 1 else value)

    def state(self) -> TrainingState:
        """Everything the next step depends on."""
        tensors = {f"model/{name}": parameter.detach().cpu() for parameter, name in self.names.items()}
        tensors |= optimizer_tensors(self.optimizer.state, self.names)
        progress: dict[str, Any] = {key: getattr(self, key) for key in ("at", "tokens", "seconds", "losses")}
        return TrainingState(tensors, {**progress, "lessons": self.lessons.to_json()})

    @torch.no_grad()
    def restore(self, state: TrainingState) -> None:
        """Continue where `state` was taken; the lessons are those that it was made with."""
        for parameter, name in self.names.items():
            parameter.copy_(state.tensors[f"model/{name}"])
        restore_optimizer(self.optimizer.state, state.tensors, self.names)
        for key in ("at", "tokens", "seconds", "losses"):
            setattr(self, key, state.progress[key])
