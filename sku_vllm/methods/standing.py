"""Where a run stands, as a checkpoint has it: taken out of a run, and put back into a new one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sku_vllm.data import Encoded
from sku_vllm.methods import rounds
from sku_vllm.methods.forward import KEPT
from sku_vllm.methods.sharding import sharded_like, whole
from sku_vllm.methods.training_state import TrainingState, optimizer_tensors, restore_optimizer

if TYPE_CHECKING:
    from sku_vllm.methods.run import Run


def state_of(run: "Run") -> TrainingState:
    """Everything the next step depends on; every process has to ask, since shards are gathered."""
    kept = {name: p for name, p in run.model.named_parameters() if "lora_" in name or p.requires_grad}
    tensors = {f"model/{name}": whole(p.detach()).cpu() for name, p in kept.items()}
    tensors |= optimizer_tensors(run.optimizer.state, run.names)
    tensors |= run.relearner.tensors() if run.relearner else {}
    tensors["random"] = torch.get_rng_state()
    progress = {
        "at": run.at, "tokens": run.tokens, "examples": run.examples, "seconds": run.seconds, "refusal_share": run.refusal_share,
        "samples": _plain(run.batches.samples), "unasked": _plain(run.batches.unasked), "folded": run.passes.folded,
    }
    return TrainingState(tensors, progress)


def restore(run: "Run", state: TrainingState) -> None:
    """Put a new run where the state was taken."""
    progress = state.progress
    run.passes.folded = dict(progress["folded"])
    for name in [*progress["folded"], *([KEPT] if any(f".{KEPT}." in key for key in state.tensors) else [])]:
        rounds.set_aside(run.model, name)
    parameters = dict(run.model.named_parameters())
    with torch.no_grad():
        for key, value in state.tensors.items():
            if key.startswith("model/"):
                parameter = parameters[key.removeprefix("model/")]
                parameter.copy_(sharded_like(value, parameter))
    restore_optimizer(run.optimizer.state, state.tensors, run.names)
    if any(key.startswith("relearner/") for key in state.tensors):
        run.relearner = run.new_relearner()
        run.relearner.restore(state.tensors)
    torch.set_rng_state(state.tensors["random"])
    run.at, run.tokens, run.examples, run.seconds = (progress[key] for key in ("at", "tokens", "examples", "seconds"))
    run.refusal_share = progress["refusal_share"]
    run.batches.samples, run.batches.unasked = ([Encoded(ids, start) for ids, start in progress[kind]] for kind in ("samples", "unasked"))


def _plain(rows: Sequence[Encoded]) -> list[list[Any]]:
    return [[row.ids, row.answer_start] for row in rows]
