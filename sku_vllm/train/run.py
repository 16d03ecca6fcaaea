"""One training run in memory: model, adapter, optimizer and adversary. Open this file to follow one training step.

What a run writes to disk is in `run_state.py`.
"""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from sku_vllm.errors import ConfigError, DivergenceError
from sku_vllm.methods.method import Phase, Term
from sku_vllm.methods.registry import METHODS
from sku_vllm.methods.train_config import TrainConfig
from sku_vllm.train import dense_model, rounds, sharding, targets
from sku_vllm.train.adversary import TERM, Adversary, with_attacked
from sku_vllm.train.batches import Batches
from sku_vllm.train.drawing import Drawn
from sku_vllm.train.forward import CHECKPOINTING, KEPT, Forward
from sku_vllm.train.lora_model import with_adapter
from sku_vllm.train.objective import Objective, Piece, total
from sku_vllm.train.passes import Rows, Turn, forward_tokens, in_step, rows_of_process, split_into_passes

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Run:
    """Everything a step changes, and the step itself.

    Attributes:
        config, batches, accelerator, tokenizer, path: what the run was made with; `path` is the directory of the base.
        method, phases: what is trained, see `Method`. total: steps of all phases. at: steps done so far, over all phases.
        model: a PEFT model, or the plain model of a dense run. passes: computes its hidden states.
        objective: computes the losses; wrapped by DDP or FSDP2 if there are several processes. bare: without the wrapper.
        names: parameters that train, and their names. optimizer: of the current phase.
        good: copies of the parameters before the last step, whose losses were finite; empty in a dense run.
        adversary: None until a phase that has one reaches its first active step.
        tokens, examples, seconds: forward tokens (references included), rows and training time so far, over all processes.
        drawn: what it has drawn of its base (drawing.py).
    """

    def __init__(
        self, path: Path, config: TrainConfig, batches: Batches, accelerator: "Accelerator", tokenizer: "PreTrainedTokenizerBase"
    ) -> None:
        """Load the base at `path` and put a fresh adapter on it.

        Raises:
            ConfigError: fewer rows a step than processes, or settings that the model or the machine cannot follow.
        """
        self.config, self.batches, self.accelerator, self.tokenizer, self.path = config, batches, accelerator, tokenizer, path
        self.method = METHODS[config.method]
        self.phases = self.method.phases(config)
        self.total = sum(phase.steps for phase in self.phases)
        self.at = self.tokens = self.examples = 0
        self.seconds = 0.0
        self.adversary: Adversary | None = None
        if accelerator.num_processes > config.batch_size:
            raise ConfigError(
                f"--batch-size {config.batch_size}: counts rows over all {accelerator.num_processes} processes, and each needs one; "
                f"give at least {accelerator.num_processes}"
            )
        torch.manual_seed(config.seed)
        self.model: PreTrainedModel | PeftModel
        frozen = None
        if config.full:
            self.model, frozen = dense_model.load(path, config, self.phases, accelerator)
        else:
            self.model = with_adapter(path, config, accelerator)
        self.passes = Forward(self.model, frozen)
        self.drawn = Drawn(batches, self.passes)
        self.passes.choose_packing([row.ids for row in batches.rows("forget" if batches.forget else "retain", 0)])
        if config.gradient_checkpointing:
            self.passes.core.gradient_checkpointing_enable(CHECKPOINTING)
            self.model.train()
        self.parameters = sum(parameter.numel() for name, parameter in self.model.named_parameters() if "lora_" not in name)
        self.objective = sharding.prepare(Objective(self.passes, train_head=config.full), accelerator, self.phases)
        self.bare = accelerator.unwrap_model(self.objective)
        self.names = {parameter: name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.trainable = sum(parameter.numel() for parameter in self.names)
        self.optimizer = self._new_optimizer()
        self.good: list[torch.Tensor] = []

    @property
    def done(self) -> bool:
        """Whether every step has been taken."""
        return self.at >= self.total

    @property
    def lora(self) -> PeftModel:
        """The model of a run that trains an adapter."""
        assert isinstance(self.model, PeftModel)
        return self.model

    def place(self, at: int) -> tuple[Phase, int, int]:
        """The phase of step `at` of the run, the phase's number, and the step within it."""
        for number, phase in enumerate(self.phases):
            if at < phase.steps:
                return phase, number, at
            at -= phase.steps
        return self.phases[-1], len(self.phases) - 1, self.phases[-1].steps

    def step(self) -> dict[str, Any]:
        """Take one optimizer step; at the end of a phase also end the phase. Returns the history entry.

        Raises:
            DivergenceError: a loss or the gradient is not finite; the step is not taken.
        """
        begun = time.perf_counter()
        phase, number, at = self.place(self.at)
        if phase.look_at == at:
            self.drawn.look(self.config, self.bare.gathered, targets.NEEDED_EARLY)
        if phase.sample_at == at:
            self.drawn.draw(self.config, self.bare.gathered)
        rate = self.config.rate(at, phase.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        terms, attack_tokens = self.attack(phase, at, [term for term in phase.terms if at >= term.begin])
        values, tokens = self.gradients(terms)
        norm = self._clip()
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad or not math.isfinite(norm):
            raise DivergenceError(f"step {self.at + 1} of {self.total}: {bad[0] if bad else 'the gradient'} is not finite")
        if not self.config.full:
            self.good = [parameter.detach().clone() for parameter in self.names]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.at += 1
        if at + 1 == phase.steps:
            self.end_phase(phase, number)
        seconds = time.perf_counter() - begun
        self.seconds += seconds
        tokens += attack_tokens
        self.tokens += tokens
        return {
            "step": self.at,
            "phase": number,
            "losses": values,
            "lr": rate,
            "gradient_norm": norm,
            "tokens": tokens,
            "seconds": round(seconds, 4),
        }

    def size(self, at: int) -> int:
        """Forward tokens of step `at`, those of the adversary's own step included."""
        phase, _, within = self.place(at)
        terms = [term for term in phase.terms if within >= term.begin]
        rows: Rows = {kind: self.batches.rows(kind, at) for kind in {"forget", *(term.rows for term in terms)}}
        if not (phase.adversary and Adversary.at_work(within)):
            return forward_tokens(terms, rows)
        return forward_tokens(with_attacked(terms), rows) + forward_tokens([TERM], rows)

    def attack(self, phase: Phase, at: int, terms: Sequence[Term]) -> tuple[Sequence[Term], int]:
        """Take a step of the adversary, if it is active at step `at` of the phase.

        Returns:
            The terms as this training step counts them, and the forward tokens of the adversary's step (0 without one).
        """
        if not (phase.adversary and Adversary.at_work(at)):
            return terms, 0
        self.adversary = self.adversary or self.new_adversary()
        rows = {"forget": self.batches.rows("forget", self.at)}
        self.adversary.step(self._passes([TERM], rows), {TERM.name: total(TERM, rows["forget"])}, at)
        return with_attacked(terms), forward_tokens([TERM], rows)

    def new_adversary(self) -> Adversary:
        """An adversary that starts from the model as it is."""
        return Adversary(self.bare, self.config)

    def gradients(self, terms: Sequence[Term]) -> tuple[dict[str, float], int]:
        """Accumulate the gradients of every term over this process's rows of the step.

        Returns:
            Each term's value over all processes, and the step's forward tokens.
        """
        rows: Rows = {kind: self.batches.rows(kind, self.at) for kind in {term.rows for term in terms}}
        totals = {term.name: total(term, rows[term.rows]) for term in terms}
        world = self.accelerator.num_processes
        turns = self._turns(terms, rows)
        values = {term.name: torch.zeros((), device=self.accelerator.device) for term in terms}
        weights = {term.name: term.weight for term in terms}
        for turn in turns:
            with _sync(self.accelerator, self.objective, turn is turns[-1]):
                references = self.bare.gathered(partial(self.bare.references, turn.pieces, terms))
                with self.adversary.in_place() if self.adversary and turn.attacked else nullcontext() as head:
                    shares = self.objective(turn.pieces, terms, totals, references, head)
                    # DDP and FSDP average gradients over processes; a part is already divided by the whole step's total.
                    loss = sum(weights[name] * part for name, part in shares.items()) * world * turn.counts
                    self.accelerator.backward(loss)
                for name, part in shares.items():
                    values[name] += part.detach().float() * turn.counts
        if world > 1:
            values = self.accelerator.reduce(values)
        self.examples += sum(map(len, rows.values()))
        return {name: float(value) for name, value in values.items()}, forward_tokens(terms, rows)

    def _turns(self, terms: Sequence[Term], rows: Rows) -> list[Turn]:
        """This process's forward passes of a step; as many as every other process takes, where weights are kept in shards."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = self._passes(terms, rows_of_process(rows, rank, world))
        others = range(world) if self.accelerator.is_fsdp2 else ()
        return in_step(mine, [mine, *(self._passes(terms, rows_of_process(rows, other, world)) for other in others)])

    def _passes(self, terms: Sequence[Term], rows: Rows) -> list[list[Piece]]:
        return split_into_passes(terms, rows, self.config.tokens_per_pass, packed=self.passes.packed)

    def _clip(self) -> float:
        limit = self.config.clip or float("inf")
        return float(sharding.whole(self.accelerator.clip_grad_norm_(self.objective.parameters(), limit)))

    def end_phase(self, phase: Phase, number: int) -> None:
        """Subtract the phase's delta or keep its adapter as a reference, if the phase says so, and start the next adapter."""
        if phase.fold is not None:
            rounds.fold(self.passes, self.lora, phase.fold, self.config.seed * 1000 + number + 1)
        elif phase.keep:
            rounds.set_aside(self.lora, KEPT)
            rounds.fresh_adapter(self.lora, self.config.seed * 1000 + number + 1)
        else:
            return
        self.optimizer, self.good = self._new_optimizer(), []

    def _new_optimizer(self) -> torch.optim.Optimizer:
        # Not prepared by accelerate: nothing in it needs to be, and its state is saved by parameter name.
        return torch.optim.AdamW(list(self.names), lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True)

    def restore_good(self) -> None:
        """Put back the parameters of the last step whose losses and gradients were finite."""
        with torch.no_grad():
            for parameter, value in zip(self.names, self.good, strict=False):
                parameter.copy_(value)


def _sync(accelerator: "Accelerator", module: torch.nn.Module, last: bool) -> Any:
    """Reduce gradients over processes only in the last pass of a step."""
    return nullcontext() if last else accelerator.no_sync(module)
