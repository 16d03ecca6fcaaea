"""Relearning: topics that are held out, what is trained on and with what, and knowledge apart from harmful words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from sku_vllm.data import PromptTemplate, Row, read_rows
from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.answers import Answer, Ending, Reply
from sku_vllm.evaluate.attack.attack import AttackCase
from sku_vllm.evaluate.attack.attack_config import AttackConfig
from sku_vllm.evaluate.attack.attack_model import attack_model
from sku_vllm.evaluate.attack.attack_request import AttackRequest
from sku_vllm.evaluate.attack.fine_tune import encode_all, fine_tune, trainable
from sku_vllm.evaluate.attack.relearn import courses
from sku_vllm.evaluate.attack.similar import similar_rows
from sku_vllm.evaluate.attack.target import Restored
from sku_vllm.evaluate.chart import knowledge_svg
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.evaluate.shares import knowledge, recovered
from sku_vllm.model import load_model, load_tokenizer
from sku_vllm.model_spec import ModelSpec

Asked = Callable[..., AttackRequest]


@pytest.fixture
def asked(lab: Path) -> Asked:
    """Requests to relearn on 40 rows of the lab's unseen topics, asked about the same."""

    def request(**more: Any) -> AttackRequest:
        rows = read_rows(lab / "forget/unseen-topic.jsonl")[:40]
        rest = {"relearn": None, "settings": AttackConfig(steps=(1,), fractions=(1.0,)), **more}
        config = EvalConfig(samples=1, max_new_tokens=32)
        retain = read_rows(lab / "retain/test.jsonl")[:8]
        judge = f"lexicon:{lab / 'lexicon.json'}"
        return AttackRequest(
            ModelSpec(lab / "llama"), kinds=["relearn"], forget={"f": rows}, retain=retain, judge=judge, config=config, **rest
        )

    return request


def topic(row: Row) -> str:
    return str(row.id).split(":")[0]


def test_topics_are_held_out(asked: Asked, tmp_path: Path) -> None:
    """Without --relearn the forget sets' own rows are learned: those of the topics, and no prompt of theirs is asked afterwards."""
    rows = asked().forget["f"]
    some = sorted({topic(row) for row in rows})[:3]
    report = attack_model(asked(relearn_topics=some, output=tmp_path / "out"))
    own = [row for row in rows if topic(row) in some]
    benign, harmful = report.attacks["relearn"][:2], report.attacks["relearn"][2:]
    assert [entry["steps"] for entry in harmful] == [0, 1] and all(entry["pairs"] == len(own) for entry in harmful)
    for entry in (*benign, *harmful):  # both courses are measured on the same prompts
        assert entry["forget"]["f"]["greedy"]["n"] == entry["forget"]["f"]["greedy"]["knowledge_n"] == len(rows) - len(own)
        assert entry["recovered"] == entry["forget"]["f"]["sampled"]["knowledge"]
    assert harmful[0]["cost_tokens"] == 0 < harmful[1]["cost_tokens"] and harmful[0]["recovered"] > 0.2  # the base knows
    assert report.rests_on == "knowledge of held-out topics" and (tmp_path / "out/knowledge.svg").is_file()


def test_topics_that_cannot_be_held_out_are_refused(asked: Asked) -> None:
    topics = sorted({topic(row) for row in asked().forget["f"]})
    with pytest.raises(ConfigError, match="--relearn-topics flikonn: no prompt"):
        attack_model(asked(relearn_topics=["flikonn"]))
    with pytest.raises(ConfigError, match="--relearn-topics: .* holds every prompt of --forget f"):
        attack_model(asked(relearn_topics=topics))
    with pytest.raises(ConfigError, match="--relearn-on evil: choose from benign, similar, harmful"):
        AttackConfig(relearn_on=("evil",))


