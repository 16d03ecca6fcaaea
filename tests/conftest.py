"""Fixtures shared by all tests, created once per session since they take seconds: lab, tiny models, a vLLM server, the `sku` command."""

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
    """The folder `shared` next to the checkout, with data that is not part of the repository; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in lab: llama/, opt/, forget/, retain/, lexicon.json. Tests must not change it."""
    from sku_vllm.lab import make_lab

    return make_lab(tmp_path_factory.mktemp("lab") / "lab")


@pytest.fixture(scope="session")
def run_sku() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the real command in a process of its own: `run_sku("eval", "--json", …)`, with `.returncode`, `.stdout`, `.stderr`."""

    def run(*arguments: object, timeout: float = 1200, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sku_vllm.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})})

    return run


@pytest.fixture(scope="session")
def trainable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random two-layer models and random rows for the training tests: llama/, opt/, forget.jsonl, retain.jsonl. Not to be changed."""
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
    """`base/`, a random Llama of 0.5M parameters, `adapter/` (rank 8, all linear layers) and `lexicon.json`.

    The weights are large enough that the most likely token is clearly ahead, so that greedy answers do not depend on rounding.
    """
    import json

    from sku_vllm.benchmarks.random_llama import save_random_llama

    place = tmp_path_factory.mktemp("tiny")
    save_random_llama(
        place,
        words=508,
        gain=6,
        rank=8,
        spread=0.1,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    (place / "lexicon.json").write_text(json.dumps({"harmful": [f"w{number}" for number in range(0, 508, 7)], "refusal": ["w3"]}))
    return place


VLLM_FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "64", "--seed", "0")


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A short TMPDIR (vLLM's sockets lie there) of one test alone, to see what is left in it."""
    import shutil
    import tempfile

    place = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    yield place
    shutil.rmtree(place, ignore_errors=True)


class Relay:
    """Another OpenAI-compatible server, as an upstream arm sees it: it passes requests on to the original arm of `target`.

    model: what it calls its model. status: what it answers instead, where set. received: the headers of the requests it has had.
    """

    model = "relayed-model"

    def __init__(self) -> None:
        import http.server
        import threading

        outer = self
        self.target, self.status, self.received = "", 0, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler: Any) -> None:
        """Pass one request on, and stream the answer back with this server's name of the model in it."""
        import json

        import httpx

        payload = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.received.append(dict(handler.headers))
        known = payload["model"] == self.model
        if self.status or not known:
            body = json.dumps({"error": {"message": f"The model `{payload['model']}` does not exist."}}).encode()
            handler.send_response(self.status or 404)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)
            return
        headers = {"X-SKU-Token": "open sesame", "X-SKU-Arm": "original"}
        url = self.target + handler.path
        with httpx.stream("POST", url, json={**payload, "model": "sku"}, headers=headers, timeout=300, trust_env=False) as reply:
            handler.send_response(reply.status_code)
            handler.send_header("Content-Type", reply.headers["content-type"])
            handler.end_headers()
            for line in reply.iter_lines():
                handler.wfile.write(line.replace('"model":"sku"', f'"model":"{self.model}"').encode() + b"\n")


@pytest.fixture(scope="session")
def relay() -> Relay:
    """The server of the upstream arm `loop` of `served`."""
    return Relay()


@pytest.fixture(scope="session")
def served(tiny: Path, relay: Relay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One real vLLM server for all fast serving tests, with the control token `open sesame` and `auditor`'s, which may only look.

    Its arms are original, negated, and loop: an upstream arm whose server passes requests on to original.
    """
    from sku_vllm.serving.serve_config import ServeConfig
    from sku_vllm.serving.start import free_port, serve

    place, port = tmp_path_factory.mktemp("served"), free_port("127.0.0.1")
    os.environ |= {"SKU_TEST_RELAY": "relay key", "SKU_TEST_AUDITOR": "only looking"}
    config = ServeConfig(
        str(tiny / "base"),
        ["original=base", f"negated=lora:{tiny}/adapter@1", f"loop=upstream:{relay.url}#{relay.model}"],
        "original=0.5,negated=0.5",
        f"lexicon:{tiny}/lexicon.json",
        token="open sesame",
        state=str(place / "state"),
        keep_judged=str(place / "judged.jsonl"),
        upstream_key=["loop=SKU_TEST_RELAY"],
        readers=["auditor=SKU_TEST_AUDITOR"],
    )
    with serve(config, VLLM_FLAGS, port=port, log=place / "server.log", env={"OMP_NUM_THREADS": "1"}) as server:
        server.place = place
        relay.target = server.root
        yield server
