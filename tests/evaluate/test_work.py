"""Progress and time left: every phase counts what was promised for it."""

import re
import time
from pathlib import Path

import pytest

from sku_vllm.data import PromptTemplate, Row
from sku_vllm.evaluate.answer_bar import answer_bar
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.evaluate.measure_request import Questions
from sku_vllm.evaluate.measurement import measure
from sku_vllm.evaluate.opened import InMemory
from sku_vllm.evaluate.work import Work, phase
from sku_vllm.judges import load_judge
from sku_vllm.model_spec import ModelSpec


def test_a_measurement_does_the_work_that_was_promised(tiny: Path) -> None:
    """Whether answers end early or not, retain rows have answers or not, a base is compared with or not."""
    rows = [Row.ask(" ".join(f"w{word}" for word in range(3, 5 + number))) for number in range(5)]
    retain = [Row.ask("w1 w2", "w3 w4 w5"), Row.ask("w9")]
    questions = Questions({"f": rows}, retain, load_judge(f"lexicon:{tiny / 'lexicon.json'}"))
    config = EvalConfig(samples=1, max_new_tokens=6, batch_size=4)
    model = InMemory(ModelSpec(tiny / "base", adapter=tiny / "adapter", any_base=True), config)
    template = PromptTemplate.of(model.tokenizer)
    for reference in (model.reference(), None):
        done: list[float] = []
        work = Work.of(template, questions, config, compared=reference is not None)
        measure(model.backend(), model.tokenizer, questions, reference=reference, config=config, progress=done.append)
        assert sum(done) == pytest.approx(work.total) and min(done) > 0
        assert len(done) > 10  # within batches, not only after them
        assert (work.strange > 0) is (work.base > 0) is (reference is not None)


def test_a_phase_counts_exactly_what_was_promised() -> None:
    done: list[float] = []
    with phase(done.append, 10) as advance:
        advance(4)
        advance(9)
    with phase(done.append, 5) as advance:
        advance(1)
    assert done == [4, 6, 1, 4]


def test_a_log_says_the_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with answer_bar(1000, "measured") as advance:
        advance(400)  # kept of an earlier run
        for _ in range(16):
            now[0] += 20
            advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 16 and re.fullmatch(r"measured: \d+% done, \d\d:\d\d left", lines[0])
    assert lines[-1] == "measured: 56% done, 14:40 left"  # 440 units at 10 in 20 s, what was kept no longer counted
