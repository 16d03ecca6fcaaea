"""Someone who fine-tunes the served model on harmful answers while it is being trained: the adversary of a resistant recipe.

An adapter of its own lies on top of base − δ (side `RELEARNED`). At two steps of three it first takes a step of descent on harmful
answers, and the served model then learns its refusals as seen through it, so that they survive fine-tuning. It starts over from
nothing every `relearner_steps` of its steps, when it is a head start and not yet an attack. First-order adversarial training in the manner of
TAR (Tamirisa et al. 2024, arXiv 2408.00761), with one attacker carried along instead of an inner loop a step. At the third step the
served model is seen as it is: without it, prefilled openings and benign answers suffer (benchmarks/results/research.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from sku_vllm.methods import losses, rounds
from sku_vllm.methods.forward import RELEARNED, RELEARNER
from sku_vllm.methods.method import Term
from sku_vllm.methods.training_state import optimizer_tensors, restore_optimizer

if TYPE_CHECKING:
    from sku_vllm.methods.config import TrainConfig
    from sku_vllm.methods.objective import Objective, Piece

CYCLE = 3  # training steps, the first of which leaves the relearner out
TERM = Term("relearning", 1.0, "forget", RELEARNED, losses.cross_entropy)


class Relearner:
    """The adapter of an adversary and its optimizer. Every process takes all of its steps, so nothing has to be exchanged."""

    def __init__(self, model: PeftModel, config: "TrainConfig") -> None:
        self.model, self.config = model, config
        if RELEARNER not in model.peft_config:
            rounds.set_aside(model, RELEARNER)
        self.names = {parameter: name for name, parameter in model.named_parameters() if f".{RELEARNER}" in name and "lora_" in name}
        self.optimizer = self._new_optimizer()

    @staticmethod
    def at_work(step: int) -> bool:
        """Whether the served model is attacked at this step of a phase."""
        return step % CYCLE != 0

    def step(self, objective: "Objective", passes: Sequence[Sequence["Piece"]], totals: Mapping[str, int], step: int) -> None:
        """One step of AdamW on the harmful answers in `passes`; the defender's gradients stay untouched."""
        taken = step - step // CYCLE - 1  # of its own steps, before this one
        if taken % self.config.relearner_steps == 0:
            rounds.fresh_adapter(self.model, self.config.seed * 1000 + 500 + taken, RELEARNER)
            self.optimizer = self._new_optimizer()
        factors = list(self.names)
        for parameter in factors:
            parameter.requires_grad_(True)
        for pieces in passes:
            loss = objective(pieces, [TERM], totals)[TERM.name]
            for parameter, gradient in zip(factors, torch.autograd.grad(loss, factors), strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        self.optimizer.step()
        for parameter in factors:
            parameter.grad = None
            parameter.requires_grad_(False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's moments for a checkpoint; the factors are saved with the model's other adapters."""
        return optimizer_tensors(self.optimizer, self.names)

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `tensors`."""
        restore_optimizer(self.optimizer, tensors, self.names)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(self.names), lr=self.config.relearner_lr, weight_decay=0.0)


def through(terms: Sequence[Term]) -> list[Term]:
    """The terms that resist as they read with the relearner at work, the others as they are."""
    return [replace(term, side=RELEARNED, name=f"{term.name}_relearned") if term.resists else term for term in terms]
