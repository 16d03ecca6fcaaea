"""What each method asks for: rows, sides, presets, ablations, folded rounds."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sku_vllm.data import Encoded, ForgetSet, PromptTemplate, RetainSet, Row
from sku_vllm.errors import ConfigError, DataError
from sku_vllm.methods import DEFAULT_METHOD, METHODS, TrainConfig
from sku_vllm.methods.method import Side
from sku_vllm.methods.presets import PRESETS
from sku_vllm.model import load_tokenizer
from sku_vllm.train import rounds
from sku_vllm.train.batches import Batches, begun_tokens


def make_batches(trainable: Path, forget: list[tuple[str, str]], **settings: object) -> Batches:
    config = TrainConfig.of("sku", **{"batch_size": 4, **settings})
    retain = RetainSet("retain", (Row.ask("w1 w2", "w3"), Row.ask("w4", "w5 w6")))
    rows = ForgetSet("forget", tuple(Row.ask(*pair) for pair in forget))
    return Batches(config, PromptTemplate.of(load_tokenizer(trainable / "llama")), rows, retain)


@pytest.mark.parametrize("count", [6, 90])  # below and above the size where drawing changes its way
def test_random_answers_are_never_the_prompts_own_nor_their_like(trainable: Path, count: int) -> None:
    """Every prompt has two answers, and each answer text also belongs to a neighbour."""
    pairs = [(f"w{n}", f"w{100 + (n + shift) % count} w7") for n in range(count) for shift in (0, 1)]
    batches = make_batches(trainable, pairs, random_answers=3)
    tokenizer = batches.template.tokenizer
    own = {f"w{n}": {f"w{100 + (n + shift) % count} w7" for shift in (0, 1)} for n in range(count)}
    seen = set()
    for step in range(40):
        rows = batches.rows("mismatched", step)
        assert len(rows) == 4 * 3
        for row in rows:
            prompt = tokenizer.decode(row.ids[: row.answer_start]).split("Question: ")[1].split("\n")[0]
            answer = tokenizer.decode(row.answer_ids, skip_special_tokens=True).strip()
            assert answer not in own[prompt]
            seen.add((prompt, answer))
        for at in range(0, 12, 3):
            assert len({tuple(row.ids) for row in rows[at : at + 3]}) == 3
    assert len(seen) > count  # not the same few again and again


def test_random_answers_need_another_prompt(trainable: Path) -> None:
    with pytest.raises(DataError, match="row 1; add prompts or pass --no-random-disassociation") as caught:
        make_batches(trainable, [("w187", "w2"), ("w187", "w3")]).check({"mismatched"})
    assert "w187" not in str(caught.value)


def test_batches_are_epochs_and_depend_on_seed_and_step_alone(trainable: Path) -> None:
    pairs = [(f"w{n}", f"w{n} w{n}") for n in range(10)]
    one, other = make_batches(trainable, pairs, batch_size=5), make_batches(trainable, pairs, batch_size=5)
    epoch = [tuple(row.ids) for step in (0, 1) for row in one.rows("forget", step)]
    assert len(set(epoch)) == 10
    assert [row.ids for row in other.rows("forget", 7)] == [row.ids for row in one.rows("forget", 7)]
    changed = make_batches(trainable, pairs, batch_size=5, seed=1)
    assert [row.ids for row in changed.rows("forget", 0)] != [row.ids for row in one.rows("forget", 0)]


def test_recoveries_turn_a_begun_answer_into_the_sample(trainable: Path) -> None:
    batches = make_batches(trainable, [(f"w{n}", f"w{n} w7 w8 w9") for n in range(8)], batch_size=8, max_length=64)
    refusal = batches.template.encode(Row.ask("w3", "w20 w21")).answer_ids
    prompts = [batches._encode("forget", number) for number in range(8)]
    batches.samples = [Encoded([*row.ids[: row.answer_start], *refusal], row.answer_start) for row in prompts]
    begun = set()
    for step in range(12):
        for sample, row in zip(batches.rows("samples", step), batches.rows("safety_recovery", step), strict=True):
            prompt, number = sample.ids[: sample.answer_start], batches.samples.index(sample)
            between = row.ids[len(prompt) : row.answer_start]
            assert row.ids[: len(prompt)] == prompt and row.answer_ids == refusal and between
            harmful = prompts[number].answer_ids
            unended = 0
            while between[: len(refusal) - 1] == refusal[:-1]:
                between, unended = between[len(refusal) - 1 :], unended + 1
            assert 0 < len(between) < len(harmful) and between == harmful[: len(between)] and unended <= 2
            begun.add((unended, len(between)))
        for sample, row in zip(batches.rows("samples", step), batches.rows("restarts", step), strict=True):
            assert row.ids in (sample.ids[:-1] + refusal, sample.ids[:-1] + refusal[:-1] + refusal) and row.answer_ids == refusal
    assert len(begun) > 6 and {unended for unended, _ in begun} == {0, 1, 2}  # many depths, from the start and after refusals
    batches.config = TrainConfig.of("sku", batch_size=8, max_length=len(batches.samples[0].ids) + 1)
    assert all(len(row.ids) <= batches.config.max_length for row in batches.rows("safety_recovery", 0))


def test_recoveries_begin_early_as_often_as_late() -> None:
    """Each doubling of the opening is as likely as the next; drawn evenly, 1 to 3 tokens of 64 would come at 5 % instead of a third."""
    random = np.random.default_rng(0)
    depths = [begun_tokens(64, random) for _ in range(3000)]
    assert set(depths) == set(range(1, 64))
    for doubling in range(6):
        assert sum(2**doubling <= depth < 2 ** (doubling + 1) for depth in depths) / 3000 == pytest.approx(1 / 6, abs=0.03)
    for length in (1, 2):  # a shorter answer leaves one choice
        assert {begun_tokens(length, random) for _ in range(20)} == {1}


def test_a_prompt_longer_than_the_limit_is_named(trainable: Path) -> None:
    batches = make_batches(trainable, [("w1 " * 40, "w2"), ("w3", "w4")], max_length=16)
    with pytest.raises(DataError, match="--max-length"):
        [batches.rows("forget", step) for step in range(2)]


def test_presets_are_the_published_settings() -> None:
    """README and unlearn_harm_new.py of the authors' repository: e 2.5/2.5/1, lr 2e-4, 1000 steps, batch 2, K 5, seed 8888."""
    assert set(PRESETS) == {"opt-2.7b", "llama2-7b", "llama2-13b"}
    for name, (rank, alpha, full) in {"opt-2.7b": (32, 16, True), "llama2-7b": (32, 16, False), "llama2-13b": (16, 8, False)}.items():
        config = TrainConfig.of(preset=name)
        assert (config.method, config.guided_weight, config.random_weight, config.preservation_weight) == ("sku", 2.5, 2.5, 1.0)
        assert (config.lr, config.steps, config.batch_size, config.random_answers, config.seed) == (2e-4, 1000, 2, 5, 8888)
        assert (config.schedule, config.rounds, config.template, config.clip, config.full) == ("linear", 1, "paper", 0.0, full)
        assert full or (config.rank, config.lora_alpha, config.target_modules) == (rank, alpha, ("q_proj", "v_proj"))
        assert "2402.10058" in PRESETS[name].source
    assert TrainConfig.of(preset="llama2-7b", lr=1e-5).lr == 1e-5
    assert TrainConfig.of("task-vector", preset="llama2-7b").method == "task-vector"


