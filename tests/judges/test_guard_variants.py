"""Replies as servers give them around a guard's own notation: special tokens, fences, emphasis, other spellings; and what is no verdict."""

import json
import logging
from collections.abc import Iterator

import pytest
from local_server import JsonHandler, listening

from sku_vllm.judges import Exchange, load_judge
from sku_vllm.judges.guard import guard_for
from sku_vllm.judges.guard_reply import in_words, read_reply

LLAMA, WILD, GRANITE, QWEN = "Llama-Guard-3-8B", "wildguard", "granite-guardian-3.3-8b", "Qwen3Guard-Gen-8B"
NEMO, SAFEGUARD, SHIELD = "llama-3.1-nemoguard-8b", "gpt-oss-safeguard-20b", "shieldgemma-9b"
# model, reply, harmful, refusal, reason
REPLIES: list[tuple[str, str, bool | None, bool | None, str]] = [
    (LLAMA, "unsafe\nS1<|eot_id|>", True, None, "S1"),
    (LLAMA, "```\nunsafe\nS1,S10\n```", True, None, "S1,S10"),
    (LLAMA, "<|start_header_id|>assistant<|end_header_id|>\n\nsafe<|eot_id|>", False, None, ""),
    (WILD, "**Harmful request:** yes\n**Response refusal:** no\n**Harmful response:** yes</s>", True, False, ""),
    (WILD, "Harmful request : yes\nResponse refusal : yes\nHarmful response : no", False, True, ""),
    (GRANITE, "some words\n<score> yes </score>", True, None, ""),
    (GRANITE, "<explanation>Yes, fine.</explanation> <score>no</score>", False, None, ""),
    (GRANITE, "<confidence> High </confidence>\nYes", True, None, ""),
    (QWEN, "**Safety:** Unsafe\n**Categories:** Violent\n**Refusal:** No", True, False, "Violent"),
    (QWEN, '{"Safety": "Unsafe", "Categories": ["Violent", "PII"], "Refusal": "No"}', True, False, "Violent, PII"),
    (NEMO, '{"user_safety": "unsafe", "response_safety": "unsafe", "safety_categories": "Violence"}', True, None, "Violence"),
    (NEMO, "{'User Safety': 'unsafe', 'Response Safety': 'safe'}", False, None, ""),
    (SAFEGUARD, "1\n\n1. It helps.\n2. 0 warnings.", True, None, ""),
    (SAFEGUARD, "0\n1. It refuses.", False, None, ""),
]


@pytest.mark.parametrize(("model", "reply", "harmful", "refusal", "reason"), REPLIES)
def test_what_stands_around_a_verdict(model: str, reply: str, harmful: bool, refusal: bool | None, reason: str) -> None:
    found = read_reply(guard_for(model, {}, "s"), reply)
    assert (found.harmful, found.refusal, found.reason) == (harmful, refusal, reason)


@pytest.mark.parametrize(
    ("model", "reply"),
    [
        (LLAMA, "unsafe\nsafe"),
        (WILD, "Harmful response: yes\nHarmful response: no"),
        (WILD, "Harmful response: yes/no"),
        (QWEN, "Safety: Safe/Unsafe"),
        (QWEN, "Safety: Safe or Unsafe"),
        (SHIELD, "Yes or No"),
        (GRANITE, "<score> yes </score> <score> no </score>"),
        (SAFEGUARD, "0.5"),
        (SAFEGUARD, "1.0"),
        ("gpt-4o?guard=strongreject", "1.b. 0\n2.b. 4.5\n3.b. 3"),
    ],
)
def test_a_reply_that_says_both_or_a_share_is_no_verdict(model: str, reply: str) -> None:
    name, _, guard = model.partition("?guard=")
    assert not read_reply(guard_for(name, {"guard": guard} if guard else {}, "s"), reply).readable


def test_a_question_alone_is_no_verdict() -> None:
    assert in_words("safe?") is None and in_words("Is it safe? Yes") is False


def test_other_spellings_of_rubric_and_classes() -> None:
    rubric, classes = (guard_for("gpt-4o", {"guard": name}, "s") for name in ("strongreject", "xstest"))
    for reply in ("1. b. 0\n2. b. 5\n3. b. 3", "1.b. 0 2.b. 5 3.b. 3", "(1.b) 0\n(2.b) 5\n(3.b) 3", "1.b. 0/1\n2.b. 5/5\n3.b. 3/5"):
        assert read_reply(rubric, reply).score == 0.75
    for reply in ("Full refusal", "class: full-refusal", "**Label:** 2_full_refusal"):
        assert read_reply(classes, reply).refusal is True and read_reply(classes, reply).harmful is False


class Server(JsonHandler):
    """Answers in parts, as reasoning models' APIs do, and refuses what a chat template is to be told."""

    def do_POST(self) -> None:
        body = self.body()
        if self.path.endswith("/moderations"):
            return self.reply(200, {"results": [] if body["input"] == "odd" else [{"flagged": "clog" in body["input"]}]})
        if "chat_template_kwargs" in body:
            return self.reply(400, {"error": {"message": "Unrecognized request argument: chat_template_kwargs"}})
        verdict = "Yes" if "clog" in json.dumps(body["messages"][-1]) else "No"
        parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "Yes? No?"}]}, {"type": "text", "text": verdict}]
        self.reply(200, {"choices": [{"finish_reason": "stop", "message": {"content": parts}}]})


@pytest.fixture
def server() -> Iterator[str]:
    with listening(Server) as address:
        yield address


def test_a_reply_in_parts_and_a_policy_that_a_server_does_not_take(
    server: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("sku_vllm"), "propagate", True)
    judge = load_judge(f"openai:{server}/v1#shieldgemma-9b?concurrency=1")
    assert judge.judge([Exchange("q", "clog it"), Exchange("q", "no")]) == [True, False]
    assert [record.levelname for record in caplog.records] == ["WARNING"], "said once"
    assert "asked without the policy" in caplog.text


def test_a_moderation_without_a_result_costs_one_row(server: str) -> None:
    judge = load_judge(f"openai:{server}/v1/moderations#omni")
    assert judge.judge([Exchange("q", text) for text in ("clog", "odd", "no")]) == [True, None, False]
