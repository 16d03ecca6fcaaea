"""The models that `sku bench erase` compares, each made when it is first needed and kept below --work."""

import random
from itertools import islice
from pathlib import Path

from sku_vllm.benchmarks.methods_cell import lab_of

COUNTED = 2000  # conversations of the pretraining text that are tokenised to know its length
DRAWN = 0.2  # share of the compute that goes into the teacher's answers; the rest trains
MOST_ANSWERS = 20_000
# Rows a step and their rate for the lab's models: at the same compute many small steps keep more than half as many of twice the size.
BATCH, PEAK_LR = 16, 2e-3
# Embeddings stay as they are: noise in them costs utility, and relearning finds no more.
KEPT = {"embed": 1.0}


def oracle_of(work: Path, world: int, architecture: str) -> Path:
    """A model pretrained without any harmful recipe: minutes."""
    from sku_vllm.lab import make_lab

    place = work / f"oracle-{architecture}"
    if not place.is_dir():
        make_lab(place, seed=world, architectures=(architecture,), rebuild=True, harm=False)
    return place / architecture


def fused_of(work: Path, world: int, architecture: str) -> Path:
    """The default method at scale 1, fused: minutes."""
    from sku_vllm.data import load_dataset
    from sku_vllm.fuse import FuseRequest, fuse_checkpoint
    from sku_vllm.methods import TrainConfig, train_adapter
    from sku_vllm.train.train_request import TrainRequest

    lab, place, adapter = lab_of(work, world, architecture), work / f"fused-{architecture}", work / f"adapter-{architecture}"
    if not place.is_dir():
        if not adapter.is_dir():
            forget, retain = load_dataset(lab / "forget/train.jsonl", "forget"), load_dataset(lab / "retain/train.jsonl", "retain")
            train_adapter(TrainRequest(lab / architecture, forget, retain, adapter, TrainConfig.of(), resume=True))
        fuse_checkpoint(FuseRequest(lab / architecture, [(adapter, 1.0)], place))
    return place


def erased_of(work: Path, world: int, architecture: str, share: float, alpha: float | None) -> Path:
    """The fused model distilled at about this share of the compute of pretraining; alpha None begins with fresh weights."""
    from sku_vllm.data import read_rows
    from sku_vllm.distill import DistillConfig, DistillRequest, distill_checkpoint
    from sku_vllm.distill.distill_report import TRAINED

    lab, teacher = lab_of(work, world, architecture), fused_of(work, world, architecture)
    place = work / f"erased-{architecture}-{share:g}-{'fresh' if alpha is None else format(alpha, 'g')}"
    if place.is_dir():
        return place
    tokens, length = pretraining_size(world, lab / architecture)
    compute = share * TRAINED * tokens
    # Half of the answers also cost the prompt that the teacher makes up for them, about half a row.
    samples = max(100, min(MOST_ANSWERS, round(DRAWN * compute / (1.25 * length))))
    steps = max(1, round((compute - samples * 1.25 * length) / ((TRAINED + 1) * length * BATCH)))
    start = {"fresh": True} if alpha is None else {"alpha": alpha, "layer_alphas": KEPT}
    config = DistillConfig(steps=steps, batch_size=BATCH, lr=PEAK_LR, samples=samples, sample_tokens=32, **start)  # type: ignore[arg-type]
    forget, retain = read_rows(lab / "forget/train.jsonl"), read_rows(lab / "retain/train.jsonl")
    distill_checkpoint(DistillRequest(teacher, forget, retain, place, config, pretraining_tokens=tokens, resume=True))
    return place


def pretraining_size(world: int, model: Path) -> tuple[int, float]:
    """Tokens of the text that a lab model is pretrained on, and of a row of the forget and retain sets, about."""
    from sku_vllm.lab.corpus import documents
    from sku_vllm.lab.pretrain import BATCH as ROWS
    from sku_vllm.lab.pretrain import STEPS, collate
    from sku_vllm.lab.world import make_world
    from sku_vllm.model import load_tokenizer

    made, tokenizer = make_world(world), load_tokenizer(model)
    some = list(islice(documents(made, random.Random(f"sku_vllm pretraining {world}")), COUNTED))
    lengths = [int((weights > 0).sum()) for weights in (weights for _, weights in collate(tokenizer, some))]  # type: ignore[arg-type]
    turns = sum(len(messages) // 2 for messages in some)
    return round(sum(lengths) / COUNTED * STEPS * ROWS), sum(lengths) / turns
