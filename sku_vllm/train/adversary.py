"""A simulated attacker, the adversary, that fine-tunes the served model on harmful answers during training, so that it learns to resist.

The adversary trains a copy of all base weights (embeddings, norms and biases too, as someone with a checkpoint could); training proper, the
defender, trains the adapter alone. At two of every three training steps the adversary first takes a gradient step on harmful answers. Then
the terms that resist are computed twice, on the plain and on the attacked weights (Side.ATTACKED). After `relearner_steps` of its steps it
starts over from the base, so that the defender meets the early steps of an attack. This is first-order adversarial training as in TAR
(Tamirisa et al. 2024, arXiv 2408.00761), but with one attacker that goes on from step to step instead of an inner loop in each.

Memory: the weights a second time, and one gradient. Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) keeps a row and a column of second
moments instead of two moments for each weight, and a weight is updated, and its gradient freed, as soon as the gradient is complete.

What its steps change adds up over the layers, so each layer gets its share of `relearner_lr`: with the lab's 8e-3 on each of the 30 layers
of SmolLM2-135M the adversary's own loss rose from 2.7 to 5 nats in three steps (in bfloat16 to 20), and the defender learned from a broken
model; with a tenth of that it falls.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from sku_vllm.methods import losses
from sku_vllm.methods.method import Side, Term
from sku_vllm.train.checkpointing import States, optimizer_tensors, restore_optimizer
from sku_vllm.train.forward import output_layer
from sku_vllm.train.sharding import give_up, sharded_like, whole

if TYPE_CHECKING:
    from sku_vllm.methods.train_config import TrainConfig
    from sku_vllm.train.objective import Objective, Piece

CYCLE = 3  # at the first of every 3 training steps the adversary is idle
WEIGHTS, MOMENTS = "relearner/", "relearner_optimizer/"  # prefixes of its tensors in a checkpoint, which existing checkpoints have
TERM = Term("relearning", 1.0, "forget", Side.ATTACKED, losses.cross_entropy)  # what the adversary minimises


class Adversary:
    """The adversary's copy of the base's weights, and its optimizers. Every process computes the same copy, so none is sent between them.

    Attributes:
        names: the base's floating-point parameters and their names (a quantised base has few of them).
        adapter: the LoRA parameters that the defender trains. head: parameters of the output layer, by their names in it.
        attacked: the adversary's values of the base's parameters, by name; inside `in_place` the base's own
            values, since these are exchanged.
        moved: the parameter that an optimizer updates for each of `names`: itself, or, if it is sharded or bfloat16, an empty parameter
            that holds the gathered weight, in float32 instead of bfloat16, during the update. taken: steps before the current one.
    """

    def __init__(self, objective: "Objective", config: "TrainConfig") -> None:
        self.objective, self.config = objective, config
        floating = [(name, value) for name, value in objective.passes.model.named_parameters() if value.is_floating_point()]
        self.names = {parameter: name for name, parameter in floating if "lora_" not in name}
        self.adapter = [parameter for name, parameter in floating if "lora_" in name and parameter.requires_grad]
        self.layers = int(getattr(objective.passes.core.config.get_text_config(), "num_hidden_layers", 1) or 1)
        self.head = dict(output_layer(objective.passes.core).named_parameters())
        self.attacked = {name: parameter.data.clone() for parameter, name in self.names.items()}
        self.moved = {parameter: _empty(parameter) if _apart(parameter) else parameter for parameter in self.names}
        self.taken = 0
        self.optimizers = self._new_optimizers()

    @staticmethod
    def at_work(step: int) -> bool:
        """Whether the adversary is active at this step of a phase: it takes a step, and terms that resist are computed on its weights."""
        return step % CYCLE != 0

    @contextmanager
    def in_place(self) -> Iterator[dict[str, torch.Tensor]]:
        """Inside, the model computes with the attacked weights; run the backward pass inside too, since it reads the weights again.

        Yields the base's own weights of the output layer, by their names in it, for the logits of references.
        """
        self._exchange()
        try:
            yield {name: whole(self.attacked[self.names[weight]]) for name, weight in self.head.items() if weight in self.names}
        finally:
            self._exchange()

    def step(self, passes: Sequence[Sequence["Piece"]], totals: Mapping[str, int], step: int) -> None:
        """One step of Adafactor on harmful answers for each of `passes`; gradients of the adapter are neither used nor changed.

        Args:
            passes: the pieces of each forward pass; there is one pass unless the answers exceed `tokens_per_pass`.
            totals: what the mean of TERM divides by. step: of the phase, one at which the adversary is active.
        """
        self.taken = step - step // CYCLE - 1
        if self.taken % self.config.relearner_steps == 0:
            for parameter, name in self.names.items():
                self.attacked[name].copy_(parameter.data)
            self.optimizers = self._new_optimizers()
        with self.in_place(), self.objective.training_head(), self._descending():
            for pieces in passes:
                self.objective(pieces, [TERM], totals, {})[TERM.name].backward()
                for parameter in self.names:  # FSDP2 sets the gradients of shards after the pass, all at once
                    if parameter.grad is not None:
                        self._descend(parameter)

    @contextmanager
    def _descending(self) -> Iterator[None]:
        """Inside, the base's weights get gradients and the adapter's do not, and each weight is updated once its gradient is complete."""
        for parameter in self.adapter:
            parameter.requires_grad_(False)
        for parameter in self.names:
            parameter.requires_grad_(True)
            if isinstance(parameter, DTensor):
                parameter.grad_dtype = None  # FSDP2 gives a unit's gradients one dtype, that of the adapter in it
        hooks = [
            parameter.register_post_accumulate_grad_hook(self._descend)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            for parameter in self.names
        ]
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
    def _descend(self, parameter: torch.nn.Parameter) -> None:
        """Update a weight and free its gradient; a sharded weight is gathered for the update, one weight at a time."""
        moved = self.moved[parameter]
        if moved is not parameter:
            assert parameter.grad is not None  # hooks and `step` call this when there is a gradient
            moved.data, moved.grad = whole(parameter.data).to(moved.dtype), whole(parameter.grad).to(moved.dtype)
        self.optimizers[parameter].step()
        if moved is not parameter:
            narrow = moved.data if parameter.dtype == moved.dtype else rounded(moved.data, f"{self.names[parameter]} {self.taken}")
            parameter.data.copy_(sharded_like(narrow, parameter))
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
    def _states(self) -> States:
        return {moved: self.optimizers[parameter].state[moved] for parameter, moved in self.moved.items()}

    @property
    def _moved_names(self) -> dict[torch.nn.Parameter, str]:
        return {moved: self.names[parameter] for parameter, moved in self.moved.items()}

    def _exchange(self) -> None:
        """Exchange the model's weights and `attacked`. Shards are copied, since FSDP2 gathers from the memory they lie in."""
        for parameter, name in self.names.items():
            if isinstance(parameter, DTensor):
                given = parameter.data.clone()
                parameter.data.copy_(self.attacked[name])
                self.attacked[name] = given
            else:
                parameter.data, self.attacked[name] = self.attacked[name], parameter.data
        give_up(self.objective)

    def _new_optimizers(self) -> dict[torch.nn.Parameter, torch.optim.Optimizer]:
        """An optimizer for each weight, so that each can be updated alone."""
        rate = self.config.relearner_lr / self.layers
        return {parameter: torch.optim.Adafactor([moved], lr=rate, weight_decay=0.0) for parameter, moved in self.moved.items()}


