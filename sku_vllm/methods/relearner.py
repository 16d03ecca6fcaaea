"""Someone who fine-tunes the served model on harmful answers while it is being trained: the adversary of a resistant recipe.

All of the base's weights once more, which the adversary moves while the adapter is the defender's: embeddings, norms and biases too, as
an attack on a checkpoint does. (An adapter of its own for the adversary left the OPT and Qwen3 open to relearning with stopping banned:
benchmarks/results/research.md.) At two steps of three it first takes a step of descent on harmful answers, and the served model then
learns its refusals as seen on the attacked weights (side `RELEARNED`) beside the plain ones, so that they survive fine-tuning. It starts
over from the base every `relearner_steps` of its steps, when it is a head start and not yet an attack. First-order adversarial training in
the manner of TAR (Tamirisa et al. 2024, arXiv 2408.00761), with one attacker carried along instead of an inner loop a step.

It takes the memory of the weights once more, and no more than that: Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) keeps a row and a
column of second moments instead of two moments a weight, and moves a weight as soon as its gradient is known, which is then given up.
It is at least as good an adversary as AdamW was. `relearner_steps` 0 does without.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from sku_vllm.methods import losses
from sku_vllm.methods.forward import RELEARNED
from sku_vllm.methods.method import Term
from sku_vllm.methods.training_state import optimizer_tensors, restore_optimizer

if TYPE_CHECKING:
    from sku_vllm.methods.config import TrainConfig
    from sku_vllm.methods.objective import Objective, Piece

CYCLE = 3  # training steps, the first of which leaves the relearner out
WEIGHTS, MOMENTS = "relearner/", "relearner_optimizer/"  # how a checkpoint names its tensors
TERM = Term("relearning", 1.0, "forget", RELEARNED, losses.cross_entropy)


class Relearner:
    """The weights as the adversary has them, and its optimizers. Every process takes all of its steps, so nothing has to be exchanged.

    Attributes:
        names: parameters of the base (what a quantised one keeps in floating point) and their names.
        own, attacked: their values as the base has them and as the adversary does, by name.
    """

    def __init__(self, model: torch.nn.Module, config: "TrainConfig") -> None:
        self.config = config
        floating = ((name, value) for name, value in model.named_parameters() if value.is_floating_point())
        self.names = {parameter: name for name, parameter in floating if "lora_" not in name}
        self.own = {name: parameter.data for parameter, name in self.names.items()}
        self.attacked = {name: value.clone() for name, value in self.own.items()}
        self.optimizers = self._new_optimizers()

    @staticmethod
    def at_work(step: int) -> bool:
        """Whether the served model is attacked at this step of a phase."""
        return step % CYCLE != 0

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the attacked weights; a backward pass belongs inside, since it reads them again."""
        self._give(self.attacked)
        try:
            yield
        finally:
            self._give(self.own)

    @contextmanager
    def out_of_place(self) -> Iterator[None]:
        """Inside, the model has its own weights, whatever it has outside: for references, which nobody attacks."""
        before = {name: parameter.data for parameter, name in self.names.items()}
        self._give(self.own)
        try:
            yield
        finally:
            self._give(before)

    def step(self, objective: "Objective", passes: Sequence[Sequence["Piece"]], totals: Mapping[str, int], step: int) -> None:
        """One step of Adafactor on the harmful answers in each of `passes` (one, unless they exceed `tokens_per_pass`); the defender's
        gradients stay untouched."""
        taken = step - step // CYCLE - 1  # of its own steps, before this one
        if taken % self.config.relearner_steps == 0:
            for name, value in self.attacked.items():
                value.copy_(self.own[name])
            self.optimizers = self._new_optimizers()
        weights = list(self.names)
        with self.in_place(), objective.training_head(), self._descending(weights):
            for pieces in passes:
                objective(pieces, [TERM], totals)[TERM.name].backward(inputs=weights)

    @contextmanager
    def _descending(self, weights: Sequence[torch.nn.Parameter]) -> Iterator[None]:
        """Inside, a backward pass moves each weight as soon as its gradient is complete, and gives the gradient up."""
        def descend(parameter: torch.Tensor) -> None:
            self.optimizers[parameter].step()
            parameter.grad = None

        for parameter in weights:
            parameter.requires_grad_(True)
        hooks = [parameter.register_post_accumulate_grad_hook(descend) for parameter in weights]
        try:
            yield
        finally:
            for hook, parameter in zip(hooks, weights, strict=True):
                hook.remove()
                parameter.grad = None
                parameter.requires_grad_(False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The attacked weights and the optimizers' moments, for a checkpoint."""
        found = {f"{WEIGHTS}{name}": value.cpu() for name, value in self.attacked.items()}
        for optimizer in self.optimizers.values():
            found |= optimizer_tensors(optimizer, self.names, MOMENTS)
        return found

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `tensors`."""
        for name, value in self.attacked.items():
            value.copy_(tensors[f"{WEIGHTS}{name}"])
        for parameter, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, tensors, {parameter: self.names[parameter]}, MOMENTS)

    def _give(self, values: Mapping[str, torch.Tensor]) -> None:
        for parameter, name in self.names.items():
            parameter.data = values[name]

    def _new_optimizers(self) -> dict[torch.nn.Parameter, torch.optim.Optimizer]:
        """One for each weight, so that each can take its step alone."""
        return {parameter: torch.optim.Adafactor([parameter], lr=self.config.relearner_lr, weight_decay=0.0) for parameter in self.names}


def through(terms: Sequence[Term]) -> list[Term]:
    """The terms as they read with the relearner at work: those that resist once more on the attacked weights."""
    return [*terms, *(replace(term, side=RELEARNED, name=f"{term.name}_relearned") for term in terms if term.resists)]
