"""Base, adapter in PEFT, fused checkpoint and negated LoRA are one model: their log-probabilities agree (fp32, real vLLM)."""

import json
import subprocess
import sys

import jsonschema
import pytest

from sku_vllm.records import schema_of


def agreement(model, adapter, text, dtype, output):
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "sku_vllm.benchmarks.bench_agreement",
            "--json",
            "--model",
            model,
            "--adapter",
            adapter,
            "--scale",
            "0.8",
            "--text",
            text,
            "--dtype",
            dtype,
            "--output",
            output,
        ],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])["agreement"][0]


@pytest.mark.parametrize("name", ["llama", pytest.param("opt", marks=pytest.mark.slow)])
def test_every_way_to_the_negated_model_agrees_in_float32(lab, run_sku, tmp_path, name):
    trained = run_sku(
        "train",
        "--model",
        lab / name,
        "--forget",
        lab / "forget/train.jsonl",
        "--retain",
        lab / "retain/train.jsonl",
        "--method",
        "task-vector",
        "--steps",
        20,
        "--output",
        tmp_path / "adapter",
    )
    assert trained.returncode == 0, trained.stderr
    found = agreement(lab / name, tmp_path / "adapter", lab / "retain/test.jsonl", "float32", tmp_path / "measured")
    # The edit itself must be far larger than the tolerance, or agreement would prove nothing.
    assert found["edit"]["max"] > 0.1
    for pair, gap in found.items():
        if isinstance(gap, dict) and pair != "edit":
            assert gap["max"] <= 1e-4, (pair, gap)
    recorded = json.loads((tmp_path / "measured" / "sku_bench_agreement.json").read_text())
    assert recorded["schema"] == "sku.bench_agreement/1" and recorded["agreement"] == [found]
    jsonschema.validate(recorded, schema_of("bench_agreement"))
