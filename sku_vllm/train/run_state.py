"""Write a run's checkpoints while it trains, restore them, and write the adapter at the end.

Open this file to add something that a resumed run needs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sku_vllm.data import Encoded
from sku_vllm.train import dense_model, rounds, saving
from sku_vllm.train.adversary import WEIGHTS
from sku_vllm.train.checkpointing import TrainingState, optimizer_tensors, restore_optimizer
from sku_vllm.train.forward import KEPT
from sku_vllm.train.run import Run
from sku_vllm.train.sharding import sharded_like, whole
from sku_vllm.train.targets import Look


def save_checkpoint(run: Run, partial: Path) -> None:
    """Write the run's checkpoint into `partial`. Every process has to call it, since shards are gathered; the main process writes."""
    state = state_of(run)
    if run.accelerator.is_main_process:
        state.write(partial)


def state_of(run: Run) -> TrainingState:
    """Everything the next step depends on. Every process has to call it, since shards are gathered."""
    kept = {name: p for name, p in run.model.named_parameters() if "lora_" in name or p.requires_grad}
    tensors = {f"model/{name}": whole(p.detach()).cpu() for name, p in kept.items()}
    tensors |= optimizer_tensors(run.optimizer.state, run.names)
    tensors |= run.adversary.tensors() if run.adversary else {}
    tensors["random"] = torch.get_rng_state()
    progress = {
        "at": run.at,
        "tokens": run.tokens,
        "examples": run.examples,
        "seconds": run.seconds,
        "refusal_share": run.drawn.refusal_share,
        "looks": [look.to_json() for look in run.drawn.looks],
        "samples": _plain(run.batches.samples),
        "unasked": _plain(run.batches.self_generated),  # existing checkpoints have this key
        "border": _plain(run.batches.border),
        "folded": run.passes.folded,
    }
    return TrainingState(tensors, progress)


def restore(run: Run, state: TrainingState) -> None:
    """Give a new run the state of a checkpoint, so that it continues there."""
    progress = state.progress
    run.passes.folded = dict(progress["folded"])
    for name in [*progress["folded"], *([KEPT] if any(f".{KEPT}." in key for key in state.tensors) else [])]:
        rounds.set_aside(run.lora, name)
    parameters = dict(run.model.named_parameters())
    with torch.no_grad():
        for key, value in state.tensors.items():
            if key.startswith("model/"):
                parameter = parameters[key.removeprefix("model/")]
                parameter.copy_(sharded_like(value, parameter))
    restore_optimizer(run.optimizer.state, state.tensors, run.names)
    if any(key.startswith(WEIGHTS) for key in state.tensors):
        run.adversary = run.new_adversary()
        run.adversary.restore(state.tensors)
    torch.set_rng_state(state.tensors["random"])
    run.at, run.tokens, run.examples, run.seconds = (progress[key] for key in ("at", "tokens", "examples", "seconds"))
    run.drawn.refusal_share, run.drawn.looks = progress["refusal_share"], [Look(**look) for look in progress["looks"]]
    run.batches.samples, run.batches.self_generated, run.batches.border = (
        [Encoded(ids, start) for ids, start in progress[kind]] for kind in ("samples", "unasked", "border")
    )


def write_adapter(run: Run, directory: Path, run_json: Mapping[str, Any], name: str) -> tuple[float, int]:
    """Write the trained adapter to `directory`; its README calls it `name`.

    Every process has to call it, since shards are gathered; the main process writes.

    Returns:
        The relative error of recompressing ranks (0: exact), and the rank (0 of a dense task vector).
    """
    if run.config.full:
        # A LoRA is trained with the sign of its side. Dense weights of a method on the served side are base − delta themselves, hence −1.
        deltas = dense_model.deltas(run.passes.core, run.path, -1 if run.method.served_side else 1)
        if run.accelerator.is_main_process:
            saving.write_dense(directory, deltas, run_json, name=name)
        return 0.0, 0
    factors, config, error = rounds.combined(run.passes, run.lora)
    if run.accelerator.is_main_process:
        saving.write_adapter(directory, factors, config, run_json, name=name)
    return error, config.r


def _plain(rows: Sequence[Encoded]) -> list[list[Any]]:
    return [[row.ids, row.answer_start] for row in rows]