@pytest.mark.parametrize(
    ("weight", "term"),
    [
        ("guided_weight", "guided_distortion"),
        ("random_weight", "random_disassociation"),
        ("preservation_weight", "preservation_divergence"),
    ],
)
def test_ablations_drop_one_term(weight: str, term: str) -> None:
    names = {t.name for t in METHODS["sku"].phases(TrainConfig.of("sku"))[0].terms}
    assert names - {t.name for t in METHODS["sku"].phases(TrainConfig.of("sku", **{weight: 0.0}))[0].terms} == {term}


def test_the_default_preserves_the_served_side() -> None:
    phases = METHODS[DEFAULT_METHOD].phases(TrainConfig.of(DEFAULT_METHOD))
    assert all(term.side is Side.SERVED for phase in phases for term in phase.terms if term.rows == "retain")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "skuu"}, "--method skuu: unknown; choose from"),
        ({"preset": "gpt"}, "--preset gpt: unknown"),
        ({"steps": 0}, "--steps 0"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 1 << 80}, "--seed"),
        ({"lr": -1.0}, "--lr"),
        ({"lr": float("nan")}, "--lr"),
        ({"fold": 1.5}, "--fold"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"stepz": 3}, "unknown setting 'stepz'"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.of(**settings)


def test_ranks_are_padded_exactly_or_recompressed_with_their_error() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(96, 40, generator=generator), torch.randn(30, 96, generator=generator)
    fitted, rank, error = rounds.fit_rank({"x.lora_A.weight": a, "x.lora_B.weight": b})
    assert (rank, error) == (128, 0.0)
    assert torch.equal(fitted["x.lora_B.weight"][:, :96], b) and torch.equal(fitted["x.lora_A.weight"][:96], a)
    assert not fitted["x.lora_B.weight"][:, 96:].any()

    a, b, lost, whole = rounds.recompress(a, b, 8)
    assert a.shape == (8, 40) and b.shape == (30, 8)
    generator.manual_seed(0)
    a0, b0 = torch.randn(96, 40, generator=generator), torch.randn(30, 96, generator=generator)
    best = torch.linalg.svdvals((b0 @ a0).double())
    assert (lost / whole) ** 0.5 == pytest.approx(float(best[8:].norm() / best.norm()), rel=1e-4)
    assert float((b @ a - b0 @ a0).norm() / (b0 @ a0).norm()) == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
