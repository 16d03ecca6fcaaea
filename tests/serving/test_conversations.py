"""What the judge is told of a request, in each API; and that all of it reaches a guard."""

import json
import sys
from pathlib import Path

import pytest

from sku_vllm.judges import Exchange, Verdict
from sku_vllm.serving.conversations import conversations_of
from sku_vllm.serving.judge_process import JudgeProcess
from sku_vllm.serving.judge_queue import KeptAnswers

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from serving_tools import JudgeServer  # noqa: E402

CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"for": "mills"}'}}
CALLED = 'look\n{"for": "mills"}'
TOLD = [("system", "be brief"), ("user", "one"), ("assistant", f"well\n{CALLED}"), ("tool", "found"), ("user", "two")]
# name: (the body of a request, its conversations as (role, text))
ASKED = {
    "a prompt": ({"prompt": "one"}, [[("user", "one")]]),
    "prompts": ({"prompt": ["one", "two"]}, [[("user", "one")], [("user", "two")]]),
    "no prompt": ({"prompt": []}, []),
    "token ids": ({"prompt": [1, 2]}, [[("user", "")]]),
    "prompts of token ids": ({"prompt": [[1, 2], [3]]}, [[("user", "")], [("user", "")]]),
    "chat": (
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image_url", "image_url": {"url": "data:,"}}]},
                {"role": "assistant", "content": "well", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c", "content": "found"},
                {"role": "user", "content": "two"},
            ]
        },
        [TOLD],
    ),
    "messages": (
        {
            "system": [{"type": "text", "text": "be brief"}],
            "messages": [
                {"role": "user", "content": "one"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "well"},
                        {"type": "tool_use", "id": "c", "name": "look", "input": {"for": "mills"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "found"}]},
                        {"type": "text", "text": "two"},
                    ],
                },
            ],
        },
        [TOLD],
    ),
    "a tool's result alone": (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "found"}]}]},
        [[("tool", "found")]],
    ),
    "responses": (
        {
            "instructions": "be brief",
            "input": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "well"}]},
                {"type": "reasoning", "encrypted_content": "x", "summary": []},
                {"type": "function_call", "call_id": "c", "name": "look", "arguments": '{"for": "mills"}'},
                {"type": "function_call_output", "call_id": "c", "output": "found"},
                {"role": "user", "content": "two"},
            ],
        },
        [TOLD],
    ),
    "responses in one text": ({"instructions": "be brief", "input": "one"}, [[("system", "be brief"), ("user", "one")]]),
    "responses of a stored prompt": ({"prompt": {"id": "p"}, "input": "one"}, [[("user", "one")]]),
    "chats in a batch": (
        {"messages": [[{"role": "user", "content": "one"}], [{"role": "developer", "content": "x"}, {"role": "user", "content": "two"}]]},
        [[("user", "one")], [("developer", "x"), ("user", "two")]],
    ),
    "roles that nobody knows": (
        {"messages": [{"role": "human", "content": "one"}, {"role": ["x"], "content": "two"}, {"role": "function", "content": "three"}]},
        [[("user", "one"), ("user", "two"), ("tool", "three")]],
    ),
}


@pytest.mark.parametrize("case", ASKED)
def test_every_turn_is_told(case):
    body, expected = ASKED[case]
    assert [[(turn["role"], turn["content"]) for turn in turns] for turns in conversations_of(body)] == expected


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": None},
        {"messages": "x"},
        {"messages": [None, 3, {}, {"role": None}, {"role": "user"}]},
        {"messages": [[]]},
        {"messages": {"role": "user"}},
        {"input": 3, "instructions": {"x": []}},
        {"prompt": 3},
        {"prompt": [None, {}]},
        {"system": 5, "messages": [{"role": "user", "content": {"content": {"text": ["x"]}}}]},
    ],
)
def test_what_vllm_refuses_breaks_nothing(body):
    for turns in conversations_of(body):
        assert Exchange.of(turns, "x").conversation and all(type(turn["content"]) is str for turn in turns)


def test_a_body_nested_too_deeply_breaks_nothing():
    deep = "x"
    for _ in range(5000):
        deep = [deep]
    assert conversations_of({"messages": [{"role": "user", "content": deep}]}) == [({"role": "user", "content": ""},)]


def test_a_guard_gets_the_whole_conversation_and_so_does_the_file(tmp_path):
    """Through the judge's own process, to the server that it asks; and into --keep-judged, as rows.jsonl has it."""
    guard = JudgeServer()
    (turns,) = conversations_of(ASKED["chat"][0])
    exchange = Exchange.of(turns, "a badword")
    judge = JudgeProcess(f"openai:{guard.url}#m")
    try:
        (verdict,) = judge([exchange])
        judge([Exchange("alone", "fine")])
    finally:
        judge.process.kill()
    whole, alone = (body["messages"][-1]["content"] for body in guard.received)
    told = [*(turn["content"] for turn in turns), "a badword"]
    assert all(text in whole for text in told) and sorted(told, key=whole.index) == told
    assert "alone" in alone and "be brief" not in alone
    assert verdict.harmful
    kept = KeptAnswers(tmp_path / "kept.jsonl")
    kept.write("arm", exchange, Verdict.of(True, False, False))
    kept.write("arm", Exchange("alone", "fine"), Verdict.of(False, False, False))
    first, second = map(json.loads, (tmp_path / "kept.jsonl").read_text().splitlines())
    assert first["messages"] == list(turns) and first["prompt"] == "two" and "messages" not in second
