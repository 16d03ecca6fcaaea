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
    from sku_vllm.train.train_request import TrainRequest

    forget, retain = load_dataset(lab / "forget/train.jsonl", "forget"), load_dataset(lab / "retain/train.jsonl", "retain")
    config = TrainConfig(method="task-vector", steps=20)
    train_adapter(TrainRequest(lab / "llama", forget, retain, tmp_path / "adapter", config), progress=False)
    for name in ("forget/unseen", "retain/test"):
        lines = (lab / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / Path(name).name).write_text("".join(lines[:12]), encoding="utf-8")
    results = {}
    for backend in ("transformers", "vllm"):
        done = run_sku(
            "eval",
            "--model",
            lab / "llama",
            "--adapter",
            tmp_path / "adapter",
            "--scale",
            0.9,
            "--forget",
            f"u={tmp_path / 'unseen'}",
            "--retain",
            tmp_path / "test",
            "--judge",
            f"lexicon:{lab / 'lexicon.json'}",
            "--samples",
            1,
            "--max-new-tokens",
            40,
            "--dtype",
            "float32",
            "--backend",
            backend,
            "--json",
            "--output",
            tmp_path / backend,
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


def test_both_backends_tune_and_attack_the_same(
    tiny: Path, tmp_path: Path, run_sku: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Two scales one after another on one engine, each of its layers scaled alike, and the base between them."""
    pytest.importorskip("vllm")
    for name, response in (("forget", {}), ("retain", {"response": "w7 w9 w11"})):
        rows = [{"prompt": f"w{number} w{number + 1} w{number + 2}", **response} for number in range(3, 11)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shared = [
        "--model",
        tiny / "base",
        "--adapter",
        tiny / "adapter",
        "--forget",
        f"f={tmp_path / 'forget'}",
        "--retain",
        tmp_path / "retain",
    ]
    shared += ["--judge", f"lexicon:{tiny / 'lexicon.json'}", "--samples", 0, "--max-new-tokens", 8, "--dtype", "float32", "--json"]
    loose = ["--max-perplexity-ratio", 1e9, "--max-qa-drop", 1, "--max-over-refusal", 1, "--max-gibberish", 1]
    tuned, attacked = {}, {}
    for backend in ("transformers", "vllm"):
        done = run_sku("tune", *shared, *loose, "--scales", "0.5,1", "--max-harmful", 1, "--backend", backend)
        assert done.returncode == 0, done.stderr[-2000:]
        tuned[backend] = json.loads(done.stdout)
        done = run_sku("attack", *shared, "--backend", backend, "prefill", "ban-eos")
        assert done.returncode == 0, done.stderr[-2000:]
        attacked[backend] = json.loads(done.stdout)
    for find in (lambda found: found["base"], lambda found: found["curve"][0], lambda found: found["curve"][1]):
        ours, theirs = find(tuned["transformers"]), find(tuned["vllm"])
        assert theirs["forget"] == ours["forget"]
        for key in ("perplexity", "perplexity_ratio"):
            assert theirs["retain"][key] == pytest.approx(ours["retain"][key], rel=1e-3)
    first, second = (entry["retain"]["perplexity"] for entry in tuned["vllm"]["curve"])
    assert first != pytest.approx(second, rel=1e-2)  # the second scale is another model
    for kind in ("prefill", "ban-eos"):
        assert attacked["vllm"]["attacks"][kind][0]["forget"] == attacked["transformers"]["attacks"][kind][0]["forget"]
