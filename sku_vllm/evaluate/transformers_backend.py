"""The backend for transformers models: batched decoding with a KV cache, for thousands of short answers on few cores.

Prompts are sorted by length and padded on the left. What all of a batch begin with is computed once, a prompt is prefilled once, and its
cache is copied for each of its answers (one greedy, some sampled; or those to be scored). Finished rows leave the batch.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sku_vllm.decoding.flat_head import flat_head
from sku_vllm.decoding.grouped_attention import grouped
from sku_vllm.decoding.prefix import shared_length
from sku_vllm.decoding.roomy_cache import is_plain, spread
from sku_vllm.errors import DataError
from sku_vllm.evaluate.backend import Generated, Journal, Progress
from sku_vllm.evaluate.batches import cut_batches, run_batches
from sku_vllm.evaluate.token_choice import choose_tokens, uniform_noise
from sku_vllm.model import context_length

# Padded tokens of a batch, prompts and answers. A CPU gains nothing from more; a GPU does as long as its cache holds them.
CPU_TOKENS, GPU_TOKENS = 1 << 14, 1 << 17
# Scoring holds logits of answer tokens × vocabulary in fp32, 4 bytes each: 128 MiB on a CPU, 2 GiB on a GPU.
CPU_LOGITS, GPU_LOGITS = 1 << 25, 1 << 29
# Leave finished rows in the batch until a quarter of it is done: copying the cache costs about as much as one step.
COMPACT_BELOW = 0.75


class TransformersBackend:
    """A `transformers` causal language model in memory (PEFT-wrapped or not).

    batch_size: most answers decoded together. batch_tokens: most padded tokens in a batch, prompts and answers; None for what suits the
    device.
    """

    def __init__(self, model: PreTrainedModel, *, batch_size: int = 256, batch_tokens: int | None = None) -> None:
        self.model = model
        on_cpu = model.device.type == "cpu"
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens or (CPU_TOKENS if on_cpu else GPU_TOKENS)
        self._logits = CPU_LOGITS if on_cpu else GPU_LOGITS
        self._inner = cast("Any", model).get_base_model() if hasattr(model, "get_base_model") else model  # unwrap a PEFT model
        self._config = self._inner.config.get_text_config()
        self._accepts = set(inspect.signature(self._inner.forward).parameters)

    @property
    def context_length(self) -> int | None:
        """The most tokens a sequence may have; None where the config does not say."""
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
        journal: Journal | None = None,
    ) -> list[list[Generated]]:
        """See `Backend.generate`. Raises DataError for a prompt that leaves no room for an answer."""
        answers: list[list[Generated]] = [[] for _ in prompts]
        known = journal.known if journal else {}
        room = self._room(prompts, max_new_tokens)

        def answer(batch: list[int]) -> None:
            if all(index in known for index in batch):
                found = {index: known[index] for index in batch}
            else:
                noise = uniform_noise(seed, batch, len(temperatures), max(room[index] for index in batch))
                asked = _Asked([prompts[i] for i in batch], [room[i] for i in batch], temperatures, stop_ids, ban_stop, max_new_tokens)
                tokens = self._decode(asked, noise, journal)
                found = {index: tokens[row * len(temperatures) :][: len(temperatures)] for row, index in enumerate(batch)}
                if journal:
                    journal.keep(found)
            for index, replies in found.items():
                answers[index] = replies

        # The longest first, so that memory runs out at the start or not at all.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        copies = len(temperatures)
        sizes = [(len(prompt) + max_new_tokens) * copies / self.batch_tokens for prompt in prompts]
        with grouped(self._inner), flat_head(self._inner):
            run_batches(cut_batches(order, sizes, rows=max(1, self.batch_size // copies)), answer)
        return answers

    def _room(self, prompts: Sequence[Sequence[int]], wanted: int) -> list[int]:
        """The most tokens that the answers to each prompt may have."""
        room = [min(wanted, (self.context_length or 1 << 62) - len(prompt)) for prompt in prompts]
        for number, (prompt, left) in enumerate(zip(prompts, room, strict=True), 1):
            if left < 1:
                raise DataError(
                    f"prompt {number} has {len(prompt)} tokens and the model's context is {self.context_length}; shorten or remove it"
                )
        return room

    def _decode(self, asked: "_Asked", noise: np.ndarray, journal: Journal | None) -> list[Generated]:
        """The answers of one batch, in rows: all answers to the first prompt (one per temperature), then to the next.

        noise: uniform random numbers [rows, steps], one per token.
        """
        device, copies, steps = self.model.device, len(asked.temperatures), noise.shape[1]
        repeat = torch.arange(len(asked.prompts), device=device).repeat_interleave(copies)
        logits, mask, cache = self._prefill(asked.prompts, repeat, room=steps)
        room = torch.tensor(asked.room, device=device)[repeat]
        heat = torch.tensor(asked.temperatures, device=device, dtype=torch.float32).repeat(len(asked.prompts))
        draws = torch.from_numpy(noise).to(device)
        stops = torch.tensor(sorted(asked.stop_ids), device=device, dtype=torch.long)
        rows = torch.arange(len(heat), device=device)
        written = torch.full(noise.shape, -1, dtype=torch.long, device=device)
        ended = torch.zeros(len(heat), dtype=torch.bool, device=device)
        alive = torch.ones(len(heat), dtype=torch.bool, device=device)
        for step in range(steps):
            if asked.ban_stop:
                logits[:, stops] = -torch.inf
            chosen = choose_tokens(logits, heat[rows], draws[rows, step])
            stopped = alive & torch.isin(chosen, stops)
            ended[rows[stopped]] = True
            alive &= ~stopped
            written[rows[alive], step] = chosen[alive]
            alive &= room[rows] > step + 1
            left = int(alive.sum())
            if journal:
                journal.advance(len(heat) * (1 if left else asked.max_new_tokens - step))
            if left == 0:
                break
            if left < COMPACT_BELOW * len(rows):
                keep = alive.nonzero().squeeze(1)
                cache.reorder_cache(keep)
                rows, mask, chosen, alive = rows[keep], mask[keep], chosen[keep], alive[keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits, cache = self._forward(chosen[:, None], mask, cache)
            logits = logits[:, -1].float()
        return [Generated(row[row >= 0].tolist(), end) for row, end in zip(written.cpu(), ended.tolist(), strict=True)]

    def _prefill(self, prompts: Sequence[Sequence[int]], rows: Tensor, *, room: int) -> tuple[Tensor, Tensor, Any]:
        """Compute prompts, and repeat them as `rows` [new rows] says.

        Returns:
            Logits after the last token [new rows, vocabulary] in fp32; the mask of the tokens so far [new rows, longest]; and their cache,
            with room for `room` more tokens.
        """
        device, cache = self.model.device, None
        common = shared_length(prompts) if len(prompts) > 1 and "position_ids" in self._accepts else 0
        if common:
            start = torch.tensor([prompts[0][:common]], device=device)
            _, cache = self._forward(start, torch.ones_like(start), None)
            if is_plain(cache):
                spread(cache, rows.new_zeros(len(prompts)), max(map(len, prompts)) - common)
            else:  # a window or a state of some other kind, to which the padding between start and rest would matter
                common, cache = 0, None
        ids, mask = padded([prompt[common:] for prompt in prompts], device, left=True)
        mask = torch.cat([mask.new_ones(len(prompts), common), mask], dim=1)
        logits, cache = self._forward(ids, mask, cache)
        spread(cache, rows, room)
        return logits[:, -1].float()[rows], mask[rows], cache

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any, *, every: bool = False) -> tuple[Tensor, Any]:
        """Logits [rows, positions, vocabulary] and the new cache. cache: of what comes before ids, or None.

        mask: of the tokens in the cache and of ids. every: logits of every position instead of, at least, the last.
        """
        arguments = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if "position_ids" in self._accepts:
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._accepts:
            arguments["logits_to_keep"] = 0 if every else 1
        output = self.model(**arguments)
        return output.logits, output.past_key_values

    @torch.inference_mode()
    def log_probs(self, sequences: Sequence[tuple[Sequence[int], int]], progress: Progress | None = None) -> list[np.ndarray]:
        """See `Backend.log_probs`."""
        found: list[np.ndarray] = [np.empty(0, np.float32)] * len(sequences)

        def score(batch: list[int]) -> None:
            for index, values in zip(batch, self._score([sequences[i] for i in batch]), strict=True):
                found[index] = values
            if progress:
                progress(sum(len(sequences[i][0]) for i in batch))

        # Answers to one prompt stay together, so that it is computed once.
        order = [index for index, (ids, start) in enumerate(sequences) if len(ids) > start]
        order.sort(key=lambda i: (-sequences[i][1], tuple(sequences[i][0][: sequences[i][1]]), -len(sequences[i][0])))
        logits = self._config.vocab_size / self._logits
        sizes = [max(len(ids) / self.batch_tokens, (len(ids) - start) * logits) for ids, start in sequences]
        with grouped(self._inner), flat_head(self._inner):
            run_batches(cut_batches(order, sizes, rows=self.batch_size), score)
        return found

    def _score(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[np.ndarray]:
        """The log-probabilities of one batch of answers, none of them empty."""
        device = self.model.device
        prompts = {tuple(ids[:start]): None for ids, start in sequences}
        numbers = {prompt: number for number, prompt in enumerate(prompts)}
        answers = [ids[start:] for ids, start in sequences]
        longest = max(map(len, answers))
        rows = torch.tensor([numbers[tuple(ids[:start])] for ids, start in sequences], device=device)
        logits, mask, cache = self._prefill(list(map(list, prompts)), rows, room=longest)
        ids, own = padded(answers, device, left=False)
        logits = logits[:, None]
        if longest > 1:
            later, _ = self._forward(ids[:, :-1], torch.cat([mask, own[:, :-1]], dim=1), cache, every=True)
            logits = torch.cat([logits, later.float()], dim=1)
        picked = (logits.gather(2, ids[:, :, None]).squeeze(2) - logits.logsumexp(2)).cpu().numpy()
        return [values[: len(answer)] for values, answer in zip(picked, answers, strict=True)]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What one batch is asked: prompts, the most tokens of each one's answers, and settings as in `Backend.generate`."""

    prompts: Sequence[Sequence[int]]
    room: Sequence[int]
    temperatures: Sequence[float]
    stop_ids: Sequence[int]
    ban_stop: bool
    max_new_tokens: int


def padded(sequences: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """ids and mask, both [rows, longest]. Padding is token 0; since it is masked, no pad token is needed."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if left else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask[row, place] = 1
    return ids.to(device), mask.to(device)
