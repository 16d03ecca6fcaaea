"""Conversations as files hold them, read into turns: `messages`, ShareGPT's `conversations`, parts, tool calls, Human/Assistant dialogues.

Open this file to add a name of a speaker, or another way to write a dialogue as one text.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sku_vllm.data.rows import BadRow, LeftOut
from sku_vllm.data.written import written_value

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
SPEAKERS |= dict.fromkeys(("bing", "bard", "claude", "gemini", "gpt4", "gpt-4", "tool_call", "tool_calls"), "assistant")
SPEAKERS |= dict.fromkeys(("tool_response", "tool_result", "tools", "ipython"), "tool")
WHO, WHAT = ("role", "from", "speaker"), ("content", "value", "text")  # keys of a turn's speaker and text, the first that are there
# Forms of published sets, whose conversations no user can mend: those that cannot be used are left out.
PUBLISHED = ("conversations", "conversation", "chat", "transcript", "chosen", "rejected")
HELP = "other column names are given with --columns prompt=NAME,response=NAME"
TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # names of a turn's reasoning, and types of its parts
# One exchange as one object, as Belle and XTuner write conversations.
EXCHANGES = (("human", "assistant"), ("user", "assistant"), ("input", "output"), ("prompt", "response"), ("question", "answer"))
# hh-rlhf writes "\n\nHuman: … \n\nAssistant: …", Guanaco "### Human: … ### Assistant: …".
_SPEAKER = re.compile(r"(?:\A|\n\n|\s?###\s?)(Human|User|Assistant|System):[ \t]?")
_LINES = re.compile(r"(?:\A|\n+)(Human|User|Assistant|System):[ \t]?")  # the same with a line each
_CAPITALS = re.compile(r"(?:\A|\n+)(HUMAN|USER|ASSISTANT|SYSTEM|FUNCTION)(?: RESPONSE)?:[ \t]?")  # Glaive's
_ENDS = re.compile(r"\s*(?:<\|endoftext\|>|</s>)\s*(?=\n|\Z)")


def read_turns(value: Any, field: str) -> Turns:
    """The turns of a list of `{"role", "content"}` or `{"from", "value"}`, or of objects that are one exchange each (`EXCHANGES`).

    Raises:
        BadRow: not such a list, or an unknown speaker. LeftOut: it is empty, or a turn has no text, or parts that are no text.
    """
    # Parquet gives a numpy array or a tuple, so anything iterable is accepted
    listed = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    given = list(value) if listed else []
    if listed and not given:
        raise LeftOut("an empty conversation")
    found = [_turn(one) for one in given]
    if not found or None in found:
        who = next((told for one in given if isinstance(one, Mapping) and (told := _who(one)) and told not in SPEAKERS), None)
        if who is not None and field in PUBLISHED:
            raise LeftOut(f"has a speaker that is not known ({who[:20]!r})")
        strange = f"; {who[:20]!r} is none" if who is not None else f", not {type(value).__name__}" if not listed else ""
        raise BadRow(f'{field!r} has to be a list of {{"role", "content"}} with a role of {", ".join(ROLES)}{strange}; {HELP}')
    return tuple(turn for turns in found for turn in turns or ())


def turns_in(text: str, kind: type) -> list[Any] | None:
    """The list of `kind` that a text is, in JSON or as Python prints it, as CSV files hold turns and answers; None for any other text."""
    value = written_value(text)
    return value if isinstance(value, list) and all(isinstance(one, kind) for one in value) else None


def are_turns(value: Any) -> bool:
    """Whether a value is a conversation: a list of objects that each name a speaker."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) and ("role" in one or "from" in one) for one in value)


def _turn(given: Any) -> Turns | None:
    """The turn, or both turns of an exchange; None for neither."""
    if not isinstance(given, Mapping):
        return None
    if type(given.get("content")) is str and given.get("role") in ROLES and len(given) == 2:
        return ({"role": given["role"], "content": given["content"]},)  # by far the most frequent
    who = _who(given)
    if who is None:
        return _exchange(given)
    role = SPEAKERS.get(who)
    content = next((given[name] for name in WHAT if given.get(name) is not None), None)
    calls = [*(given.get("tool_calls") or ()), *([given["function_call"]] if given.get("function_call") else [])]
    if role is None:
        return None
    if content is None and not calls:
        raise LeftOut("has a turn without text")
    results = not isinstance(content, str | None) and all(
        isinstance(part, Mapping) and part.get("type") == "tool_result" for part in content
    )
    text = "" if content is None else _text(content)
    if text is None:
        return None
    # The model's own notation for a call is in its chat template; as data a call is its JSON.
    said = "\n".join([*filter(None, [text]), *(_json(call.get("function", call)) for call in calls)])
    thought = next((given[name] for name in THOUGHTS if isinstance(given.get(name), str) and given[name].strip()), "")
    return ({"role": "tool" if results else role, "content": f"<think>\n{thought.strip()}\n</think>\n\n{said}" if thought else said},)


