"""The share of answers that ran into their length limit: from an upstream's JSON and the counters to what `sku ctl experiment` prints."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from sku_vllm.cli.ctl_lines import experiment_lines
from sku_vllm.judges import Verdict
from sku_vllm.serving.experiment import Experiment
from sku_vllm.serving.fleet_experiment import added_up
from sku_vllm.serving.json_answer import JsonAnswer
from sku_vllm.serving.metrics import metrics
from sku_vllm.serving.route import Route


def observed(experiment: Experiment, arm: str, *values: dict[str, Any]) -> None:
    """One answered request of an upstream arm, of these JSON objects."""
    answer = JsonAnswer(Route(arm, "v", None, [({"role": "user", "content": "q"},)], time.perf_counter()), len(values))
    for value in values:
        answer.note(value)
    judge = SimpleNamespace(offer=lambda *_: None)
    answer.finish(SimpleNamespace(metrics=metrics(), experiment=experiment, judge=judge), "ok")


def chat(*reasons: str) -> dict[str, Any]:
    """A chat completion with a choice for each finish reason."""
    said = {"content": "and so on"}
    return {"choices": [{"index": index, "message": said, "finish_reason": reason} for index, reason in enumerate(reasons)]}


def test_answers_that_the_limit_cut_are_counted_by_arm_and_version() -> None:
    experiment, before = Experiment(), metrics().length_limited.labels("chatty")._value.get()
    observed(experiment, "chatty", chat("length", "stop"))
    observed(experiment, "chatty", chat("length"))
    observed(experiment, "brief", chat("stop"))
    assert metrics().length_limited.labels("chatty")._value.get() - before == 2
    versions = {"chatty": "v", "brief": "v", "idle": "v"}
    report = experiment.report(list(versions), None, False, versions)
    told = {arm: (row["answers"], row["length_limited"], row["length_limited_rate"]) for arm, row in report["arms"].items()}
    assert told == {"chatty": (3, 2, 2 / 3), "brief": (1, 0, 0.0), "idle": (0, 0, None)}
    both = added_up({"one": report, "two": report})["arms"]["chatty"]
    assert (both["answers"], both["length_limited"], both["length_limited_rate"]) == (6, 4, 2 / 3)
    other = Experiment()
    other.others = lambda: [experiment.snapshot()]
    assert other.report(["chatty"], None, False, versions)["arms"]["chatty"]["length_limited"] == 2
    experiment.judged("chatty", Verdict.of(False, True, False), "v")
    (line,) = experiment_lines(experiment.report(["chatty"], None, False, versions))[:1]
    assert "cut by the length limit 66.7%" in line
    experiment.keep({**versions, "chatty": "w"})
    for version in "vw":
        assert experiment.report(["chatty"], None, False, {"chatty": version})["arms"]["chatty"]["answers"] == 0
    assert experiment.report(["brief"], None, False, versions)["arms"]["brief"]["answers"] == 1


RESPONSE = {"object": "response", "output": [{"content": [{"text": "and so on"}]}]}


@pytest.mark.parametrize(
    "values, cut",
    [
        ([{**RESPONSE, "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}], 1),
        ([{**RESPONSE, "status": "incomplete", "incomplete_details": {"reason": "content_filter"}}], 0),
        ([{"choices": [{"index": 0, "text": "and so on", "finish_reason": "length", "token_ids": None}]}], 1),  # as vLLM writes it
        ([{**RESPONSE, "status": "completed", "incomplete_details": None}], 0),
        ([{"type": "message", "content": [{"type": "text", "text": "and so on"}], "stop_reason": "max_tokens"}], 1),
        ([{"type": "message", "content": [{"type": "text", "text": "and so on"}], "stop_reason": "end_turn"}], 0),
        (
            [
                {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "and so on"}},
                {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}},
                {"type": "message_stop"},
            ],
            1,
        ),
        (
            [{"choices": [{"index": 0, "delta": {"content": "and"}}]}, {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}],
            1,
        ),
    ],
)
def test_every_api_says_that_the_limit_cut_an_answer(values: list[dict[str, Any]], cut: int) -> None:
    experiment = Experiment()
    observed(experiment, "far", *values)
    row = experiment.report(["far"], None, False, {"far": "v"})["arms"]["far"]
    assert (row["answers"], row["length_limited"]) == (1, cut)
