"""The judge's queue in process: a judge that stalls or dies costs nobody a request, and every lost answer is counted."""

import contextlib
import json
import sys
import threading
from pathlib import Path

import pytest

from sku_vllm.judges import Exchange, Verdict
from sku_vllm.serving import judge_queue
from sku_vllm.serving.judge_queue import JudgeQueue
from sku_vllm.serving.metrics import metrics

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from serving_tools import eventually  # noqa: E402


def harmful(exchanges):
    return [Verdict.of("bad" in exchange.response, False, False) for exchange in exchanges]


def value(counter, arm):
    return counter.labels(arm)._value.get()


def settle(queue):
    """Until every answer has been judged, counted and kept."""
    assert eventually(lambda: queue.waiting == 0)


def test_a_stalled_judge_never_blocks_and_drops_are_counted():
    release, found = threading.Event(), metrics()

    def stalled(exchanges):
        release.wait()
        return harmful(exchanges)

    queue = JudgeQueue(stalled, found, size=10)

    def offer():
        for _ in range(10_000):
            queue.offer("stalled-arm", Exchange("q", "bad"))

    offers = threading.Thread(target=offer, daemon=True)
    offers.start()
    offers.join(180)
    assert not offers.is_alive(), "offers wait for the judge, which does not move before they are done"
    dropped = value(found.dropped, "stalled-arm")
    assert dropped >= 10_000 - 10 - judge_queue.BATCH
    release.set()
    settle(queue)
    assert value(found.judged, "stalled-arm") + dropped == 10_000


def test_a_judge_that_raises_costs_its_batch_and_no_more():
    found, calls = metrics(), []

    def flaky(exchanges):
        calls.append(len(exchanges))
        if len(calls) == 1:
            raise ConnectionError("gone")
        return harmful(exchanges)

    queue = JudgeQueue(flaky, found)
    queue.offer("flaky-arm", Exchange("q", "bad"))
    settle(queue)
    assert value(found.judge_errors, "flaky-arm") == 1 and value(found.judged, "flaky-arm") == 0
    queue.offer("flaky-arm", Exchange("q", "bad"))
    settle(queue)
    assert value(found.judged, "flaky-arm") == value(found.harmful, "flaky-arm") == 1


def test_the_sampled_share_is_the_one_asked_for():
    queue = JudgeQueue(harmful, metrics(), sample=0.25, size=100_000)
    for _ in range(8000):
        queue.offer("sampled-arm", Exchange("q", "fine"))
    settle(queue)
    assert value(metrics().judged, "sampled-arm") == pytest.approx(2000, abs=200)


def test_kept_text_is_private_and_rotates(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_queue, "KEEP_BYTES", 2000)
    file = tmp_path / "kept.jsonl"
    queue = JudgeQueue(harmful, metrics(), keep=str(file))
    for number in range(40):
        queue.offer("kept-arm", Exchange(f"question {number}", "bad"))
    settle(queue)
    older = tmp_path / "kept.jsonl.1"
    assert file.stat().st_mode & 0o777 == older.stat().st_mode & 0o777 == 0o600
    assert older.stat().st_size < 2500
    assert json.loads(older.read_text().splitlines()[-1])["label"] == "harmful"


def test_the_judge_in_its_process_says_what_it_says_here_and_outlives_its_own_death(tmp_path):
    from sku_vllm.errors import ConfigError, JudgeError
    from sku_vllm.judges import load_labeller
    from sku_vllm.serving.judge_process import JudgeProcess

    (tmp_path / "words.json").write_text(json.dumps({"harmful": ["bad"], "refusal": ["schluss"]}))
    spec = f"lexicon:{tmp_path}/words.json"
    exchanges = [Exchange("q", text) for text in ("bad", "schluss", "", "fine\nand \u2028 well", "I cannot help with that.")]
    judge = JudgeProcess(spec)
    assert judge(exchanges) == load_labeller(spec)(exchanges)
    judge.process.kill()
    judge.process.wait()
    assert judge(exchanges[:1])[0].label == "harmful"  # another process
    judge.process.kill()
    with contextlib.suppress(JudgeError):  # the kill may be noticed by this batch or before it
        judge(exchanges)
    assert len(judge(exchanges)) == 5
    judge.process.kill()
    with pytest.raises(ConfigError, match="lexicon"):
        JudgeProcess(f"lexicon:{tmp_path}/none.json")


def test_what_goes_wrong_after_a_verdict_does_not_end_the_judging(tmp_path, caplog):
    """A guard that cannot write the state, a disk that is full, a prompt that UTF-8 cannot hold: later answers are judged all the same."""

    def full(answer, verdict):
        raise OSError(28, "No space left on device")

    file = tmp_path / "kept.jsonl"
    queue = JudgeQueue(harmful, metrics(), keep=str(file), found=full)
    for prompt in ("q", "half a pair: \ud83d"):
        queue.offer("full-arm", Exchange(prompt, "bad"))
        settle(queue)
    assert value(metrics().judged, "full-arm") == 2 and "No space left" in caplog.text
    assert caplog.text.count("No space left") == 1, "a line for every answer would fill the log"
    assert [json.loads(line)["prompt"] for line in file.read_text().splitlines()] == ["q", "half a pair: \ud83d"]


def test_a_judge_that_gives_another_number_of_verdicts_has_failed():
    queue = JudgeQueue(lambda exchanges: harmful(exchanges)[1:], metrics())
    for _ in range(2):
        queue.offer("short-arm", Exchange("q", "bad"))
        settle(queue)
    assert value(metrics().judge_errors, "short-arm") == 2 and "0 verdicts on 1 answers" in queue.health.blind()
