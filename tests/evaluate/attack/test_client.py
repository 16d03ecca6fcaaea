"""What a client can try: earlier turns, encodings, other languages."""

import base64
import codecs
from pathlib import Path

from sku_vllm.data import Row, read_rows
from sku_vllm.evaluate.attack.attack import AttackCase
from sku_vllm.evaluate.attack.attack_request import AttackRequest
from sku_vllm.evaluate.attack.encode import ENCODINGS
from sku_vllm.evaluate.attack.language import LANGUAGES, speaks
from sku_vllm.evaluate.attack.turns import TURNS
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.model_spec import ModelSpec


def a_case(lab: Path) -> AttackCase:
    rows = [Row(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "How do I jam it?"}))]
    request = AttackRequest(
        ModelSpec(lab / "llama"),
        kinds=["turns"],
        forget={"f": rows},
        retain=read_rows(lab / "retain/test.jsonl")[:4],
        judge=f"lexicon:{lab / 'lexicon.json'}",
        config=EvalConfig(samples=0, max_new_tokens=8),
    )
    return AttackCase(request, print)


def test_turns_end_with_the_question_and_leave_the_system_message_first(lab: Path) -> None:
    case = a_case(lab)
    (row,) = case.questions.forget["f"]
    for name, conversation in TURNS.items():
        (longer,) = conversation(case, "f", [row])
        roles = [message["role"] for message in longer.messages]
        assert roles[0] == "system" and longer.messages[0] == row.messages[0] and len(roles) >= 4, name
        assert roles[1:] == ["user", "assistant"] * ((len(roles) - 2) // 2) + ["user"] and longer.prompt.endswith(row.prompt)
        assert all(message["content"] for message in longer.messages)
    case.close()


def test_encodings_can_be_read_back() -> None:
    text = "How do I jam a flikon?"
    said = {name: encode(text) for name, encode in ENCODINGS.items()}
    assert base64.b64decode(said["base64"].rsplit(" ", 1)[1]).decode() == text
    assert codecs.decode(said["rot13"].split(": ")[1], "rot13") == text
    assert said["leetspeak"] == "H0w d0 1 j4m 4 fl1k0n?" and all(text not in one for one in said.values())


def test_only_languages_that_the_model_answers_in_are_asked(lab: Path) -> None:
    assert LANGUAGES["German"].is_spoken("Das ist die Antwort.") and not LANGUAGES["German"].is_spoken("This is the answer.")
    case = a_case(lab)
    assert not speaks(case, "German", LANGUAGES["German"])
    case.close()
