"""`sku bench serve` in pieces: what they gather into, and what must not be put on one page."""

import json

import jsonschema
import pytest

from sku_vllm.benchmarks.bench_serve import RATIOS, earlier
from sku_vllm.benchmarks.serve_page import markdown
from sku_vllm.benchmarks.serve_ratios import interval
from sku_vllm.errors import ConfigError
from sku_vllm.records import schema_of

LOAD = {"model": None, "adapter": None, "concurrency": 12, "tokens": 24}
MACHINE = {"cpu": "a CPU", "cores": 2, "load": 0.1, "system": "Linux", "date": "2026-01-01", "versions": {"vllm": "0"}}


def test_pieces_gather_and_another_load_is_refused(tmp_path):
    assert earlier(tmp_path, LOAD) == {}
    (tmp_path / "sku_bench_serve.json").write_text(json.dumps({"schema": "x", "config": {}, **LOAD, "middleware": {"p50_ms": 1}}))
    assert earlier(tmp_path, {**LOAD, "pairs": 9}) == {**LOAD, "middleware": {"p50_ms": 1}}
    with pytest.raises(ConfigError, match="--tokens 24, not 8"):
        earlier(tmp_path, {**LOAD, "tokens": 8})


def test_the_page_shows_what_was_measured_and_nothing_else():
    ratio = {"ratio": 1.0, "low": 0.97, "high": 1.03, "pairs": 20, "requests": 96, "goal": 0.98, "met": False}
    ratio["per_cpu_second"] = [1, 0.9, 1.1]
    page = markdown({**LOAD, "machine": MACHINE, "ratios": {RATIOS["alias"]: ratio}})
    assert "| alias / naming the arm | 1.000 | 0.970 – 1.030 (20 pairs of runs of 96 requests) | ≥ 0.98: not met |" in page
    assert "swap" not in page and "soak" not in page and "middleware" not in page


def test_a_ratio_s_interval_does_not_depend_on_which_side_is_called_left():
    logs = [0.01, -0.03, 0.02, 0.05, -0.01, 0.0, 0.04]
    ratio, low, high = interval(logs)
    other, other_low, other_high = interval([-each for each in logs])
    assert low < ratio < high
    assert (1 / other, 1 / other_high, 1 / other_low) == pytest.approx((ratio, low, high))


@pytest.mark.slow
def test_the_record_is_what_its_schema_says(run_sku, tmp_path):
    done = run_sku("bench", "serve", "--only", "middleware", "--output", tmp_path / "page.md")
    assert done.returncode == 0, done.stderr
    jsonschema.validate(json.loads((tmp_path / "sku_bench_serve.json").read_text()), schema_of("bench_serve"))