def rounded(value: torch.Tensor, seed: str) -> torch.Tensor:
    """float32 values in bfloat16, each rounded up as often as it is near the number above, so that many small steps add up.

    A step of a thousandth of a weight is less than half of bfloat16's spacing: rounded to the nearest, 19 of 20 such steps were lost.

    Args:
        seed: the same one gives the same bits, in every process and in a resumed run.
    """
    generator = torch.Generator(value.device).manual_seed(zlib.crc32(seed.encode()))
    noise = torch.randint(1 << 16, value.shape, generator=generator, device=value.device, dtype=torch.int32)
    return (value.view(torch.int32) + noise).bitwise_and_(-1 << 16).view(torch.float32).to(torch.bfloat16)


def _apart(parameter: torch.nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) or parameter.dtype is torch.bfloat16


def _empty(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    dtype = torch.float32 if parameter.dtype is torch.bfloat16 else parameter.dtype
    return torch.nn.Parameter(torch.empty(0, dtype=dtype, device=parameter.device))


def with_attacked(terms: Sequence[Term]) -> list[Term]:
    """The terms of a step at which the adversary is active: those that resist are added once more, on the attacked weights."""
    return [*terms, *(replace(term, side=Side.ATTACKED, name=f"{term.name}_relearned") for term in terms if term.resists)]
