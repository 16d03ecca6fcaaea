"""A judge that fails is loud: in the log, in what the control API says, in a metric; and nothing is recommended from it."""

import json
import logging
import sys
import threading
from pathlib import Path

import pytest

from sku_vllm.errors import JudgeError
from sku_vllm.judges import Exchange, Verdict
from sku_vllm.serving import judge_health
from sku_vllm.serving.experiment import Experiment
from sku_vllm.serving.judge_health import JudgeHealth
from sku_vllm.serving.judge_process import JudgeProcess
from sku_vllm.serving.judge_queue import JudgeQueue
from sku_vllm.serving.metrics import metrics

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from serving_tools import JsonServer, eventually, said  # noqa: E402


class Endpoint(JsonServer):
    """A judge over HTTP that replies as told: `reply(text)` gives (status, what it says) for the answer it is asked about."""

    def __init__(self, reply):
        def judged(path, body):
            status, answer = reply(body["messages"][-1]["content"])
            return status, said(answer) if status == 200 else {"error": answer}

        super().__init__(judged)
        self.spec = f"openai:{self.root}/v1#judge"


def sees(text):
    """A judge that works."""
    return 200, "unsafe" if "bomb" in text or "badword" in text else "safe"


def mute(text):
    return (200, "lorem ipsum") if "strange" in text else sees(text)


def test_one_unreadable_reply_costs_no_other_answer_its_verdict():
    judge = JudgeProcess(Endpoint(mute).spec)
    verdicts = judge([Exchange("q", text) for text in ("fine answer", "strange answer", "badword answer")])
    assert [verdict and verdict.harmful for verdict in verdicts] == [False, None, True]
    judge.process.kill()


@pytest.mark.parametrize(
    ("reply", "blind"),
    [
        (sees, None),
        (lambda text: (200, "safe"), "nothing harmful in a text that is"),
        (lambda text: (200, "unsafe"), "harm in a text that has none"),
        (lambda text: (401, f"bad key for the request: {text}"), "HTTP 401"),
        (lambda text: (200, f"I will not judge {text}"), "no verdict"),
    ],
    ids=["works", "blind", "sees ghosts", "refuses", "chats"],
)
def test_a_judge_is_tried_when_it_starts(reply, blind, caplog):
    queue = JudgeQueue(JudgeProcess(Endpoint(reply).spec), metrics())
    with caplog.at_level(logging.WARNING, logger="vllm.sku"):
        if blind is None:
            queue.offer("tried-arm", Exchange("q", "fine"))
            assert eventually(lambda: metrics().judged.labels("tried-arm")._value.get() == 1) and queue.health.blind() is None
        else:
            assert eventually(lambda: queue.health.blind() and blind in queue.health.blind())
            assert "blind since" in queue.health.blind() and metrics().judge_blind._value.get() == 1
            assert queue.health.describe()["last_error"]["reason"] and "bomb" not in str(queue.health.describe()) + caplog.text
    queue.labeller.process.kill()


def test_a_lexicon_and_a_judge_that_decides_no_harm_pass(tmp_path):
    (tmp_path / "words.json").write_text(json.dumps({"harmful": ["c++ malware"], "refusal": ["no"]}))
    for spec in (f"lexicon:{tmp_path}/words.json", "refusal"):
        judge = JudgeProcess(spec)
        assert judge.probe() is None
        judge.process.kill()


def test_a_judge_that_fails_later_is_blind_until_it_sees_again(monkeypatch, caplog):
    monkeypatch.setattr(judge_health, "EVERY", 3600.0)
    health = JudgeHealth(metrics())
    with caplog.at_level(logging.WARNING, logger="vllm.sku"):
        health.judged(30, 0, None)
        assert health.blind() is None
        for _ in range(50):
            health.judged(0, 4, "no answer after 5 attempts")
        assert "no answer after 5 attempts" in health.blind() and len(caplog.records) <= 1, "a line for every batch would fill the log"
        share = health.describe()["unread_share"]
        health.judged(4, 0, None)
        assert share > 0.9 and "of its last 200 replies were no verdict" in health.blind(), "one verdict does not make up for hundreds"
        health.judged(200, 0, None)
        assert health.blind() is None and "sees again" in caplog.text


def test_a_judge_that_hangs_is_noticed_while_it_does(monkeypatch, caplog):
    """Neither a verdict nor an error ever comes from it: what tells is the next answer that it should judge."""
    release = threading.Event()

    def hangs(exchanges):
        release.wait(600)
        return [Verdict.of(False, False, False) for _ in exchanges]

    monkeypatch.setattr(judge_health, "SILENT", 0.2)
    queue = JudgeQueue(hangs, metrics())
    queue.offer("hung-arm", Exchange("q", "a"))
    assert queue.health.blind() is None
    assert eventually(lambda: queue.health.blind() is not None)
    assert "has not replied for" in queue.health.blind() and "has not replied for" in caplog.text
    assert metrics().judge_blind._value.get() == 1
    release.set()
    assert eventually(lambda: queue.health.blind() is None and queue.waiting == 0)
    assert metrics().judge_blind._value.get() == 0


def test_the_queue_counts_what_has_no_verdict():
    def half(exchanges):
        return [None if "strange" in each.response else Verdict.of(False, False, False) for each in exchanges]

    queue = JudgeQueue(half, metrics())
    for text in ("strange", "fine", "strange"):
        queue.offer("half-arm", Exchange("q", text))
    assert eventually(lambda: queue.waiting == 0)
    found = metrics()
    assert found.judge_errors.labels("half-arm")._value.get() == 2 and found.judged.labels("half-arm")._value.get() == 1


def test_nothing_is_recommended_from_a_blind_judge():
    experiment = Experiment()
    for number in range(6400):
        for arm, harm in (("original", number % 2 == 0), ("negated", False)):
            experiment.judged(arm, Verdict.of(harm, False, False), "v", number % 64)
    arms, versions = ["original", "negated"], {"original": "v", "negated": "v"}
    page = experiment.report(arms, "original", False, versions)
    assert page["comparisons"]["negated"]["recommendation"].startswith("promote")
    page = experiment.report(arms, "original", False, versions, "the judge is blind since yesterday: HTTP 401")
    assert page["comparisons"]["negated"]["recommendation"] == "keep measuring: the judge is blind since yesterday: HTTP 401"
    assert page["blind"].startswith("the judge is blind since")


def test_reasons_hold_no_text():
    from sku_vllm.errors import UnreadableReply
    from sku_vllm.serving.judge_process import reason_of

    secret = "the secret request"
    for error in (
        JudgeError(f"judge openai:http://h/v1#m: HTTP 401 {secret}; check the URL"),
        JudgeError(f"judge openai:http://h/v1#m: no answer after 5 attempts (HTTP 503 {secret}); is the server up?"),
        UnreadableReply(f"judge openai:http://h/v1#m: answered '{secret}', neither safe nor unsafe"),
        JudgeError(secret),
        ValueError(secret),
    ):
        assert reason_of(error) and secret not in reason_of(error)
    assert reason_of(JudgeError(f"judge x: no answer after 5 attempts (HTTP 503 {secret})")) == "no answer after 5 attempts (HTTP 503)"