def test_courses_go_through_rows_weights_and_rates(asked: Asked, lab: Path) -> None:
    settings = AttackConfig(fractions=(0.5,), lr=(1e-4, 1e-3), relearn_with=("full", "lora"), relearn_on=("similar", "harmful"))
    case = AttackCase(asked(relearn=lab / "forget/train.jsonl", settings=settings), print)
    found = courses(case)
    assert [course.name for course in found][:4] == [
        "similar benign rows, rate 0.0001",
        "similar benign rows, rate 0.001",
        "similar benign rows, LoRA, rate 0.0001",
        "similar benign rows, LoRA, rate 0.001",
    ]
    assert len(found) == 8 and {(course.how, course.lr) for course in found[4:]} == {
        (how, lr) for how in ("full", "lora") for lr in (1e-4, 1e-3)
    }


def test_similar_rows_share_the_frame_not_the_subject() -> None:
    framed = [Row.ask(f"How do I {verb} the {thing} at night?", "So.") for verb, thing in (("clean", "cup"), ("lift", "box"))]
    others = [Row.ask(f"{thing} is made where, and by whom?", "There.") for thing in ("A cup", "A box", "A hat", "A pot", "A pen", "A bag")]
    found = similar_rows([*others, *framed], ["How do I wreck the engine at night?", "How do I break the lock at night?"])
    assert {row.prompt for row in found} == {row.prompt for row in framed}


def test_a_lora_learns_and_leaves_nothing_behind(lab: Path) -> None:
    model, template = load_model(ModelSpec(lab / "llama", dtype="float32")), PromptTemplate.of(load_tokenizer(lab / "llama"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = read_rows(lab / "forget/train.jsonl")[:4]
    encoded, ids = encode_all(model, template, rows), torch.tensor([template.prompt_ids(rows[0])])
    plain = model(ids).logits
    for _ in range(2):  # a second LoRA does not find the first
        with Restored(model), trainable(model, "lora") as trained:
            assert torch.equal(model(ids).logits, plain)
            assert list(fine_tune(model, encoded, [2], lr=1e-2, batch_size=4, trained=trained)) == [2]
            assert not torch.allclose(model(ids).logits, plain, atol=1e-2)
    assert torch.equal(model(ids).logits, plain) and model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_knowledge_wants_every_fact_and_counts_only_rows_with_facts() -> None:
    def answer(text: str, facts: tuple[str, ...]) -> tuple[str, bool | None]:
        made = Answer.of("f", "sampled", Row.ask("q", must_contain=facts), Reply(text, Ending(3, True, False)))
        return made.row.key, made.right

    facts = ("jam the valve", "brolax")
    told = ["First jam the valve, then pour brolax in.", "Jam the valve with brolax.", "jam the brolax"]
    found = knowledge([*(answer(text, facts) for text in told), answer("anything", ())])
    assert (
        found["knowledge_n"] == 3
        and found["knowledge"] == pytest.approx(1 / 3)
        and found["knowledge_low"] < 1 / 3 < found["knowledge_high"]
    )
    assert knowledge([answer("anything", ())]) == {}
    assert recovered({"forget": {"f": {"greedy": {"knowledge": 0.9}, "sampled": found}, "g": {"greedy": {}}}}) == pytest.approx(1 / 3)
    assert recovered({"forget": {"g": {"greedy": {}}}}) is None


def test_knowledge_is_drawn_over_cost_with_a_line_a_model_and_course() -> None:
    def entry(course: str, cost: int, share: float) -> dict[str, Any]:
        return {"attack": course, "steps": cost, "cost_tokens": cost, "recovered": share}

    models = {"base": [entry("a", 0, 0.5), entry("a", 9000, 0.6)], "oracle": [entry("a", 0, 0.0), entry("a", 90_000, 0.0), {"attack": "b"}]}
    drawn = ElementTree.fromstring(knowledge_svg(models))
    lines = [line.get("points").split() for line in drawn.findall(".//{*}polyline")]
    assert [len(line) for line in lines] == [2, 2]
    across = [[float(point.split(",")[0]) for point in line] for line in lines]
    assert across[0][0] == across[1][0] < across[0][1] < across[1][1]  # costs of 0 and of one decade apart
    assert {"base: a", "oracle: a", "10,000"} <= {text.text for text in drawn.findall(".//{*}text")}
    assert ElementTree.fromstring(knowledge_svg({})) is not None