def _who(given: Mapping[str, Any]) -> str | None:
    """The speaker of a turn, in lower case; None where it names none."""
    named = [given[name] for name in WHO if name in given]
    return str(next(filter(None, named), "")).strip().casefold() if named else None


def _exchange(given: Mapping[str, Any]) -> Turns | None:
    for asked, answered in EXCHANGES:
        if isinstance(given.get(asked), str) and isinstance(given.get(answered), str):
            system = [{"role": "system", "content": given["system"]}] if given.get("system") else []
            return (*system, {"role": "user", "content": given[asked]}, {"role": "assistant", "content": given[answered]})
    return None


def _json(call: Any) -> str:
    return json.dumps(call, ensure_ascii=False, default=str)


def _text(content: Any) -> str | None:
    if isinstance(content, str):
        return content
    if not isinstance(content, Iterable) or isinstance(content, Mapping):
        return None
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    if not parts or not all(isinstance(part, Mapping) for part in parts):
        return None
    return "".join(map(_part, parts))


def _part(part: Mapping[str, Any]) -> str:
    """A part of a turn as text: OpenAI's, and Anthropic's calls, results and thoughts. Raises LeftOut for one that is no text."""
    kind = part.get("type") or ("text" if isinstance(part.get("text"), str) else None)
    if kind in TEXT_PARTS:
        return str(part.get("text") or "")
    if kind == "refusal":
        return str(part.get("refusal") or "")
    if kind in THOUGHTS:
        return f"<think>\n{str(part.get(kind) or part.get('text') or '').strip()}\n</think>\n\n"
    if kind == "tool_use":
        return "\n" + _json({"name": part.get("name"), "arguments": part.get("input")})
    if kind == "tool_result":
        return _text(part.get("content") or "") or ""
    raise LeftOut("has images or other parts that are no text")


def split_answer(turns: Turns, field: str = "messages") -> tuple[Turns, str | None]:
    """The turns up to the last answer, and that answer; None where the last turn is not the assistant's.

    Raises:
        BadRow: what remains does not end with a user turn (or a tool's result) with text. LeftOut: two answers in a row.
    """
    response = None
    if turns and turns[-1]["role"] == "assistant":
        turns, response = turns[:-1], turns[-1]["content"]
        if turns and turns[-1]["role"] == "assistant":
            raise LeftOut("has two answers in a row")
    check_end(turns, field)
    return turns, response


def check_end(turns: Turns, field: str) -> None:
    """Raise BadRow, or LeftOut in a published form, unless the turns end with a user's, or a tool's, that is not empty, and a user
    speaks in them."""
    asked = any(turn["role"] == "user" for turn in turns)
    if not asked or turns[-1]["role"] not in ("user", "tool") or not turns[-1]["content"].strip():
        if field in PUBLISHED:
            raise LeftOut("asks nothing: no user's turn, or an empty one, stands before the answer")
        raise BadRow(f"{field!r} has to end with a user turn that is not empty; write one there, or leave the row out")


def read_dialogue(text: str) -> Turns | None:
    """The turns of a text that begins with a speaker's name (see `_SPEAKER`), or None for any other text."""
    if not text.lstrip().startswith(("Human:", "### Human:", "Assistant:", "System:", "### System:", "User:", "USER:", "HUMAN:")):
        return None
    text = text.strip().replace("\r\n", "\n")
    pieces = _SPEAKER.split(text)
    if text.startswith(("USER:", "HUMAN:")):
        pieces = _CAPITALS.split(_ENDS.sub("", text))
        if "ASSISTANT" not in pieces[1::2]:
            return None
    if "Assistant" not in pieces[1::2] and "\nAssistant:" in text:
        pieces = _LINES.split(text)
    if pieces[1] == "User" and "Assistant" not in pieces[1::2]:
        return None  # a text that happens to begin with that word
    turns = tuple(
        {"role": SPEAKERS[speaker.casefold()], "content": said.strip()} for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True)
    )
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns = turns[:-1]  # a prompt that ends with "Assistant:", where the answer is to follow
    return turns or None
