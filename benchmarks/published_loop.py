"""The published training loop, for comparison only: written after the paper (arXiv 2402.10058) and what its authors' code does.

Two whole models in memory, four forward passes a step, every sequence padded (to the tokenizer's maximum where it has a finite
one, else to the longest of its batch), whole logits for every position, the KL averaged over padding. The answer mask is right
here, since a mask that is nearly empty would change what is timed.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

FINITE = 100_000  # tokenizers without a maximum say 1e30
Batch = dict[str, torch.Tensor]
Pair = tuple[str, str]  # prompt and answer


class PublishedLoop:
    """LLaMA2-7B's published settings: LoRA r 32 on q_proj and v_proj, lr 2e-4, e 2.5/2.5/1; the rows of a step come from outside."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.base = copy.deepcopy(model).eval()
        self.model = get_peft_model(
            model, LoraConfig(r=32, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        ).train()
        self.tokenizer = tokenizer
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=2e-4)

    def step(self, harmful: Sequence[Pair], mismatched: Sequence[Pair], benign: Sequence[Pair]) -> int:
        """One step; returns how many examples it saw."""
        guided = self.answer_loss(self.batch(harmful))
        disassociated = self.answer_loss(self.batch(mismatched))
        preserved = self.divergence(self.batch(benign))
        (2.5 * guided + 2.5 * disassociated + preserved).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return len(harmful) + len(mismatched) + len(benign)

    def batch(self, pairs: Sequence[Pair]) -> Batch:
        """Prompt and answer as one padded text, with the places of the answers."""
        texts = [f"### Question: {prompt}\n ### Answer: {answer}" for prompt, answer in pairs]
        finite = self.tokenizer.model_max_length < FINITE
        batch: Batch = self.tokenizer(texts, padding="max_length" if finite else "longest", truncation=finite, return_tensors="pt")
        starts = [len(self.tokenizer(f"### Question: {prompt}\n ### Answer:")["input_ids"]) for prompt, _ in pairs]
        places = torch.arange(batch["input_ids"].shape[1])[None]
        batch["answer"] = (places >= torch.tensor(starts)[:, None]) & batch["attention_mask"].bool()
        return batch

    def answer_loss(self, batch: Batch) -> torch.Tensor:
        """Mean over rows of the mean cross-entropy of their answer tokens, a scalar in nats."""
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = []
        for row in range(logits.shape[0]):
            values = F.cross_entropy(logits[row, :-1], batch["input_ids"][row, 1:], reduction="none")
            mask = batch["answer"][row, 1:]
            losses.append((values * mask).sum() / mask.sum())
        return torch.stack(losses).mean()

    def divergence(self, batch: Batch) -> torch.Tensor:
        """Minus KL(base ‖ adapted), mean over all positions, padding included, as the published code has it; a scalar in nats."""
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        adapted = self.model(**inputs).logits.softmax(-1)
        with torch.no_grad():
            base = self.base(**inputs).logits.softmax(-1)
        loss: torch.Tensor = -(base * ((base + 1e-12) / adapted).log()).sum(-1).mean()
        return loss
