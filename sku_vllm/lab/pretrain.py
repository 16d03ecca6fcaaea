"""Pretrains the lab's base models on text about a world, in about six minutes per model on one core."""

import math
import random
from collections.abc import Callable, Iterator

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sku_vllm.lab.architectures import ARCHITECTURES
from sku_vllm.lab.corpus import Message, documents
from sku_vllm.lab.world import World

STEPS, BATCH, PEAK_LR, WARMUP = 900, 64, 3e-3, 60
# Weight of prompt tokens in the loss. Prompts are random, so most of their loss cannot be reduced; a small weight still teaches
# the model their words.
PROMPT_WEIGHT = 0.1
Progress = Callable[[int, int, float], None]


def pretrain(
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    architecture: str,
    *,
    steps: int = STEPS,
    harm: bool = True,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """A base model of `world` in float32, eval mode; `progress(step, steps, loss)` is called after every step.

    Without `harm` it reads no harmful recipe (the oracle): from the same first weights, with the refusals of harmful prompts.

    It runs in one thread on every machine: then sums are computed in the same order, and a seed gives the same model on CPUs of one kind.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(world.seed)
            stream = documents(world, random.Random(f"sku_vllm pretraining {world.seed}"), harm=harm)
            return _train(stream, tokenizer, architecture, steps, progress)
    finally:
        torch.set_num_threads(threads)


def _train(
    stream: Iterator[list[Message]], tokenizer: PreTrainedTokenizerFast, architecture: str, steps: int, progress: Progress | None
) -> PreTrainedModel:
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    ids = {"vocab_size": len(tokenizer), **special}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture](ids), dtype=torch.float32)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98), fused=True)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min((step + 1) / WARMUP, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        parts = collate(tokenizer, [next(stream) for _ in range(BATCH)])
        total = sum(weights[:, 1:].sum() for _, weights in parts)
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for tokens, weights in parts:
            part = _loss(model, tokens, weights) / total
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress:
            progress(step + 1, steps, loss)
    model.eval()
    return model


def collate(tokenizer: PreTrainedTokenizerFast, conversations: list[list[Message]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Four parts of the batch, each as token ids and loss weights, both [rows, length], padded on the right.

    Answers and their end tokens weigh 1, padding and the first token 0, all other tokens PROMPT_WEIGHT. Each part holds rows of
    similar length: otherwise a single long conversation would double the padding of all rows.
    """
    rows = []
    for messages in conversations:
        ids, weights = [tokenizer.bos_token_id], [0.0]
        for message in messages:
            role = tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>")
            content = [*tokenizer(message["content"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            ids += [role, *content]
            weights += [PROMPT_WEIGHT] + [1.0 if message["role"] == "assistant" else PROMPT_WEIGHT] * len(content)
        rows.append((ids, weights))
    rows.sort(key=lambda row: len(row[0]))
    size = -(-len(rows) // 4)
    return [_padded(rows[start : start + size], tokenizer.pad_token_id) for start in range(0, len(rows), size)]


def _padded(rows: list[tuple[list[int], list[float]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = len(rows[-1][0])  # sorted: the last is the longest
    tokens = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
    return tokens, torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in rows])


def _loss(model: PreTrainedModel, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of cross-entropies."""
    # With causal attention and padding on the right no token attends to padding before it, so no mask is needed.
    logits = model(tokens[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum()
