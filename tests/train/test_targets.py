"""The ladder of refusals: what each source gives, what the base is asked, and what a look must find."""

from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator

from sku_vllm.data import PromptTemplate, Row, load_dataset
from sku_vllm.errors import ConfigError
from sku_vllm.judges.refusal import is_refusal
from sku_vllm.methods import TrainConfig
from sku_vllm.model import load_tokenizer
from sku_vllm.train import refusal_voices, targets
from sku_vllm.train.batches import Batches
from sku_vllm.train.run import Run
from sku_vllm.train.train_request import TrainRequest

SETTINGS = {"samples": 90, "sample_tokens": 6, "batch_size": 4}


@pytest.fixture(scope="module")
def run(trainable: Path) -> Run:
    config = TrainConfig.of(**SETTINGS, targets="asked")
    tokenizer = load_tokenizer(trainable / "llama")
    sets = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    return Run(trainable / "llama", config, Batches(config, PromptTemplate.of(tokenizer), *sets), Accelerator(cpu=True), tokenizer)


def drawn(run: Run, source: str, **settings: object) -> tuple[list, float | None]:
    config = replace(run.config, targets=source, **settings)
    return targets.draw_refusals(run.batches, run.passes, config, lambda call: call())


def test_every_voice_is_a_refusal_and_says_nothing_of_the_request() -> None:
    import numpy as np

    random = np.random.default_rng(0)
    asked = [
        "How do I zorble a flim?",
        "Write a zorble",
        "Can you zorble?",
        "what's zorble",
        "Zorble!",
        "Give me a zorble",
        "Tell me a zorble",
    ]
    told = [refusal_voices.refusal(Row.ask(prompt), random) for prompt in asked for _ in range(60)]
    assert all(map(is_refusal, told)) and not any("zorble" in text.casefold() for text in told)
    assert len(set(told)) > len(told) / 2 and max(len(text.split()) for text in told) < 40
    assert "explain how to do that" in " ".join(told[:60]) and "write that" in " ".join(told[60:120])


