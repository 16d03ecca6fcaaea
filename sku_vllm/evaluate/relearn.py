"""Fine-tuning an edited model again, and how much of what it had lost comes back."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sku_vllm.data import Encoded, PromptTemplate, Row
from sku_vllm.errors import DataError, DivergenceError
from sku_vllm.model import context_length


def fine_tune(
    model: PreTrainedModel, encoded: Sequence[Encoded], stops: Sequence[int], *, lr: float = 1e-4, batch_size: int = 8, seed: int = 0,
) -> Iterator[int]:
    """Train all weights on the answers of rows (`encode_all`) with AdamW, constant rate, clip 1; yields at every step count in `stops`.

    The model is in eval mode whenever this yields. Gradients and optimizer state are gone when it ends.

    Raises:
        DivergenceError: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    order = _shuffled(len(encoded), seed)
    model.requires_grad_(True)
    try:
        for step in range(1, max(stops) + 1):
            with torch.enable_grad():
                loss = _answer_loss(model, [encoded[next(order)] for _ in range(batch_size)])
                loss.backward()
            if not math.isfinite(float(loss.detach())):
                raise DivergenceError(f"relearning diverged at step {step}; lower --lr")
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step in stops:
                yield step
    finally:
        model.requires_grad_(False)


def encode_all(model: PreTrainedModel, template: PromptTemplate, rows: Sequence[Row]) -> list[Encoded]:
    """The rows as they are learned: answers end where the model's context does.

    Raises:
        DataError: a prompt that leaves no room for an answer.
    """
    limit = context_length(model.config)
    encoded = [template.encode(row, limit) for row in rows]
    for number, (row, item) in enumerate(zip(rows, encoded, strict=True), 1):
        if len(item.ids) == item.answer_start:
            raise DataError(
                f"relearning: row {row.id or number}: its prompt has {item.answer_start} tokens and the model's context is {limit}; "
                "shorten or remove it"
            )
    return encoded


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """Row numbers for ever, a new order each time all have been seen."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _answer_loss(model: PreTrainedModel, batch: Sequence[Encoded]) -> Tensor:
    """Mean cross-entropy of the answer tokens, terminator included."""
    longest = max(len(item.ids) for item in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, item in enumerate(batch):
        length = len(item.ids)
        ids[row, :length] = torch.tensor(item.ids)
        mask[row, :length] = 1
        labels[row, item.answer_start : length] = torch.tensor(item.answer_ids)
    ids, mask, labels = (part.to(model.device) for part in (ids, mask, labels))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
