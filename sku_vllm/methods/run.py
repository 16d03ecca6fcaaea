"""A run in memory: model, adapter, optimizer, and where it stands."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from sku_vllm.errors import ConfigError, DivergenceError
from sku_vllm.methods import METHODS, dense, rounds, sampling, saving, sharding, standing
from sku_vllm.methods.adapted import with_adapter
from sku_vllm.methods.batches import Batches
from sku_vllm.methods.config import TrainConfig
from sku_vllm.methods.forward import CHECKPOINTING, KEPT, Forward
from sku_vllm.methods.memory import peak_resident
from sku_vllm.methods.method import Phase, Term
from sku_vllm.methods.objective import Objective, Piece, total
from sku_vllm.methods.plan import Rows, forward_tokens, in_step, plan, share
from sku_vllm.methods.relearner import TERM, Relearner, through
from sku_vllm.methods.training_state import TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase


class Run:
    """Everything a step changes. `at` counts the steps done over all phases.

    Attributes:
        passes: the model as packed forward passes. phases: what the method asks for. total: steps of all phases.
        tokens, examples, seconds: forward tokens (adapter-off passes included), rows and training time so far, over all processes.
    """

    def __init__(
        self, path: Path, config: TrainConfig, batches: Batches, accelerator: "Accelerator", tokenizer: "PreTrainedTokenizerBase"
    ) -> None:
        self.config, self.batches, self.accelerator, self.tokenizer, self.path = config, batches, accelerator, tokenizer, path
        self.method = METHODS[config.method]
        self.phases = self.method.phases(config)
        self.total = sum(phase.steps for phase in self.phases)
        self.at = self.tokens = self.examples = 0
        self.seconds = 0.0
        self.refusal_share: float | None = None
        self.relearner: Relearner | None = None
        if accelerator.num_processes > config.batch_size:
            raise ConfigError(
                f"--batch-size {config.batch_size}: counts rows over all {accelerator.num_processes} processes, and each needs one; "
                f"give at least {accelerator.num_processes}"
            )
        torch.manual_seed(config.seed)
        if config.full:
            self.model, frozen = dense.load(path, config, self.phases, accelerator)
        else:
            self.model, frozen = with_adapter(path, config, accelerator), None
        self.passes = Forward(self.model, frozen)
        probe = [row.ids for row in batches.rows("forget" if batches.forget else "retain", 0)]
        self.passes.choose_packing(probe)
        if config.gradient_checkpointing:
            self.passes.core.gradient_checkpointing_enable(CHECKPOINTING)
            self.model.train()
        self.parameters = sum(parameter.numel() for name, parameter in self.model.named_parameters() if "lora_" not in name)
        self.objective = sharding.prepare(Objective(self.passes, train_head=config.full), accelerator)
        self.bare = accelerator.unwrap_model(self.objective)
        self.names = {parameter: name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.trainable = sum(parameter.numel() for parameter in self.names)
        self.optimizer = self._new_optimizer()
        self.good: list[torch.Tensor] = []

    @property
    def done(self) -> bool:
        return self.at >= self.total

    def place(self, at: int) -> tuple[Phase, int, int]:
        """Phase, its number, and the step within it."""
        for number, phase in enumerate(self.phases):
            if at < phase.steps:
                return phase, number, at
            at -= phase.steps
        return self.phases[-1], len(self.phases) - 1, self.phases[-1].steps

    def step(self) -> dict[str, Any]:
        """One optimizer step, and what follows the last one of a phase. Returns the history entry.

        Raises:
            DivergenceError: a loss or the gradient is not finite; the step is not taken.
        """
        begun = time.perf_counter()
        phase, number, at = self.place(self.at)
        if phase.sample_at == at:
            self._draw_samples()
        rate = self.config.rate(at, phase.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        terms, relearned = self._relearn(phase, at, [term for term in phase.terms if at >= term.begin])
        values, tokens = self._gradients(terms)
        norm = self._clip()
        bad = [name for name, value in values.items() if not _finite(value)]
        if bad or not _finite(norm):
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
        tokens += relearned
        self.tokens += tokens
        return {
            "step": self.at, "phase": number, "losses": values, "lr": rate, "gradient_norm": norm, "tokens": tokens,
            "seconds": round(seconds, 4),
        }

    def size(self, at: int) -> int:
        """Forward tokens of step `at`, an adversary's own included."""
        phase, _, within = self.place(at)
        terms = [term for term in phase.terms if within >= term.begin]
        rows = {kind: self.batches.rows(kind, at) for kind in {"forget", *(term.rows for term in terms)}}
        if not (phase.relearner and Relearner.at_work(within)):
            return forward_tokens(terms, rows)
        return forward_tokens(through(terms), rows) + forward_tokens([TERM], rows)

    def _relearn(self, phase: Phase, at: int, terms: Sequence[Term]) -> tuple[Sequence[Term], int]:
        """The terms as this step sees them; where an adversary is at work, it first takes a step of its own, of so many tokens."""
        if not (phase.relearner and Relearner.at_work(at)):
            return terms, 0
        self.relearner = self.relearner or self.new_relearner()
        rows = {"forget": self.batches.rows("forget", self.at)}
        totals = {TERM.name: total(TERM, rows["forget"])}
        self.relearner.step(self._plan([TERM], rows), totals, at)
        return through(terms), forward_tokens([TERM], rows)

    def _gradients(self, terms: Sequence[Term]) -> tuple[dict[str, float], int]:
        """Accumulate the gradients of every term over this process's share of the step; the terms' values over all processes."""
        rows = {kind: self.batches.rows(kind, self.at) for kind in {term.rows for term in terms}}
        totals = {term.name: total(term, rows[term.rows]) for term in terms}
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        passes = self._plan(terms, share(rows, rank, world))
        others = range(world) if self.accelerator.is_fsdp2 else ()
        turns = in_step(passes, [passes, *(self._plan(terms, share(rows, other, world)) for other in others)])
        values = {term.name: torch.zeros((), device=self.accelerator.device) for term in terms}
        weights = {term.name: term.weight for term in terms}
        for turn in turns:
            with _sync(self.accelerator, self.objective, turn is turns[-1]):
                references = self.bare.gathered(partial(self.bare.references, turn.pieces, terms))
                with self.relearner.in_place() if turn.attacked else nullcontext() as head:
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

    def new_relearner(self) -> Relearner:
        """An adversary of the model as it is."""
        return Relearner(self.bare, self.config)

    def _plan(self, terms: Sequence[Term], rows: Rows) -> list[list[Piece]]:
        return plan(terms, rows, self.config.tokens_per_pass, packed=self.passes.packed)

    def _clip(self) -> float:
        limit = self.config.clip or float("inf")
        return float(sharding.whole(self.accelerator.clip_grad_norm_(self.objective.parameters(), limit)))

    def end_phase(self, phase: Phase, number: int) -> None:
        """Fold the phase's delta in or set it aside, as the method asks, and start the next adapter."""
        if phase.fold is not None:
            rounds.fold(self.passes, self.model, phase.fold, self._seed(number + 1))
        elif phase.keep:
            rounds.set_aside(self.model, KEPT)
            rounds.fresh_adapter(self.model, self._seed(number + 1))
        else:
            return
        self.optimizer, self.good = self._new_optimizer(), []

    def _seed(self, phase: int) -> int:
        return self.config.seed * 1000 + phase

    def _new_optimizer(self) -> torch.optim.Optimizer:
        # Not prepared by accelerate: nothing in it needs to be, and its state is saved by parameter name.
        return torch.optim.AdamW(list(self.names), lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True)

    def _draw_samples(self) -> None:
        prompts = {tuple(self.batches.template.prompt_ids(row)): None for row in self.batches.forget}
        order = self.batches._random("prompts").permutation(len(prompts))
        listed, template = list(map(list, prompts)), self.batches.template
        shuffled = [listed[number] for number in order]
        samples = self.bare.gathered(partial(sampling.draw_contrastive, self.passes, shuffled, self.config, template.stop_ids))
        unasked = partial(sampling.draw_unasked, self.passes, listed, self.config, template)
        self.batches.samples, self.batches.unasked = samples, self.bare.gathered(unasked) if self.config.unasked_weight else []
        self.refusal_share = fmean(sampling.refusals(samples, self.tokenizer))
        sampling.require_refusals(self.refusal_share, self.config.method)

    def agree(self, due: bool) -> bool:
        """Whether the main process finds a checkpoint due; clocks differ between processes."""
        if self.accelerator.num_processes == 1:
            return due
        from accelerate.utils import broadcast

        return bool(broadcast(torch.tensor(int(due), device=self.accelerator.device)).item())

    def save(self, partial: Path) -> None:
        """Write the checkpoint (main process; the others help to gather it)."""
        state = standing.state_of(self)
        if self.accelerator.is_main_process:
            state.write(partial)

    def load(self, state: TrainingState) -> None:
        """Continue from a checkpoint."""
        standing.restore(self, state)

    def restore_good(self) -> None:
        """Put back the parameters of the last step whose losses and gradients were finite."""
        with torch.no_grad():
            for parameter, value in zip(self.names, self.good, strict=False):
                parameter.copy_(value)

    def write_adapter(self, directory: Path, run_json: Mapping[str, Any], name: str) -> tuple[float, int]:
        """Write what training has found to `directory`; returns the error of recompressing ranks (0: exact) and the rank."""
        if self.config.full:
            # An adapter is trained at its side; dense weights that are the served model hold base − delta.
            deltas = dense.deltas(self.passes.core, self.path, -1 if self.method.served_side else 1)
            if self.accelerator.is_main_process:
                saving.write_dense(directory, deltas, run_json, name=name)
            return 0.0, 0
        factors, config, error = rounds.combined(self.passes, self.model)
        if self.accelerator.is_main_process:
            saving.write_adapter(directory, factors, config, run_json, name=name)
        return error, config.r

    def peak_memory(self) -> int:
        """Bytes: most memory allocated on the GPU, or resident in this process."""
        if self.accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return peak_resident()


def _sync(accelerator: "Accelerator", module: torch.nn.Module, last: bool) -> Any:
    """Gradients cross processes once a step, with its last pass."""
    return nullcontext() if last else accelerator.no_sync(module)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
