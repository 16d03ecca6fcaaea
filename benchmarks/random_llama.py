"""A small Llama of random weights and an adapter for it, for tests and benchmarks that need a model but not a trained one."""

from pathlib import Path
from typing import Any


def save_random_llama(place: Path, *, words: int, gain: float, rank: int, spread: float, **shape: Any) -> tuple[Path, Path]:
    """`place`/base with a word-level tokenizer, and `place`/adapter on all linear layers; the same bits every time.

    Args:
        words: w0, w1, … beside four special ones. gain: on every matrix, so that the largest logits are clear. spread: of the
            adapter's B. shape: of the LlamaConfig.
    Returns:
        The two directories.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(words))]
    rules = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=1024, **special, **shape)).float()
    with torch.no_grad():
        for weight in llama.parameters():
            if weight.dim() > 1:
                weight.mul_(gain)
    llama.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    adapted = get_peft_model(llama, LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, spread)
    adapted.save_pretrained(str(place / "adapter"))
    return place / "base", place / "adapter"
