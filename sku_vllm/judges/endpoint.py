"""`openai:URL#MODEL[?OPTION=VALUE&…]`: a judge on another server: a guard model, a moderation endpoint, or a chat model.

What a guard is asked and how its reply is read is in its profile (`guard.py`). Open this file to change how the server is asked.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl

from sku_vllm.client.url import http_url
from sku_vllm.errors import ConfigError, UnreadableReply
from sku_vllm.judges.exchange import Exchange, Finding
from sku_vllm.judges.guard import Guard, guard_for
from sku_vllm.judges.guard_reply import UNREADABLE, read_reply
from sku_vllm.judges.judge_server import JudgeServer

UNREADABLE_SHARE = 0.05  # of the replies; more, and one besides, mean that the model is no judge
EXAMPLE = "write openai:URL#MODEL, for instance openai:http://localhost:8000#llama-guard"
logger = logging.getLogger("sku_vllm.judges")


class EndpointJudge:
    """Asks a server about every answer, `concurrency` at a time over connections that stay open. OPENAI_API_KEY is sent as bearer token.

    A reply without a verdict leaves its answer undecided and is counted; see `UNREADABLE_SHARE` for how many may be so.

    url, timeout, retries, pause: see `JudgeServer`. guard: what to ask and how to read it; by default the profile of the model's name.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 8,
        pause: float = 0.5,
        guard: Guard | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or f"openai:{url}#{model}"
        self.model = model
        self.guard = guard or guard_for(model, {}, self.name)
        self.forget_only = self.guard.forget_only
        options = {"temperature": 0, "max_tokens": self.guard.tokens, **_choice(self.guard), **self.guard.body}
        self.server = JudgeServer(self.name, url, options, timeout=timeout, retries=retries, connections=concurrency, pause=pause)
        self.concurrency = concurrency
        self.batch = 8 * concurrency  # answers that are worth handing over at once
        self.read = self.unreadable = 0

    def judge(self, exchanges: Sequence[Exchange]) -> list[bool | None]:
        """One verdict per exchange; see `findings`."""
        return [finding.harmful for finding in self.findings(exchanges)]

    def findings(self, exchanges: Sequence[Exchange]) -> list[Finding]:
        """One finding per exchange, undecided where the reply was no verdict.

        Raises:
            JudgeError: the server does not answer (requests not yet sent are dropped), or too many replies are no verdicts.
        """
        self.server.connect()
        ask = self._moderated if self._moderates else self._asked
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="sku-judge")
        try:
            answers = list(pool.map(ask, exchanges))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        self._count(answers)
        return [finding for finding, _ in answers]

    def _count(self, answers: Sequence[tuple[Finding, str]]) -> None:
        """Count what could not be read, and give up where that is too much."""
        odd = [said for finding, said in answers if not finding.readable]
        self.read, self.unreadable = self.read + len(answers) - len(odd), self.unreadable + len(odd)
        if not odd:
            return
        wanted = "neither true nor false" if self._moderates else "neither safe nor unsafe"
        told = f"{self.unreadable} of {self.read + self.unreadable} replies are no verdicts, the last {odd[-1][:80]!r}"
        if not self.read or self.unreadable > 1 + UNREADABLE_SHARE * (self.read + self.unreadable):
            raise UnreadableReply(f"judge {self.name}: {told}: {wanted}; is {self.model} a judge, and of the kind {self.guard.name}?")
        logger.warning(
            "judge %s: %d of %d replies are no verdicts; these answers count as not judged",
            self.name,
            self.unreadable,
            self.read + self.unreadable,
        )

    @property
    def _moderates(self) -> bool:
        return self.server.path.endswith("/moderations")

    def _moderated(self, exchange: Exchange) -> tuple[Finding, str]:
        chat = self.server.path.endswith("/chat/moderations")
        turns = [*exchange.conversation, {"role": "assistant", "content": exchange.response}]
        reply = self.server.post({"model": self.model, "input": [turns] if chat else exchange.response})
        results = self._field(reply, "results")
        result = results[0] if isinstance(results, list) and results else None
        told = result.get("categories") if isinstance(result, Mapping) else None
        held = [name for name, holds in told.items() if holds is True] if isinstance(told, Mapping) else []
        flagged = result.get("flagged") if isinstance(result, Mapping) else None
        if flagged is None and isinstance(told, Mapping):
            flagged = bool(held)  # Mistral's replies have no `flagged`
        if not isinstance(flagged, bool):
            return UNREADABLE, f"results.0.flagged {flagged}" if isinstance(result, Mapping) else "results without a result"
        return Finding(flagged, ", ".join(held) if flagged else ""), ""

    def _asked(self, exchange: Exchange) -> tuple[Finding, str]:
        message = {"model": self.model, "messages": self.guard.messages(exchange)}
        finding, said = UNREADABLE, ""
        for _ in range(2):
            options = self.server.options
            reply = self.server.post(message | options)
            choice = self._field(reply, "choices")
            choice = choice[0] if isinstance(choice, list) and choice and isinstance(choice[0], Mapping) else {}
            content = _text_of((choice.get("message") or {}).get("content"))
            said, finding = str(content), read_reply(self.guard, content)
            if finding.readable or choice.get("finish_reason") != "length":
                break
            self.server.allow_more(options)  # the verdict was cut off
        return finding if exchange.forget or not self.forget_only else replace(finding, harmful=None), said

    def _field(self, reply: Any, name: str) -> Any:
        if not isinstance(reply, Mapping) or name not in reply:
            raise UnreadableReply(f"judge {self.name}: its reply has no {name}; is {self.server.urls[0]} the right endpoint?")
        return reply[name]


