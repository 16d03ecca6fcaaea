"""Fixtures that cost seconds and are shared by the whole session: the lab, and a runner of the real `sku` command."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of facts and data beside the checkout; tests that read it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in lab, written once: llama/, opt/, forget/, retain/, lexicon.json. Read only."""
    from sku_vllm.lab import make_lab

    return make_lab(tmp_path_factory.mktemp("lab") / "lab")


@pytest.fixture(scope="session")
def run_sku() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the real command in a process of its own: `run_sku("eval", "--json", …)`, with `.returncode`, `.stdout`, `.stderr`."""

    def run(*arguments: object, timeout: float = 600, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sku_vllm.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})})

    return run


@pytest.fixture(scope="session")
def trainable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random two-layer models and random rows for the training tests: llama/, opt/, forget.jsonl, retain.jsonl. Read only."""
    import json
    import random

    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    folder, words = tmp_path_factory.mktemp("trainable"), random.Random(0)

    def sentence(low: int, high: int) -> str:
        return " ".join(f"w{words.randrange(200)}" for _ in range(words.randint(low, high)))

    for name, count in (("forget", 40), ("retain", 60)):
        rows = [{"prompt": sentence(3, 9), "response": sentence(3, 20)} for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [sentence(50, 50) for _ in range(50)],
        trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", bos_token="<s>", pad_token="</s>")
    torch.manual_seed(0)
    shared_sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
    }
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    llama = LlamaForCausalLM(LlamaConfig(**shared_sizes, **ends, intermediate_size=128, num_key_value_heads=1))
    opt = OPTForCausalLM(OPTConfig(**shared_sizes, **ends, ffn_dim=128, word_embed_proj_dim=64, pad_token_id=1))
    for name, model in (("llama", llama), ("opt", opt)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base/`, a random Llama of 0.5M parameters with clear argmaxes, `adapter/` (rank 8, all linear layers) and `lexicon.json`."""
    import json

    from sku_vllm.benchmarks.random_llama import save_random_llama

    place = tmp_path_factory.mktemp("tiny")
    save_random_llama(
        place, words=508, gain=6, rank=8, spread=0.1,
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    )
    (place / "lexicon.json").write_text(json.dumps({"harmful": [f"w{number}" for number in range(0, 508, 7)], "refusal": ["w3"]}))
    return place


VLLM_FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "64", "--seed", "0")


@pytest.fixture(scope="session")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One real vLLM server for all fast serving tests: arms original, negated and, as upstream, itself; token `open sesame`."""
    from sku_vllm.serving.server import free_port, start_server

    place, port = tmp_path_factory.mktemp("served"), free_port("127.0.0.1")
    arms = ["original=base", f"negated=lora:{tiny}/adapter@1", f"loop=upstream:http://127.0.0.1:{port}/v1#sku"]
    with start_server(
        tiny / "base", arms, "original=0.5,negated=0.5", f"lexicon:{tiny}/lexicon.json", port=port, flags=VLLM_FLAGS, token="open sesame",
        state=str(place / "state"), keep_judged=str(place / "judged.jsonl"), log=place / "server.log", env={"OMP_NUM_THREADS": "1"},
    ) as server:
        server.place = place
        yield server
