"""Batched decoding with a KV cache, fast enough for thousands of short answers on two cores.

Prompts are sorted by length and padded on the left; a prompt is prefilled once and its cache copied for every answer wanted
(one greedy, some sampled); rows that are done leave the batch.
"""

import inspect
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sku_vllm.errors import DataError
from sku_vllm.evaluate.backend import Progress
from sku_vllm.model import context_length

# Scoring holds logits of tokens x vocabulary in fp32: 16 Ki tokens of a 32k vocabulary are 2 GB, so batches are cut by this product.
LOGITS_PER_BATCH = 1 << 27
# Leave finished rows in the batch until a quarter of it is done: copying the cache costs about as much as one step.
COMPACT_BELOW = 0.75


class TransformersBackend:
    """A `transformers` causal language model in memory (PEFT-wrapped or not)."""

    def __init__(self, model: PreTrainedModel, *, batch_size: int = 256) -> None:
        self.model = model
        self.batch_size = batch_size
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._config = inner.config.get_text_config()
        self._accepts = set(inspect.signature(inner.forward).parameters)

    @property
    def context_length(self) -> int | None:
        return context_length(self._config)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        seed: int = 0,
        ban_stop: bool = False,
        progress: Progress | None = None,
    ) -> list[list[list[int]]]:
        answers: list[list[list[int]]] = [[] for _ in prompts]
        for batch in _batches([len(prompt) for prompt in prompts], max(1, self.batch_size // len(temperatures))):
            room = self._room(prompts, batch, max_new_tokens)
            noise = _noise(seed, batch, len(temperatures), room)
            tokens = self._decode([prompts[i] for i in batch], temperatures, noise, stop_ids, ban_stop)
            for row, index in enumerate(batch):
                answers[index] = tokens[row * len(temperatures) : (row + 1) * len(temperatures)]
            if progress:
                progress(len(batch) * len(temperatures))
        return answers

    def _room(self, prompts: Sequence[Sequence[int]], batch: Sequence[int], wanted: int) -> int:
        longest = max(batch, key=lambda i: len(prompts[i]))
        room = min(wanted, (self.context_length or 1 << 62) - len(prompts[longest]))
        if room < 1:
            raise DataError(
                f"prompt {longest + 1} has {len(prompts[longest])} tokens and the model's context is {self.context_length}; "
                "shorten or remove it"
            )
        return room

    def _decode(
        self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], noise: np.ndarray, stop_ids: Sequence[int], ban_stop: bool
    ) -> list[list[int]]:
        """Answers of one batch, row = prompt * len(temperatures) + temperature. noise: uniform [rows, steps], one draw a token."""
        device = self.model.device
        ids, mask = _pad(prompts, device, left=True)
        logits, cache = self._forward(ids, mask, None)
        copies = len(temperatures)
        repeat = torch.arange(len(prompts), device=device).repeat_interleave(copies)
        if copies > 1:
            cache.reorder_cache(repeat)
        logits, mask = logits[repeat], mask[repeat]
        heat = torch.tensor(temperatures, device=device, dtype=torch.float32).repeat(len(prompts))
        draws = torch.from_numpy(noise).to(device)
        stops = torch.tensor(sorted(stop_ids), device=device, dtype=torch.long)
        rows = torch.arange(len(heat), device=device)
        written = torch.full(noise.shape, -1, dtype=torch.long, device=device)
        alive = torch.ones(len(heat), dtype=torch.bool, device=device)
        for step in range(noise.shape[1]):
            if ban_stop:
                logits[:, stops] = -torch.inf
            chosen = _choose(logits, heat[rows], draws[rows, step])
            alive &= ~torch.isin(chosen, stops)
            written[rows[alive], step] = chosen[alive]
            left = int(alive.sum())
            if left == 0 or step + 1 == noise.shape[1]:
                break
            if left < COMPACT_BELOW * len(rows):
                keep = alive.nonzero().squeeze(1)
                cache.reorder_cache(keep)
                rows, mask, chosen, alive = rows[keep], mask[keep], chosen[keep], alive[keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits, cache = self._forward(chosen[:, None], mask, cache)
        return [row[row >= 0].tolist() for row in written.cpu()]

    def _forward(self, ids: Tensor, mask: Tensor, cache: object | None) -> tuple[Tensor, object]:
        """Logits of the last position [rows, vocabulary] in fp32, and the cache."""
        arguments = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if "position_ids" in self._accepts:
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._accepts:
            arguments["logits_to_keep"] = 1
        output = self.model(**arguments)
        return output.logits[:, -1].float(), output.past_key_values

    @torch.inference_mode()
    def log_probs(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[np.ndarray]:
        found: list[np.ndarray] = [np.empty(0, np.float32)] * len(sequences)
        longest = max((len(ids) for ids, _ in sequences), default=1)
        size = max(1, min(self.batch_size, LOGITS_PER_BATCH // (longest * self._config.vocab_size)))
        for batch in _batches([len(ids) for ids, _ in sequences], size):
            ids, mask = _pad([sequences[i][0] for i in batch], self.model.device, left=False)
            first = min(sequences[i][1] for i in batch)
            kept = ids.shape[1] - first + 1
            arguments = {"logits_to_keep": kept} if "logits_to_keep" in self._accepts else {}
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **arguments).logits[:, -kept:-1].float()
            picked = logits.gather(2, ids[:, first:, None]).squeeze(2) - logits.logsumexp(2)
            for row, index in enumerate(batch):
                start, end = sequences[index][1] - first, len(sequences[index][0]) - first
                found[index] = picked[row, start:end].cpu().numpy()
        return found


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Row numbers in batches of like length, longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _pad(sequences: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """ids and mask [rows, longest]. Padding holds token 0: masked, so any id does, and no tokenizer needs a pad token."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if left else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask[row, place] = 1
    return ids.to(device), mask.to(device)


def _noise(seed: int, batch: Sequence[int], copies: int, steps: int) -> np.ndarray:
    """Uniform draws by (seed, prompt, copy), so that an answer depends on neither batch size nor neighbours. [rows, steps] fp32."""
    return np.stack([np.random.default_rng([seed, index, copy]).random(steps, np.float32) for index in batch for copy in range(copies)])


def _choose(logits: Tensor, heat: Tensor, draws: Tensor) -> Tensor:
    """The next token of every row: the most likely one where the temperature is 0, else by inverting the distribution at `draws`."""
    greedy = logits.argmax(1)
    warm = heat > 0
    if not warm.any():
        return greedy
    cumulative = torch.softmax(logits[warm] / heat[warm, None], 1).cumsum(1)
    sampled = torch.searchsorted(cumulative, draws[warm, None] * cumulative[:, -1:], right=True).squeeze(1)
    greedy[warm] = sampled.clamp(max=logits.shape[1] - 1)
    return greedy
