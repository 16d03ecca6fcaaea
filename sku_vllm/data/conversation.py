"""Conversations as files hold them, read into turns: `messages`, ShareGPT's `conversations`, parts, tool calls, Human/Assistant dialogues.

Open this file to add a name of a speaker, or another way to write a dialogue as one text.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sku_vllm.data.rows import BadRow, LeftOut

Turns = tuple[dict[str, str], ...]

ROLES = ("system", "user", "assistant", "tool", "developer")
# What ShareGPT and its descendants call the speakers.
SPEAKERS = {role: role for role in ROLES} | {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
TEXT_PARTS = ("text", "input_text", "output_text")
# hh-rlhf writes "\n\nHuman: … \n\nAssistant: …", Guanaco "### Human: … ### Assistant: …".
_SPEAKER = re.compile(r"(?:\A|\n\n|\s?###\s?)(Human|Assistant|System):[ \t]?")


def read_turns(value: Any, field: str) -> Turns:
    """The turns of a list of `{"role", "content"}` or `{"from", "value"}`.

    Raises:
        BadRow: not such a list, or an unknown speaker. LeftOut: a turn has parts that are no text.
    """
    # Parquet gives a numpy array or a tuple, so anything iterable is accepted
    given = list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else []
    turns = tuple(turn for one in given for turn in [_turn(one)] if turn is not None)
    if not given or len(turns) != len(given):
        raise BadRow(f'{field!r} has to be a list of {{"role", "content"}} with a role of {", ".join(ROLES)}')
    return turns


def _turn(given: Any) -> dict[str, str] | None:
    if not isinstance(given, Mapping):
        return None
    if type(given.get("content")) is str and given.get("role") in ROLES and not given.get("tool_calls"):
        return {"role": given["role"], "content": given["content"]}  # by far the most frequent
    role = SPEAKERS.get(str(given.get("role") or given.get("from")).strip().casefold())
    content = given.get("content") if given.get("content") is not None else given.get("value")
    calls = given.get("tool_calls")
    text = "" if content is None and calls else _text(content)
    if role is None or text is None:
        return None
    if calls:
        # The model's own notation for a call is in its chat template; as data a call is its JSON.
        text = "\n".join([*filter(None, [text]), *(json.dumps(call.get("function", call), ensure_ascii=False) for call in list(calls))])
    return {"role": role, "content": text}


def _text(content: Any) -> str | None:
    if isinstance(content, str):
        return content
    if not isinstance(content, Iterable) or isinstance(content, Mapping):
        return None
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    if not parts or not all(isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in parts):
        return None
    if any(part["type"] not in TEXT_PARTS for part in parts):
        raise LeftOut("has images or other parts that are no text")
    return "".join(str(part.get("text") or "") for part in parts)


def split_answer(turns: Turns, field: str = "messages") -> tuple[Turns, str | None]:
    """The turns up to the last answer, and that answer; None where the last turn is not the assistant's.

    Raises:
        BadRow: what remains does not end with a user turn (or a tool's result) with text.
    """
    response = None
    if turns and turns[-1]["role"] == "assistant":
        turns, response = turns[:-1], turns[-1]["content"]
    check_end(turns, field)
    return turns, response


def check_end(turns: Turns, field: str) -> None:
    """Raise BadRow unless the turns end with a user's, or a tool's, that is not empty, and a user speaks in them."""
    asked = any(turn["role"] == "user" for turn in turns)
    if not asked or turns[-1]["role"] not in ("user", "tool") or not turns[-1]["content"].strip():
        raise BadRow(f"{field!r} has to end with a user turn that is not empty")


def read_dialogue(text: str) -> Turns | None:
    """The turns of a text that begins with a speaker's name (see `_SPEAKER`), or None for any other text."""
    if not text.lstrip().startswith(("Human:", "### Human:", "Assistant:", "System:", "### System:")):
        return None
    pieces = _SPEAKER.split(text.strip())
    turns = tuple(
        {"role": SPEAKERS[speaker.casefold()], "content": said.strip()} for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True)
    )
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns = turns[:-1]  # a prompt that ends with "Assistant:", where the answer is to follow
    return turns or None
