"""Makes the tokenizer of a world: byte-level BPE with a chat template, trained on the world's own text. No text is out of vocabulary."""

import json
import random
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sku_vllm.lab.corpus import documents
from sku_vllm.lab.world import World
from sku_vllm.output import write_json

PAD, BOS, END = "<pad>", "<s>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
VOCABULARY = 1024
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Train the tokenizer. Conversations become `<s><|user|>…<|end|><|assistant|>…<|end|>`; `<pad>`, `<s>` and `<|end|>` are ids 0, 1, 2.

    `<|end|>` is the end-of-sequence token.
    """
    draw = random.Random(f"sku_vllm tokenizer {world.seed}")
    text = [message["content"] for messages in islice(documents(world, draw), 20_000) for message in messages]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Save the tokenizer with a class name in its configuration that both transformers 4 and 5 know."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