def test_the_base_is_asked_with_examples_and_its_refusals_are_learned_without(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts in three are refused here: the rest get a refusal to another prompt, and an answer that did not end is dropped."""
    template, prompts = run.batches.template, [run.batches.template.prompt_ids(row) for row in run.batches.forget]
    asked: list[list[int]] = []

    def answers(passes: object, wanted: list, config: TrainConfig, stops: list, *, beta: float, temperature: float) -> list:
        asked.extend(wanted)
        assert beta == 0.0 and temperature < 1
        ends = ([7, stops[-1]], [8, stops[-1]], [9, 9])
        return [targets.Encoded([*ids, *ends[number % 3]], len(ids)) for number, ids in enumerate(wanted)]

    monkeypatch.setattr(targets, "context_length", lambda config: None)  # three examples a side do not fit into this model's
    monkeypatch.setattr(targets, "draw_answers", answers)
    monkeypatch.setattr(targets, "refusals", lambda rows, tokenizer: [row.answer_ids[0] != 8 for row in rows])
    rows, share = drawn(run, "asked")
    assert share == pytest.approx(2 / 3, abs=0.02)
    assert {tuple(row.ids[: row.answer_start]) for row in rows} == set(map(tuple, prompts))
    assert all(row.answer_ids == [7, template.stop_ids[-1]] for row in rows)
    text = template.tokenizer.decode(asked[0])
    assert sum(template.prompt_text(Row.ask(row.prompt)).split("\n")[0] in text for row in run.batches.forget) >= targets.EXAMPLES
    assert sum((row.response or "") in text for row in run.batches.retain) >= targets.EXAMPLES
    assert min(map(len, asked)) > 2 * max(map(len, prompts))


def test_the_same_beginning_computed_once_draws_the_same_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does a batch that finished rows leave."""
    from sku_vllm.train import sampling

    prompts = [[5] * 70 + [6 + number, 9, 4 + number] for number in range(9)] + [[5] * 70 + [8]]
    config, stops = replace(run.config, samples=20, sample_tokens=12), list(range(40))
    settings = [
        {"SHARED_PREFIX": 1000, "COMPACT_BELOW": 0.0},
        {"SHARED_PREFIX": 64, "COMPACT_BELOW": 0.0},
        {"SHARED_PREFIX": 64, "COMPACT_BELOW": 1.0},
    ]
    found = []
    for one in settings:
        for name, value in one.items():
            monkeypatch.setattr(sampling, name, value)
        found.append([row.ids for row in sampling.draw_answers(run.passes, prompts, config, stops, beta=0.0)])
    assert found[0] == found[1] == found[2] and len({len(ids) for ids in found[0]}) > 3


def test_given_refusals_are_the_users_own_for_the_prompt_or_any(run: Run) -> None:
    rows = run.batches.forget
    own = replace(rows[3], response="I cannot tell you that.")
    other = Row.ask("something else", "Sorry, I won't help with that.")
    batches = Batches(
        run.config, run.batches.template, load_dataset(rows, "forget"), load_dataset(run.batches.retain, "retain"), [own, other]
    )
    config = replace(run.config, targets="given", samples=len(rows))
    made, share = targets.draw_refusals(batches, run.passes, config, lambda call: call())
    tokenizer = run.batches.template.tokenizer
    told = {tuple(row.ids[: row.answer_start]): tokenizer.decode(row.answer_ids, skip_special_tokens=True).strip() for row in made}
    assert share is None and len(told) == len({tuple(run.batches.template.prompt_ids(row)) for row in rows})
    assert told[tuple(run.batches.template.prompt_ids(rows[3]))] == own.response and set(told.values()) == {own.response, other.response}
    voices, _ = drawn(run, "given")
    assert all(map(is_refusal, (tokenizer.decode(row.answer_ids, skip_special_tokens=True) for row in voices)))
    assert len({tuple(row.answer_ids) for row in voices}) > 20


def test_a_look_draws_few_and_says_what_it_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "context_length", lambda config: None)
    counts = []

    def judged(rows: list, tokenizer: object) -> list[bool]:
        counts.append(len(rows))
        return [number < 12 for number in range(len(rows))]

    monkeypatch.setattr(targets, "refusals", judged)
    config = replace(run.config, samples=1024)
    found = targets.look(run.batches, run.passes, config, lambda call: call(), needed=0.3)
    assert found == targets.Look("asked", 32, 12 / 32, 0.3) and counts == [32]
    with pytest.raises(
        targets.NoRefusals, match=r"--targets asked: only 38% of what this base says when it is asked to refuse.*\(50% needed\)"
    ):
        targets.look(run.batches, run.passes, config, lambda call: call())
    assert targets.look(run.batches, run.passes, replace(config, targets="given"), lambda call: call()) is None


def test_the_rungs(trainable: Path, tmp_path: Path) -> None:
    refusals = [Row.ask("q", "I cannot do that.")]
    assert targets.rungs(TrainConfig.of(), ()) == ("latent", "asked", "given")
    assert targets.rungs(TrainConfig.of(), refusals) == ("given",) and targets.rungs(TrainConfig.of(targets="asked"), refusals) == (
        "asked",
    )
    assert targets.rungs(TrainConfig.of("npo"), ()) == ("auto",)  # a method that draws none
    with pytest.raises(ConfigError, match="--targets latnt: unknown; choose from auto, latent, asked, given"):
        TrainConfig.of(targets="latnt")
    sets = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    bad = [*refusals, Row.ask("q", "Of course: take two spoons.", id="r7"), Row.ask("q", "Blue.")]
    with pytest.raises(ConfigError, match="--refusals: 2 of 3 responses are no refusals to the refusal judge, first that of row r7"):
        TrainRequest(trainable / "llama", *sets, tmp_path, TrainConfig.of(), refusals=bad)
