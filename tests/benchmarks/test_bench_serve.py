"""`sku bench serve` in pieces: what they gather into, and what must not be put on one page."""

import json

import jsonschema
import pytest

from sku_vllm.benchmarks.bench_serve import LONG, RATIOS, earlier
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
    asked = {"soak": 10_009, "replaces": 1000, "equal_arms": 12}  # for a part of another run on the same page
    page = markdown({**LOAD, **asked, "machine": MACHINE, "ratios": {RATIOS["alias"]: ratio}})
    assert "| alias / naming the arm | 1.000 | 0.970 – 1.030 (20 pairs of runs of 96 requests) | ≥ 0.98: not met |" in page
    assert not [part for part in ("swap", "soak", "middleware", "replaces", "A/A") if part in page]


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


@pytest.mark.slow
def test_a_server_answers_whole_stays_its_size_and_recommends_nothing_of_equal_arms(run_sku, tmp_path):
    """The long parts, short: streamed responses over 20 swaps, replaces, A/A tests; and completions beside them."""
    parts = [word for part in LONG for word in ("--only", part)]
    small = ("--soak", 120, "--replaces", 20, "--equal-arms", 2)
    done = run_sku("bench", "serve", *parts, *small, "--output", tmp_path / "page.md")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "sku_bench_serve.json").read_text())
    jsonschema.validate(found, schema_of("bench_serve"))
    for soak in (found["soak"], found["soak_responses"]):
        assert soak["requests"] >= 120 and soak["swaps"] == 20 and min(soak["answers_of_each"]) > 0
        assert [soak[bad] for bad in ("errors", "lost", "unjudged", "neither_version")] == [0, 0, 0, 0]
    looks = found["replaces"]["looks"]
    assert [look["replaces"] for look in looks] == [2, 10, 20] and found["replaces"]["errors"] == 0
    assert len({look["disk_files"] for look in looks}) == 1 and found["replaces"]["grown"]["files"] <= 0.02
    assert (found["equal_arms"]["recommended"], found["equal_arms"]["unjudged"]) == (0, 0)
    page = (tmp_path / "page.md").read_text()
    assert "soak of streamed responses" in page and "20 replaces" in page and "2 A/A tests of 1000 requests" in page
