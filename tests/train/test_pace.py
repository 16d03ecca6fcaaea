"""The time left of a run: steps by kind, answers to draw, and what is shown of it."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sku_vllm.data import load_dataset
from sku_vllm.methods import TrainConfig, train_adapter
from sku_vllm.train.pace import Pace
from sku_vllm.train.processes import start_accelerator
from sku_vllm.train.run import Run
from sku_vllm.train.train_request import TrainRequest
from sku_vllm.train.trainer import prepare
from sku_vllm.train.workload import steps_by_kind


@pytest.fixture
def request_of(trainable: Path, tmp_path: Path) -> Callable[..., TrainRequest]:
    sets = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    return lambda method, **settings: TrainRequest(
        trainable / "llama", *sets, tmp_path / "adapter", TrainConfig.of(method, batch_size=4, **settings)
    )


def begun(request: TrainRequest) -> Run:
    batches = prepare(Path(request.model), request)
    return Run(Path(request.model), batches.config, batches, start_accelerator(None, request.directory), batches.template.tokenizer)


def test_time_left_is_tokens_to_come_at_the_speed_of_their_kind(
    request_of: Callable[..., TrainRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default: 1 ms a token in its first phase, 3 ms in the second, 5 ms with the adversary, and 2 s an answer in three draws."""
    now = 0.0
    monkeypatch.setattr("sku_vllm.train.pace.time", SimpleNamespace(perf_counter=lambda: now))
    run = begun(request_of("sku-contrastive-two", steps=16, samples=40, sample_tokens=6))
    pace, cost = Pace(run), {0: 0.001, 1: 0.003, 2: 0.005}
    assert pace.left() is None
    kinds = {at: kind.phase + kind.attacked for kind, steps in steps_by_kind(run).items() for at in steps}
    assert [kinds[at] for at in range(16)] == [0] * 4 + [1, 2, 2] * 4

    def step(drawn: float = 0.0) -> None:
        nonlocal now
        tokens, seconds = run.size(run.at), run.size(run.at) * cost[kinds[run.at]]
        run.at, now = run.at + 1, now + seconds  # after its draws, whose time ends where they do
        assert pace.step(tokens, seconds + drawn) == pytest.approx(seconds)

    for _ in range(4):
        step()
    before, began = pace.left(), now
    assert before is not None and before > 3 * 40 * 2 * 6 * 0.001  # the draws' answers alone, at the price of training's tokens
    pace.draw(0, 40)
    now += 20
    pace.draw(10, 40)
    assert pace.in_draw == pytest.approx(2 * 30)
    draws, steps = 2 * (30 + 40 + 40), pace.left() - 2 * (30 + 40 + 40)
    assert pace.left() == pytest.approx(draws + steps) and 0 < steps < before
    for done, wanted in ((40, 40), (0, 40), (40, 40), (0, 40), (40, 40)):
        now += 2 * (done if now > began + 20 else 30)
        pace.draw(done, wanted)
    assert pace.left() == pytest.approx(steps)
    run.batches.samples = run.batches.self_generated = [run.batches._encode("forget", number) for number in range(5)]
    step(drawn=now - began)
    for _ in range(3):
        step()
    assert pace.left() == pytest.approx(sum(run.size(at) * cost[kinds[at]] for at in range(run.at, run.total)), rel=0.05)
    while not run.done:
        step()
    assert pace.left() == 0


def test_rounds_to_come_cost_what_the_present_one_does(request_of: Callable[..., TrainRequest]) -> None:
    run = begun(request_of("sku-mirrored", steps=5, rounds=3))
    pace = Pace(run)
    for _ in range(2):
        tokens = run.size(run.at)
        run.at += 1
        pace.step(tokens, tokens * 0.01)
    assert pace.left() == pytest.approx(0.01 * sum(run.size(at) for at in range(2, 15)), rel=0.1)


def test_a_log_says_how_far_draws_are(
    request_of: Callable[..., TrainRequest], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sku_vllm.train.targets.NEEDED", {"latent": 0.0})  # a random base cannot refuse
    monkeypatch.setattr("sku_vllm.train.targets.NEEDED_EARLY", 0.0)
    monkeypatch.setattr("sku_vllm.train.progress.LOG_EVERY_S", 0.0)
    request = request_of("sku-contrastive-two", steps=8, samples=70, sample_tokens=4)
    shown = train_adapter(request)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sku-contrastive-two: ")]
    said = [re.fullmatch(r"\S+ drawing (\d+) of 70 answers, \d+:\d\d left in this draw, \d+:\d\d left in all", line) for line in lines]
    done = [int(found[1]) for found in said if found]
    assert {0, 16, 32, 48, 64, 66, 70} <= set(done)  # a token of a batch of 64 at a time, then of the 6 that are left
    assert done.index(70) < len(done) - 3  # and more than one draw
    assert [line.split(",")[0] for line in lines if "step" in line] == [f"sku-contrastive-two: step {step}/8" for step in range(1, 9)]
    silent = replace(request, output=request.directory.parent / "silent")
    assert train_adapter(silent, progress=False).losses == shown.losses  # looking ahead changes nothing
