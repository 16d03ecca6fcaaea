"""Plain fine-tuning on a few rows, of all weights or of a LoRA, as an attacker with little data could do, paused at given step counts."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sku_vllm.data import Encoded, PromptTemplate, Row
from sku_vllm.errors import DataError, DivergenceError
from sku_vllm.model import context_length

LORA_RANK = 16


@contextmanager
def trainable(model: PreTrainedModel, how: str) -> Iterator[list[torch.nn.Parameter]]:
    """What is trained: all weights ("full"), or a new LoRA on all linear layers ("lora"), which the model has inside the block."""
    if how == "full":
        yield list(model.parameters())
        return
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng():  # its factors are drawn
        torch.manual_seed(0)
        wrapped = get_peft_model(model, config)
    try:
        yield [parameter for name, parameter in wrapped.named_parameters() if "lora_" in name]
    finally:
        wrapped.unload()  # type: ignore[operator]  # PEFT forwards it to its tuner
        vars(model).pop("peft_config", None)  # else the next LoRA would be taken for a second one


def fine_tune(
    model: PreTrainedModel,
    encoded: Sequence[Encoded],
    stops: Sequence[int],
    *,
    lr: float = 1e-4,
    batch_size: int = 8,
    seed: int = 0,
    trained: Sequence[torch.nn.Parameter] | None = None,
) -> Iterator[int]:
    """Train on the answers with AdamW, a constant learning rate and gradient norms clipped at 1.

    Yields the step number after each step in `stops`, so that the model can be measured. The model stays in eval mode (no dropout).

    Args:
        encoded: rows from `encode_all`. stops: step counts; the last ends it.
        trained: the parameters to train, from `trainable`; None for all.

    Raises:
        DivergenceError: the loss is not finite.
    """
    weights = list(model.parameters() if trained is None else trained)
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    order = _shuffled(len(encoded), seed)
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for step in range(1, max(stops) + 1):
            with torch.enable_grad():
                loss = _answer_loss(model, [encoded[next(order)] for _ in range(batch_size)])
                torch.autograd.backward(loss)
            if not math.isfinite(float(loss.detach())):
                raise DivergenceError(f"relearning diverged at step {step}; lower --lr")
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step in stops:
                yield step
    finally:
        model.requires_grad_(False)


def encode_all(model: PreTrainedModel, template: PromptTemplate, rows: Sequence[Row]) -> list[Encoded]:
    """The rows as training examples; answers are cut at the model's context length.

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
    """An endless stream of row numbers, reshuffled after each pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _answer_loss(model: PreTrainedModel, batch: Sequence[Encoded]) -> Tensor:
    """Mean cross-entropy (nats) over the answer tokens and the token that ends each answer."""
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
