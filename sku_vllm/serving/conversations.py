"""What a request asks, as the judge gets it: whole conversations, of the completions, chat, responses and messages APIs.

Open this file if the judge does not see a turn.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sku_vllm.data.conversation import SPEAKERS
from sku_vllm.judges.exchange import Turns
from sku_vllm.serving.json_answer import written


def conversations_of(payload: Mapping[str, Any]) -> list[Turns]:
    """One conversation for each prompt of a request, tool calls and their results as text; "" stands for a prompt of token ids.

    Never raises: vLLM validates the request.
    """
    try:
        return list(_conversations(payload))
    except RecursionError:  # nested more deeply than any of the APIs allows
        return [_asked("")]


def _conversations(payload: Mapping[str, Any]) -> Iterator[Turns]:
    prompt = payload.get("prompt")
    if isinstance(prompt, list):
        yield from map(_asked, [None] if prompt and isinstance(prompt[0], int) else prompt)
    elif isinstance(prompt, str):
        yield _asked(prompt)
    else:
        told = payload.get("messages", payload.get("input"))
        system = written(payload.get("system", payload.get("instructions")))
        batch = told if isinstance(told, list) and told and isinstance(told[0], list) else [told]
        for each in batch:
            yield _conversation(each, system)


def _asked(prompt: Any) -> Turns:
    return ({"role": "user", "content": prompt if isinstance(prompt, str) else ""},)


def _conversation(told: Any, system: str) -> Turns:
    first = [{"role": "system", "content": system}] if system else []
    if not isinstance(told, list):
        return *first, *_asked(told)
    return tuple(_joined([*first, *(turn for each in told if isinstance(each, Mapping) for turn in _turns(each))])) or _asked("")


def _turns(item: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The turns of one message, or of one item of the responses API, which has no role where it is a tool call or its result."""
    content, role = item.get("content"), item.get("role")
    if role is None:
        result = "output" in item
        text = written(item["output"] if result else item)
        if text:
            yield {"role": "tool" if result else "assistant", "content": text}
        return
    parts = content if isinstance(content, list) else []
    results = [part for part in parts if isinstance(part, Mapping) and part.get("type") == "tool_result"]
    if results:  # the messages API puts them into a user's turn
        yield {"role": "tool", "content": written(results)}
        if len(results) == len(parts):
            return
        item = {**item, "content": [part for part in parts if part not in results]}
    yield {"role": SPEAKERS.get(str(role), "user"), "content": written(item)}


def _joined(turns: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The turns with neighbours of the assistant's as one: text and tool call are two items in the responses API."""
    joined: list[dict[str, str]] = []
    for turn in turns:
        if joined and turn["role"] == joined[-1]["role"] == "assistant":
            joined[-1] = {"role": "assistant", "content": f"{joined[-1]['content']}\n{turn['content']}"}
        else:
            joined.append(turn)
    return joined