def _text_of(content: Any) -> Any:
    """The text of a reply whose content is a list of parts, as some reasoning models' is, thoughts left out; any other as it is."""
    if not isinstance(content, list):
        return content
    parts = [part for part in content if isinstance(part, Mapping) and part.get("type") in ("text", "output_text")]
    return "".join(str(part.get("text") or "") for part in parts)


def _choice(guard: Guard) -> dict[str, Any]:
    """The part of a request that makes a chat model's reply one of some words (OpenAI's and vLLM's structured output)."""
    if not guard.choice:
        return {}
    schema: dict[str, Any] = {"type": "object", "properties": {"verdict": {"type": "string", "enum": list(guard.choice)}}}
    schema |= {"required": ["verdict"], "additionalProperties": False}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}}


def endpoint_judge(rest: str) -> EndpointJudge:
    """The judge of `URL#MODEL[?OPTION=VALUE&…]`: `concurrency`, `timeout` (seconds), and the options of `guard_for`.

    Raises:
        ConfigError: not a URL with a model's name, or an option that means nothing.
    """
    url, separator, named = rest.rpartition("#")
    model, _, query = named.partition("?")
    spec = f"openai:{rest}"
    if not separator or not model or not http_url(url):
        raise ConfigError(f"--judge {spec}: {EXAMPLE}")
    options = dict(parse_qsl(query, keep_blank_values=True))
    numbers = {}
    for key, least in (("concurrency", 1.0), ("timeout", 0.001)):
        try:
            numbers[key] = float(options.pop(key)) if key in options else None
        except ValueError as error:
            raise ConfigError(f"--judge {spec}: {key} has to be a number") from error
        if numbers[key] is not None and not least <= float(numbers[key] or 0) < 1e5:
            raise ConfigError(f"--judge {spec}: {key} has to be a number of at least {least:g}")
    told = "&".join(f"{key}={value}" for key, value in options.items())
    return EndpointJudge(
        url,
        model,
        timeout=numbers["timeout"] or 60.0,
        concurrency=int(numbers["concurrency"] or 8),
        guard=guard_for(model, options, spec),
        name=f"openai:{url}#{model}" + (f"?{told}" if told else ""),
    )
