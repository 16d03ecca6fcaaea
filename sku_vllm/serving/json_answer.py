"""What an answer says, read from its JSON as it passes: of the chat, completions, responses and messages APIs.

Open this file if an answer is not judged, is counted wrongly, or shows another model's name.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from sku_vllm.serving.observation import Observation
from sku_vllm.serving.route import Route
from sku_vllm.serving.runtime import Runtime

WRITTEN = ("message", "delta", "text")  # where a choice of the chat or the completions API has its text


class JsonAnswer:
    """One HTTP answer, streamed or whole. Each prompt of a completion is an observation of its own, as on the engine.

    choices: answers asked for per prompt.

    A streamed answer's text comes in pieces of several parts: reasoning, content, each tool call. Pieces of one part are joined as they
    are, and every part is a line of its own, so that no word grows together with the next part's.
    """

    def __init__(self, route: Route, choices: Any = 1) -> None:
        self.route = route
        self.choices = choices if isinstance(choices, int) and choices > 0 else 1
        self.seen: dict[int, Observation] = {}
        self.parts: dict[int, dict[Any, list[str]]] = {}  # by choice: the pieces of each part
        self.ended: set[int] = set()  # choices that the server gave a reason to end for
        self.heard = self.whole = False  # whether any JSON came; whether the server said that this was all
        self.stopped: Any = None  # why a message ended: its stream says so in the event before the last
        self.broken = False  # the server said in the middle of its answer that it failed

    def note(self, value: Mapping[str, Any]) -> None:
        """Add the text, tokens and times of one JSON object: a whole answer, a chunk or an event. Never raises."""
        now, kind = time.perf_counter(), str(value.get("type", ""))
        self.heard, self.broken = True, self.broken or failed(value)
        if isinstance(value.get("choices"), list):
            for choice in value["choices"]:
                if isinstance(choice, dict):
                    self._choice(choice, now)
        elif value.get("object") == "response":
            self._response(value, now)
        elif kind.startswith("response."):
            if isinstance(value.get("response"), dict):
                self._response(value["response"], now)
            elif kind.endswith(".delta"):  # the last event has the text too, but for some servers
                self._piece(0, (kind, value.get("output_index"), value.get("content_index")), written(value.get("delta")), now)
        elif kind == "message":
            self._message(value, now)
        elif kind.startswith(("message_", "content_block_")):
            self._message_event(value, now)
        self._usage(value)

    def complete(self) -> None:
        """Note that the server said all it has to say: choices for whose end it gave no reason have ended too."""
        self.whole = True
        for choice in set() if self.broken else self.parts.keys() - self.ended:
            self._end(choice, time.perf_counter(), False)

    def cut_off(self) -> bool:
        """Whether a stream that is over was not complete: its server is gone in the middle of a choice, or before it said anything."""
        return not self.whole and (bool(self.parts.keys() - self.ended) or not self.heard)

    def finish(self, runtime: Runtime, outcome: str) -> None:
        """Count and time the answer, and offer its finished texts to the judge."""
        for choice, parts in self.parts.items():
            self._of(choice).texts[choice] = ["\n".join(filter(None, map("".join, parts.values())))]
        for number, seen in (self.seen or {0: self._of(0)}).items():
            unanswered = seen.failed or (self.broken and not seen.finished)
            seen.outcome = "error" if outcome == "ok" and unanswered else outcome
            seen.index = number
            seen.finish(runtime)

    def _of(self, choice: int) -> Observation:
        number = choice // self.choices if len(self.route.conversations) > 1 else 0
        return self.seen.setdefault(number, Observation(self.route, number, None))

    def _piece(self, choice: int, part: Any, text: str, now: float) -> None:
        """Add a piece to a part of a choice. It counts as a token until the server says how many there were."""
        seen = self._of(choice)
        seen.last, seen.first = now, seen.first or now
        self._add(choice, part, text)
        seen.tokens += 1

    def _add(self, choice: int, part: Any, text: str) -> None:
        self.parts.setdefault(choice, {}).setdefault(str(part), []).append(text)

    def _end(self, choice: int, now: float, cut: bool) -> None:
        """Note that an answer is complete. cut: it ran into its length limit."""
        seen = self._of(choice)
        seen.last = now
        self.ended.add(choice)
        seen.texts.setdefault(choice, [])
        seen.finished.add(choice)
        if cut:
            seen.cut.add(choice)

    def _choice(self, choice: Mapping[str, Any], now: float) -> None:
        index = choice["index"] if isinstance(choice.get("index"), int) else 0
        said = list(parts_of(choice.get("message") or choice.get("delta") or {"text": choice.get("text")}))
        for part, text in said[:1]:
            self._piece(index, part, text, now)
        for part, text in said[1:]:
            self._add(index, part, text)
        reason = choice.get("finish_reason") or None
        if reason:
            self.ended.add(index)
        if reason == "error":
            self._of(index).failed = True
        elif reason not in (None, "abort") and not choice.keys().isdisjoint(WRITTEN):  # a list of token ids is no text to judge
            self._end(index, now, reason == "length")

    def _response(self, value: Mapping[str, Any], now: float) -> None:
        """A whole object of the responses API: the answer itself, or that of the last event of a stream."""
        status = value.get("status")
        if status in ("completed", "incomplete"):
            tokens, text = self._of(0).tokens, written({"content": value.get("output")})
            if text or not self.parts:
                self.parts.pop(0, None)
                self._piece(0, "output", text, now)
            self._of(0).tokens = max(1, tokens)
            details = value.get("incomplete_details")
            filtered = isinstance(details, dict) and details.get("reason") == "content_filter"
            self._end(0, now, status == "incomplete" and not filtered)
        elif status in ("failed", "cancelled"):
            self.ended.add(0)
            self._of(0).failed = self._of(0).failed or status == "failed"
        self._usage(value)

    def _message(self, value: Mapping[str, Any], now: float) -> None:
        self._piece(0, "message", written(value), now)
        self._end(0, now, value.get("stop_reason") == "max_tokens")

    def _message_event(self, value: Mapping[str, Any], now: float) -> None:
        kind = value["type"]
        if kind in ("content_block_delta", "content_block_start"):
            text = written(value.get("delta") or value.get("content_block"))
            if text:
                self._piece(0, value.get("index"), text, now)
        elif kind == "message_delta" and isinstance(value.get("delta"), dict):
            self.stopped = value["delta"].get("stop_reason")
        elif kind == "message_stop":
            self._end(0, now, self.stopped == "max_tokens")
        if isinstance(value.get("message"), dict):
            self._usage(value["message"])

    def _usage(self, value: Mapping[str, Any]) -> None:
        usage = value.get("usage")
        if not isinstance(usage, dict):
            return
        first = self._of(0)
        for asked in ("prompt_tokens", "input_tokens"):
            first.prompt_tokens = number_in(usage, asked) or first.prompt_tokens
        tokens = number_in(usage, "completion_tokens") or number_in(usage, "output_tokens")
        if tokens:
            first.tokens = max(0, tokens - sum(seen.tokens for number, seen in self.seen.items() if number))


def number_in(usage: Mapping[str, Any], key: str) -> int:
    """A count in a `usage` object; 0 where there is none."""
    value = usage.get(key)
    return value if isinstance(value, int) else 0


def written(value: Any) -> str:
    """Everything the model wrote in a message, a delta or a list of parts: reasoning, text, refusal, tool calls with their arguments."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(filter(None, map(written, value)))
    if not isinstance(value, dict):
        return ""
    parts = [written(value.get("reasoning") or value.get("reasoning_content"))]
    for key in ("thinking", "summary", "content", "text", "refusal", "partial_json", "tool_calls", "function_call", "function"):
        parts.append(written(value.get(key)))
    if "arguments" in value or "input" in value:  # a tool call
        given = value.get("arguments", value.get("input"))
        parts += [str(value.get("name") or ""), given if isinstance(given, str) else json.dumps(given, ensure_ascii=False) if given else ""]
    return "\n".join(filter(None, parts))


