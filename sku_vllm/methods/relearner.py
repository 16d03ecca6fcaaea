"""Someone who fine-tunes the served model on harmful answers while it is being trained: the adversary of a resistant recipe.

All of the base's weights once more, which the adversary moves while the adapter is the defender's: embeddings, norms and biases too, as
an attack on a checkpoint does. (An adapter of its own for the adversary left the OPT and Qwen3 open to relearning with stopping banned:
benchmarks/results/research.md.) At two steps of three it first takes a step of descent on harmful answers, and the served model then
learns its refusals as seen on the attacked weights (side `RELEARNED`) beside the plain ones, so that they survive fine-tuning. It starts
over from the base every `relearner_steps` of its steps, when it is a head start and not yet an attack. First-order adversarial training in
the manner of TAR (Tamirisa et al. 2024, arXiv 2408.00761), with one attacker carried along instead of an inner loop a step.

It takes the memory of the weights once more and of one gradient at a time: Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) keeps a row
and a column of second moments instead of two moments a weight, and moves a weight as soon as its gradient is known, which is then given
up. It is about as good an adversary as AdamW was (research.md). `relearner_steps` 0 does without.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from sku_vllm.methods import losses
from sku_vllm.methods.forward import RELEARNED
from sku_vllm.methods.method import Term
from sku_vllm.methods.sharding import give_up, sharded_like, whole
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
        attacked: their values as the adversary has them, by name; inside `in_place` the base's, which the model has given for them.
    """

    def __init__(self, objective: "Objective", config: "TrainConfig") -> None:
        self.objective, self.config = objective, config
        floating = [(name, value) for name, value in objective.passes.model.named_parameters() if value.is_floating_point()]
        self.names = {parameter: name for name, parameter in floating if "lora_" not in name}
        self.adapter = [parameter for name, parameter in floating if "lora_" in name and parameter.requires_grad]
        self.head = dict(objective.passes.core.get_output_embeddings().named_parameters())
        self.attacked = {name: parameter.data.clone() for parameter, name in self.names.items()}
        # What an optimizer moves: the weight, or where it is kept in shards an empty place to put it together for a moment.
        self.moved = {parameter: _empty(parameter) if isinstance(parameter, DTensor) else parameter for parameter in self.names}
        self.optimizers = self._new_optimizers()

    @staticmethod
    def at_work(step: int) -> bool:
        """Whether the served model is attacked at this step of a phase."""
        return step % CYCLE != 0

    @contextmanager
    def in_place(self) -> Iterator[dict[str, torch.Tensor]]:
        """Inside, the model has the attacked weights; a backward pass belongs inside, since it reads them again.

        Gives the base's own weights of the output layer, by their names in it, for what a loss compares with.
        """
        self._exchange()
        try:
            yield {name: whole(self.attacked[self.names[weight]]) for name, weight in self.head.items() if weight in self.names}
        finally:
            self._exchange()

    def step(self, passes: Sequence[Sequence["Piece"]], totals: Mapping[str, int], step: int) -> None:
        """One step of Adafactor on the harmful answers in each of `passes` (one, unless they exceed `tokens_per_pass`); the defender's
        gradients stay untouched."""
        taken = step - step // CYCLE - 1  # of its own steps, before this one
        if taken % self.config.relearner_steps == 0:
            for parameter, name in self.names.items():
                self.attacked[name].copy_(parameter.data)
            self.optimizers = self._new_optimizers()
        with self.in_place(), self.objective.training_head(), self._descending():
            for pieces in passes:
                self.objective(pieces, [TERM], totals, {})[TERM.name].backward()
                for parameter in self.names:  # shards get their gradients last, and all at once
                    if parameter.grad is not None:
                        self._descend(parameter)

    @contextmanager
    def _descending(self) -> Iterator[None]:
        """Inside, the base's weights have gradients instead of the adapter's, and move as soon as theirs are complete."""
        for parameter in self.adapter:
            parameter.requires_grad_(False)
        for parameter in self.names:
            parameter.requires_grad_(True)
            if isinstance(parameter, DTensor):
                parameter.grad_dtype = None  # FSDP2 gives a unit's gradients one dtype, that of the adapter in it
        hooks = [parameter.register_post_accumulate_grad_hook(self._descend) for parameter in self.names]
        try:
            yield
        finally:
            for hook, parameter in zip(hooks, self.names, strict=True):
                hook.remove()
                parameter.grad = None
                parameter.requires_grad_(False)
            for parameter in self.adapter:
                parameter.requires_grad_(True)

    @torch.no_grad()
    def _descend(self, parameter: torch.Tensor) -> None:
        """Move a weight and give its gradient up; what is kept in shards is put together for it, one weight at a time."""
        moved = self.moved[parameter]
        if moved is not parameter:
            moved.data, moved.grad = whole(parameter.data), whole(parameter.grad).to(parameter.dtype)
        self.optimizers[parameter].step()
        if moved is not parameter:
            parameter.data.copy_(sharded_like(moved.data, parameter))
            moved.data, moved.grad = moved.data.new_empty(0), None
        parameter.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The attacked weights and the optimizers' moments, for a checkpoint."""
        weights = {f"{WEIGHTS}{name}": whole(value).cpu() for name, value in self.attacked.items()}
        return weights | optimizer_tensors(self._states, self._moved_names, MOMENTS)

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `tensors`."""
        for name, value in self.attacked.items():
            value.copy_(sharded_like(tensors[f"{WEIGHTS}{name}"], value))
        restore_optimizer(self._states, tensors, self._moved_names, MOMENTS)

    @property
    def _states(self) -> dict[torch.nn.Parameter, dict[str, torch.Tensor]]:
        return {moved: self.optimizers[parameter].state[moved] for parameter, moved in self.moved.items()}

    @property
    def _moved_names(self) -> dict[torch.nn.Parameter, str]:
        return {moved: self.names[parameter] for parameter, moved in self.moved.items()}

    def _exchange(self) -> None:
        """The model's weights for the attacked ones, and back. Shards keep their place, since FSDP2 gathers from there."""
        for parameter, name in self.names.items():
            if isinstance(parameter, DTensor):
                given = parameter.data.clone()
                parameter.data.copy_(self.attacked[name])
                self.attacked[name] = given
            else:
                parameter.data, self.attacked[name] = self.attacked[name], parameter.data
        give_up(self.objective)

    def _new_optimizers(self) -> dict[torch.nn.Parameter, torch.optim.Optimizer]:
        """One for each weight, so that each can take its step alone."""
        settings = {"lr": self.config.relearner_lr, "weight_decay": 0.0}
        return {parameter: torch.optim.Adafactor([moved], **settings) for parameter, moved in self.moved.items()}


def _empty(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(0, dtype=parameter.dtype, device=parameter.device))


def through(terms: Sequence[Term]) -> list[Term]:
    """The terms as they read with the relearner at work: those that resist once more on the attacked weights."""
    return [*terms, *(replace(term, side=RELEARNED, name=f"{term.name}_relearned") for term in terms if term.resists)]
