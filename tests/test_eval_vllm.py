"""`sku eval --backend vllm`: the same prompts, answers and perplexity as through transformers, from vLLM's own engine."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_both_backends_measure_the_same(lab: Path, tmp_path: Path, run_sku: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    pytest.importorskip("vllm")
    from sku_vllm.data import load_dataset
    from sku_vllm.methods import TrainConfig, train_adapter

    forget, retain = load_dataset(lab / "forget/train.jsonl", "forget"), load_dataset(lab / "retain/train.jsonl", "retain")
    train_adapter(lab / "llama", forget, retain, tmp_path / "adapter", TrainConfig(method="task-vector", steps=20), progress=False)
    for name in ("forget/unseen", "retain/test"):
        lines = (lab / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / Path(name).name).write_text("".join(lines[:12]), encoding="utf-8")
    results = {}
    for backend in ("transformers", "vllm"):
        done = run_sku(
            "eval", "--model", lab / "llama", "--adapter", tmp_path / "adapter", "--scale", 0.9, "--forget", f"u={tmp_path / 'unseen'}",
            "--retain", tmp_path / "test", "--judge", f"lexicon:{lab / 'lexicon.json'}", "--samples", 1, "--max-new-tokens", 40,
            "--dtype", "float32", "--backend", backend, "--json", "--output", tmp_path / backend,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        results[backend] = json.loads(done.stdout)
    ours, theirs = results["transformers"]["retain"], results["vllm"]["retain"]
    assert theirs["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-4)
    assert theirs["perplexity_ratio"] == pytest.approx(ours["perplexity_ratio"], rel=1e-4)
    rows = [
        [json.loads(line) for line in (tmp_path / backend / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
        for backend in ("transformers", "vllm")
    ]
    greedy = [(one["response"], other["response"]) for one, other in zip(*rows, strict=True) if one["mode"] == "greedy"]
    # Near-ties may fall either way in another engine.
    assert sum(one == other for one, other in greedy) >= len(greedy) - 1