def parts_of(said: Any) -> Iterator[tuple[Any, str]]:
    """What a message or a delta of the chat API says, by part: each tool call is one, and each field that has text."""
    if not isinstance(said, Mapping):
        return
    if said.get("reasoning"):  # some servers send it under both names
        said = {**said, "reasoning_content": None}
    for key, value in said.items():
        if key == "tool_calls" and isinstance(value, list):
            for number, call in enumerate(value):
                if written(call):
                    yield (key, call.get("index", number) if isinstance(call, Mapping) else number), written(call)
        elif written({key: value}):
            yield key, written({key: value})


def failed(value: Mapping[str, Any]) -> bool:
    """Whether a JSON object of a stream says that the answer ends here with an error, as these APIs do once their status is out."""
    inner = value.get("response")
    return bool(value.get("error")) or value.get("type") == "error" or (isinstance(inner, dict) and bool(inner.get("error")))


def hidden(value: Any, model: str, alias: str) -> Any:
    """A JSON value with the alias in place of the model's name in every text, as errors have it in a sentence."""
    if isinstance(value, str):
        return re.sub(rf"(?<![\w-]){re.escape(model)}(?![\w-])", lambda _: alias, value)
    if isinstance(value, list):
        return [hidden(each, model, alias) for each in value]
    return {key: hidden(each, model, alias) for key, each in value.items()} if isinstance(value, dict) else value


def renamed(value: Any, alias: str) -> Any:
    """The JSON value with the alias as its model, wherever these APIs name one. Changed in place."""
    for whole in value if isinstance(value, list) else [value]:
        for each in (whole, whole.get("response"), whole.get("message")) if isinstance(whole, dict) else ():
            if isinstance(each, dict) and "model" in each:
                each["model"] = alias
    return value
