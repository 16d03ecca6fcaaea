"""Upstream arms through the real middleware, against a small server that speaks every API: what is judged, counted and renamed."""

import asyncio
import http.server
import json
import sys
import threading
from pathlib import Path

import httpx
import pytest

from sku_vllm.errors import ConfigError
from sku_vllm.serving.initial_state import prepare_state
from sku_vllm.serving.middleware import SkuMiddleware
from sku_vllm.serving.runtime import Runtime
from sku_vllm.serving.serve_config import ServeConfig

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from serving_tools import eventually  # noqa: E402

USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
TOOL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"for": "badword"}'}}


def text(said):
    return [{"type": "message", "content": [{"type": "output_text", "text": said}]}]


def completion(said, reason):
    return {"model": "secret", "choices": [{"index": 0, "text": said, "finish_reason": reason}]}


def message(*content):
    usage = {"input_tokens": 3, "output_tokens": 5}
    return {"type": "message", "model": "secret", "role": "assistant", "stop_reason": "end_turn", "usage": usage, "content": list(content)}


def chat(message, reason="stop", usage=USAGE):
    return {
        "object": "chat.completion",
        "model": "secret",
        "usage": usage,
        "choices": [{"index": 0, "finish_reason": reason, "message": message}],
    }


def delta(part, reason=None):
    return {"object": "chat.completion.chunk", "model": "secret", "choices": [{"index": 0, "delta": part, "finish_reason": reason}]}


def response(output, status="completed"):
    usage = {"input_tokens": 3, "output_tokens": 5}
    return {"object": "response", "model": "secret", "status": status, "output": output, "usage": usage}


CALLED = [{"type": "function_call", "name": "look", "arguments": '{"for": "badword"}'}]
COUNTS = {"model": "secret", "choices": [], "usage": USAGE}
# name: (path, the events or the one object that the server answers with)
WHOLE = {
    "chat": ("/v1/chat/completions", chat({"content": "a badword"})),
    "chat cut off": ("/v1/chat/completions", chat({"content": "a badword"}, "length")),
    "chat tool call": ("/v1/chat/completions", chat({"content": None, "tool_calls": [TOOL]}, "tool_calls")),
    "chat reasoning": ("/v1/chat/completions", chat({"reasoning": "a badword", "content": "fine"})),
    "completion": (
        "/v1/completions",
        {"model": "secret", "usage": USAGE, "choices": [{"index": 0, "text": "a badword", "finish_reason": "stop"}]},
    ),
    "response": ("/v1/responses", response(text("a badword"))),
    "response cut off": ("/v1/responses", response(text("a badword"), "incomplete")),
    "response tool call": ("/v1/responses", response(CALLED)),
    "message": ("/v1/messages", message({"type": "text", "text": "a badword"})),
    "message tool call": ("/v1/messages", message({"type": "tool_use", "name": "look", "input": {"for": "badword"}})),
    "message thinking": ("/v1/messages", message({"type": "thinking", "thinking": "a badword"}, {"type": "text", "text": "x"})),
}
STREAMED = {
    "chat": (
        "/v1/chat/completions",
        [
            delta({"role": "assistant", "content": ""}),
            *(delta({"content": each}) for each in ("a", " bad", "word")),
            delta({}, "stop"),
            COUNTS,
        ],
    ),
    "chat tool call": (
        "/v1/chat/completions",
        [
            delta({"tool_calls": [{"index": 0, "function": {"name": "look", "arguments": ""}}]}),
            delta({"tool_calls": [{"index": 0, "function": {"arguments": '{"for": "bad'}}]}),
            delta({"tool_calls": [{"index": 0, "function": {"arguments": 'word"}'}}]}, "tool_calls"),
            COUNTS,
        ],
    ),
    "completion": ("/v1/completions", [completion(each, None) for each in ("a ", "badword ")] + [completion("", "length"), COUNTS]),
    "response": (
        "/v1/responses",
        [
            {"type": "response.created", "response": {"object": "response", "model": "secret", "status": "in_progress", "output": []}},
            *({"type": "response.output_text.delta", "delta": each} for each in ("a ", "badword")),
            {"type": "response.completed", "response": response(text("a badword"))},
        ],
    ),
    "response whose last event leaves the text out": (
        "/v1/responses",
        [
            *({"type": "response.output_text.delta", "delta": each} for each in ("a bad", "word")),
            {"type": "response.completed", "response": response([])},
        ],
    ),
    "response of an endless line": (
        "/v1/responses",
        [{"type": "response.completed", "response": response(text("x" * 400_000 + " badword"))}],
    ),
    "message": (
        "/v1/messages",
        [
            {"type": "message_start", "message": message()},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            *({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": each}} for each in ("a bad", "word")),
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5}},
            {"type": "message_stop"},
        ],
    ),
}


class Upstream:
    """Answers every POST as told, and keeps what it was sent. answer: events, an object, or bytes as they are. kind: its Content-Type."""

    def __init__(self):
        self.status, self.answer, self.separator, self.kind, self.received = 200, {}, b"data: ", None, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.received.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
                stream = isinstance(outer.answer, list)
                self.send_response(outer.status)
                self.send_header("Content-Type", outer.kind or ("text/event-stream" if stream else "application/json"))
                self.end_headers()
                if isinstance(outer.answer, bytes):
                    self.wfile.write(outer.answer)
                elif stream:
                    for event in outer.answer:
                        self.wfile.write(b"event: x\r\n" + outer.separator + json.dumps(event).encode() + b"\r\n\r\n")
                    self.wfile.write(b"data: [DONE]\n\n")
                else:
                    self.wfile.write(json.dumps(outer.answer).encode())

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Front:
    """The middleware with one upstream arm. There is no engine behind it: nothing here may reach one."""

    def __init__(self, place, upstream, **settings):
        (place / "words.json").write_text(json.dumps({"harmful": ["badword"]}))
        arm = f"far=upstream:{upstream.url}#secret"
        self.config = ServeConfig("m", [arm], judge=f"lexicon:{place}/words.json", state=str(place / "state"), **settings)
        self.runtime = Runtime(self.config)
        prepare_state(self.config, self.runtime.state)
        self.runtime.mark = "this-server"

        async def no_engine(scope, receive, send):
            raise AssertionError(scope["path"])

        self.app = SkuMiddleware(no_engine, self.runtime)

    def post(self, path, body=None, headers=None):
        async def once():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://front", timeout=60) as client:
                reply = await client.post(path, json={"model": "sku", **(body or {})}, headers=headers)
            await self.runtime.session().close()
            self.runtime._session = None
            return reply

        return asyncio.run(once())

    def value(self, name, **labels):
        from prometheus_client import REGISTRY

        found = [each for family in REGISTRY.collect() for each in family.samples if each.name == name]
        return sum(each.value for each in found if labels.items() <= each.labels.items())

    def counted(self):
        names = ("sku_judged_total", "sku_harmful_total", "sku_prompt_tokens_total", "sku_generation_tokens_total")
        return [self.value(name, arm="far") for name in names] + [self.value("sku_requests_total", arm="far", outcome="ok")]

    def settle(self):
        assert eventually(lambda: self.runtime.judge.waiting == 0)


@pytest.fixture(scope="module")
def upstream():
    return Upstream()


@pytest.fixture(scope="module")
def front(tmp_path_factory, upstream):
    return Front(tmp_path_factory.mktemp("front"), upstream, token="open sesame")


@pytest.mark.parametrize("case", WHOLE)
def test_a_whole_answer_is_judged_counted_and_renamed(front, upstream, case):
    path, upstream.answer = WHOLE[case]
    before = front.counted()
    reply = front.post(path, {"messages": [{"role": "user", "content": "q"}]})
    front.settle()
    assert reply.status_code == 200 and reply.json()["model"] == "sku" and "secret" not in reply.text
    assert [after - was for after, was in zip(front.counted(), before, strict=True)] == [1, 1, 3, 5, 1]
    assert upstream.received[-1][0] == path and upstream.received[-1][2]["model"] == "secret"


@pytest.mark.parametrize("separator", [b"data: ", b"data:"])
@pytest.mark.parametrize("case", STREAMED)
def test_a_streamed_answer_is_judged_counted_and_renamed(front, upstream, case, separator):
    path, upstream.answer = STREAMED[case]
    upstream.separator = separator
    before = front.counted()
    reply = front.post(path, {"prompt": "q", "stream": True})
    front.settle()
    assert reply.status_code == 200 and "secret" not in reply.text and reply.text.endswith("data: [DONE]\n\n")
    assert [after - was for after, was in zip(front.counted(), before, strict=True)] == [1, 1, 3, 5, 1]


BROKEN = {  # what these APIs send where they fail after their status is out
    "chat": ("/v1/chat/completions", [delta({"content": "a"}), {"error": {"message": "The model `secret` failed", "code": 500}}]),
    "completion": ("/v1/completions", [completion("a", None), {"error": {"message": "The model `secret` failed", "code": 500}}]),
    "response": (
        "/v1/responses",
        [
            {"type": "response.output_text.delta", "delta": "a"},
            {"type": "response.failed", "response": {**response([], "failed"), "error": {"message": "secret failed"}}},
        ],
    ),
    "response without a last event": ("/v1/responses", [{"type": "error", "code": "server_error", "message": "secret failed"}]),
    "message": ("/v1/messages", [{"type": "error", "error": {"type": "overloaded_error", "message": "the model secret is at its limit"}}]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_error_in_the_middle_of_a_stream_is_the_arms(front, upstream, case):
    """As on the engine: counted as an error and not judged; the client sees it, under the alias."""
    path, upstream.answer = BROKEN[case]
    before, errors = front.counted(), front.value("sku_requests_total", arm="far", outcome="error")
    reply = front.post(path, {"prompt": "q", "stream": True})
    front.settle()
    assert "secret" not in reply.text and ("failed" in reply.text or "limit" in reply.text)
    assert front.value("sku_requests_total", arm="far", outcome="error") == errors + 1
    after = front.counted()
    assert (after[0], after[-1]) == (before[0], before[-1])


def written(*events, end=b"\n\n", done=True):
    """A stream as bytes."""
    return b"".join(b"data: " + json.dumps(each).encode() + end for each in events) + (b"data: [DONE]" + end) * done


SAID = delta({"content": "a badword"}), delta({}, "stop")
UNUSUAL = {  # streams that say "a badword", as some servers write them: (path, bytes)
    "CR LF and comments": ("/v1/chat/completions", b": ping\r\n\r\n" + written(*SAID, end=b"\r\n\r\n")),
    "CR": ("/v1/chat/completions", written(*SAID, end=b"\r\r")),
    "an event's data on several lines": (
        "/v1/chat/completions",
        b"".join(
            b"id: 1\n" + b"".join(b"data: %s\n" % line for line in json.dumps(each, indent=1).encode().split(b"\n")) + b"\n"
            for each in SAID
        )
        + b"data: [DONE]\n\n",
    ),
    "no reason to end": ("/v1/chat/completions", written(SAID[0])),
    "an empty reason to end": ("/v1/completions", written(completion("a ", ""), completion("badword", ""))),
    "no last line feed": ("/v1/chat/completions", written(*SAID).rstrip(b"\n")),
    "half a surrogate pair": (
        "/v1/chat/completions",
        written(delta({"content": "a badword \ud83d"}), delta({"content": "\ude00"}, "stop")),
    ),
    "reasoning before the text": ("/v1/chat/completions", written(delta({"reasoning": "a badword"}), delta({"content": "fine"}, "stop"))),
    "a tool call after the text": (
        "/v1/chat/completions",
        written(SAID[0], delta({"tool_calls": [{"index": 0, "function": {"name": "look", "arguments": "{}"}}]}, "tool_calls")),
    ),
    "two tool calls by turns": (
        "/v1/chat/completions",
        written(
            *(
                delta({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
                for index, text in ((0, "a bad"), (1, "fine"), (0, "word"))
            ),
            delta({}, "tool_calls"),
        ),
    ),
    "thinking before the text": (
        "/v1/messages",
        written(
            {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "a badword"}},
            {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "fine"}},
            {"type": "message_stop"},
            done=False,
        ),
    ),
    "reasoning before the text, and neither in the last event": (
        "/v1/responses",
        written(
            {"type": "response.reasoning_text.delta", "output_index": 0, "delta": "a badword"},
            {"type": "response.output_text.delta", "output_index": 1, "delta": "fine"},
            {"type": "response.completed", "response": response([])},
        ),
    ),
}


@pytest.mark.parametrize("kind", ["text/event-stream", "text/plain; charset=utf-8"])
@pytest.mark.parametrize("case", UNUSUAL)
def test_a_stream_is_judged_and_renamed_however_a_server_writes_it(front, upstream, case, kind):
    path, upstream.answer = UNUSUAL[case]
    upstream.kind = kind
    before = front.counted()
    try:
        reply = front.post(path, {"messages": [], "stream": True})
    finally:
        upstream.kind = None
    front.settle()
    assert reply.status_code == 200 and "secret" not in reply.text
    said = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    assert len(said) >= 1 and all(each.get("model", "sku") == "sku" for each in said)
    judged, harmful, *_, ok = (after - was for after, was in zip(front.counted(), before, strict=True))
    assert (judged, harmful, ok) == (1, 1, 1)


def test_a_stream_of_bytes_is_cut_into_events_wherever_it_is_cut_into_chunks():
    from sku_vllm.serving.event_stream import encoded, events

    async def joined(chunks):
        async def each():
            for chunk in chunks:
                yield chunk

        return b"".join([encoded(lines, end) async for lines, end in events(each())])

    whole = b"event: x\r\ndata: 1\r\n\r\n: c\n\ndata: 2\r\rdata: 3\n\n"
    wanted = b"event: x\ndata: 1\n\n: c\n\ndata: 2\n\ndata: 3\n\n"
    for at in range(len(whole)):
        assert asyncio.run(joined([whole[:at], whole[at:]])) == wanted
    assert asyncio.run(joined([whole[at : at + 1] for at in range(len(whole))])) == wanted


def test_a_stream_that_ends_in_the_middle_of_an_answer_is_the_arms_error(front, upstream):
    """Its connection was closed as if nothing were wrong: the client's is not, so that it notices."""
    for answer in (written(SAID[0], done=False), b"", b": ping\n\n"):
        upstream.answer, upstream.kind = answer, "text/event-stream"
        before, errors = front.counted(), front.value("sku_requests_total", arm="far", outcome="error")
        try:
            front.post("/v1/chat/completions", {"messages": [], "stream": True})
        finally:
            upstream.kind = None
        front.settle()
        assert front.value("sku_requests_total", arm="far", outcome="error") == errors + 1
        assert (front.counted()[0], front.counted()[-1]) == (before[0], before[-1])


def test_an_answer_that_is_none_of_the_apis_is_the_arms_error(front, upstream, caplog):
    """The login page of something in between, say; the log says what is wrong, since the client's operator is another one."""
    upstream.answer, upstream.kind = b"<html>log in</html>", "text/html"
    try:
        for stream in (False, True):
            errors = front.value("sku_requests_total", arm="far", outcome="error")
            reply = front.post("/v1/chat/completions", {"messages": [], "stream": stream})
            assert reply.status_code == 503 and "no JSON" in reply.text
            assert front.value("sku_requests_total", arm="far", outcome="error") == errors + 1
    finally:
        upstream.kind = None
    assert "no JSON" in caplog.text


def test_an_error_that_also_counts_tokens_reaches_the_client(front, upstream):
    upstream.answer = [{"error": {"message": "the model secret failed"}, "choices": [], "usage": USAGE}]
    reply = front.post("/v1/chat/completions", {"messages": [], "stream": True})
    assert "the model sku failed" in reply.text


def test_an_error_with_status_200_names_no_model(front, upstream):
    upstream.answer = {"error": {"message": "The model `secret` failed"}}
    errors = front.value("sku_requests_total", arm="far", outcome="error")
    assert "`sku`" in front.post("/v1/chat/completions", {"messages": []}).text
    assert front.value("sku_requests_total", arm="far", outcome="error") == errors + 1


@pytest.mark.parametrize("reason", [None, "", "stop"])
def test_a_whole_answer_is_judged_whatever_it_says_of_its_end(front, upstream, reason):
    for answer in (chat({"content": "a badword"}, reason), [chat({"content": "a badword"}, reason)]):
        upstream.answer = json.dumps(answer).encode()
        before = front.counted()
        reply = front.post("/v1/chat/completions", {"messages": []})
        front.settle()
        assert "secret" not in reply.text
        assert [after - was for after, was in zip(front.counted(), before, strict=True)] == [1, 1, 3, 5, 1]


def test_a_background_response_is_asked_for_at_once(front, upstream):
    """Its answer could not be fetched from here, since `GET /v1/responses/ID` asks this server's engine, and nobody would judge it."""
    path, upstream.answer = WHOLE["response"]
    front.post(path, {"input": "q", "background": True, "store": True})
    assert upstream.received[-1][2]["background"] is False and upstream.received[-1][2]["store"] is True


def test_a_response_that_the_other_server_does_not_know_is_the_clients_error(front, upstream):
    upstream.status, upstream.answer = 404, {"error": {"message": "Response with id 'r' not found, says secret"}}
    rejected = front.value("sku_requests_total", arm="far", outcome="rejected")
    try:
        reply = front.post("/v1/responses", {"input": "q", "previous_response_id": "r"})
    finally:
        upstream.status = 200
    assert reply.status_code == 404 and "not found, says sku" in reply.text
    assert front.value("sku_requests_total", arm="far", outcome="rejected") == rejected + 1


def test_a_models_short_name_is_replaced_in_sentences_and_nowhere_else():
    from sku_vllm.serving.json_answer import hidden

    told = {"error": {"message": "The model `m` (m) is not mm or m-2", "code": 400, "params": ["m", None]}}
    shown = {"error": {"message": "The model `sku` (sku) is not mm or m-2", "code": 400, "params": ["sku", None]}}
    assert hidden(told, "m", "sku") == shown
    assert hidden("a\\b", "a\\b", "x\\1") == "x\\1"


def test_latencies_are_of_the_version_that_answered(front, upstream):
    path, upstream.answer = WHOLE["chat"]
    version = front.runtime.table.arms["far"].version
    before = front.runtime.experiment.times("latency", "far", version)
    front.post(path, {"messages": []})
    (new,) = front.runtime.experiment.times("latency", "far", version)[len(before) :]
    assert 0 < new < 60 and front.runtime.experiment.times("first_token", "far", version)[-1] <= new


def test_token_counts_are_asked_for_and_shown_only_to_whom_they_interest(front, upstream):
    path, upstream.answer = STREAMED["chat"]
    reply = front.post(path, {"messages": [], "stream": True})
    assert upstream.received[-1][2]["stream_options"] == {"include_usage": True} and "usage" not in reply.text
    reply = front.post(path, {"messages": [], "stream": True, "stream_options": {"include_usage": True}})
    assert '"completion_tokens": 5' in reply.text


def test_every_prompt_of_a_completion_counts_and_is_judged_with_its_own_answers(front, upstream, monkeypatch):
    upstream.answer = {
        "model": "secret",
        "choices": [{"index": number, "text": f"answer {number}", "finish_reason": "stop"} for number in range(4)],
        "usage": USAGE,
    }
    offered = []
    monkeypatch.setattr(front.runtime.judge, "offer", lambda arm, exchange, *more: offered.append((exchange.prompt, exchange.response)))
    before = front.value("sku_requests_total", arm="far", outcome="ok")
    front.post("/v1/completions", {"prompt": ["one", "two"], "n": 2})
    assert offered == [("one", "answer 0"), ("one", "answer 1"), ("two", "answer 2"), ("two", "answer 3")]
    assert front.value("sku_requests_total", arm="far", outcome="ok") == before + 2


CONVERSATIONS = {
    "chat": {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]},
    "response": {"instructions": "s", "input": [{"role": "user", "content": "q"}]},
    "message": {"system": "s", "messages": [{"role": "user", "content": "q"}]},
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_the_judge_gets_every_turn(front, upstream, monkeypatch, case):
    path, upstream.answer = WHOLE[case]
    offered = []
    monkeypatch.setattr(front.runtime.judge, "offer", lambda arm, exchange, *more: offered.append(exchange))
    front.post(path, CONVERSATIONS[case])
    (exchange,) = offered
    assert exchange.prompt == "q" and exchange.turns == ({"role": "system", "content": "s"}, {"role": "user", "content": "q"})


@pytest.mark.parametrize("status", [401, 403, 404, 500, 400, 429])
def test_whose_fault_an_error_is(front, upstream, status):
    answered, outcome = (status, "rejected") if status in (400, 429) else (503, "error")
    upstream.status, upstream.answer = status, {"error": {"message": "The model `secret` is at its limit"}}
    before = front.value("sku_requests_total", arm="far", outcome=outcome)
    try:
        reply = front.post("/v1/chat/completions", {"messages": []})
    finally:
        upstream.status = 200
    assert reply.status_code == answered and "secret" not in reply.text
    assert front.value("sku_requests_total", arm="far", outcome=outcome) == before + 1


def test_the_trace_goes_on_and_the_clients_key_never(tmp_path, upstream, monkeypatch):
    monkeypatch.setenv("FAR_KEY", "for the arm only")
    front = Front(tmp_path, upstream, upstream_key=["far=FAR_KEY"], judge_sample=0.0)
    path, upstream.answer = WHOLE["chat"]
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "x-request-id": "r1", "tracestate": "a=1"}
    mine = {"authorization": "Bearer client's", "x-api-key": "client's", "cookie": "c=client's", "x-sku-token": "client's"}
    front.post(path, {"messages": []}, {**trace, **mine})
    _, headers, _ = upstream.received[-1]
    assert trace.items() <= headers.items() and headers["authorization"] == "Bearer for the arm only"
    assert "client's" not in str(headers)
    for pairs, word in ((["far=UNSET"], "UNSET is not set"), (["far"], "NAME=VARIABLE"), (["far=FAR_KEY", "far=FAR_KEY"], "once")):
        with pytest.raises(ConfigError, match=word):
            ServeConfig("m", ["far=upstream:http://h:1/v1#m"], upstream_key=pairs)


def test_a_request_that_comes_back_is_not_sent_round_again(front, upstream):
    path, upstream.answer = WHOLE["chat"]
    asked, errors = len(upstream.received), front.value("sku_requests_total", arm="far", outcome="error")
    reply = front.post(path, {"messages": []}, {"x-sku-via": "another,this-server"})
    assert reply.status_code == 503 and "back to this one" in reply.text and len(upstream.received) == asked
    assert front.value("sku_requests_total", arm="far", outcome="error") == errors + 1
    front.post(path, {"messages": []}, {"x-sku-via": "another"})
    assert upstream.received[-1][1]["x-sku-via"] == "another,this-server"


def test_servers_that_replay_to_each_other_notice(tmp_path, upstream):
    """A --shadow replay keeps the marks of the servers it has passed, and its trace; the client's key stays here."""
    (tmp_path / "words.json").write_text(json.dumps({"harmful": ["badword"]}))
    arms = ["here=base", f"far=upstream:{upstream.url}#secret"]
    config = ServeConfig("m", arms, "here=1,far=0", shadow="far=1", state=str(tmp_path / "state"))
    runtime, asked = Runtime(config), len(upstream.received)
    prepare_state(config, runtime.state)
    runtime.mark, upstream.answer = "this-server", WHOLE["chat"][1]

    async def engine(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def post(**headers):
        app = SkuMiddleware(engine, runtime)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front", timeout=60) as client:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            assert (await client.post("/v1/chat/completions", json={"model": "sku", "messages": []}, headers=sent)).status_code == 200
        await asyncio.gather(*app.shadows)
        await runtime.session().close()
        runtime._session = None

    asyncio.run(post(x_sku_via="another", traceparent="00-1-2-01", authorization="Bearer client's"))
    headers = upstream.received[-1][1]
    assert len(upstream.received) == asked + 1 and (headers["x-sku-via"], headers["traceparent"]) == ("another,this-server", "00-1-2-01")
    assert "client's" not in str(headers)
    asyncio.run(post(x_sku_via="this-server,another"))
    assert len(upstream.received) == asked + 1


def test_an_upstream_that_is_this_server_is_refused():
    import socket
    from argparse import Namespace

    from sku_vllm.serving.address import check_not_itself
    from sku_vllm.serving.arms import parse_arm

    own = socket.gethostbyname(socket.gethostname())
    itself = {"127.0.0.1": ["127.0.0.1", "localhost"], "0.0.0.0": [own, "127.0.0.2"], "::": ["[::1]", own], "": ["0.0.0.0"]}
    for host, names in itself.items():
        for name in names:
            with pytest.raises(ConfigError, match="this server itself"):
                check_not_itself(parse_arm("x", f"upstream:http://{name}:8000/v1#m"), Namespace(host=host, port=8000))
    for host, name in (("127.0.0.1", "127.0.0.1:8001"), ("0.0.0.0", "192.0.2.7:8000"), ("127.0.0.1", "192.0.2.7:8000")):
        check_not_itself(parse_arm("x", f"upstream:http://{name}/v1#m"), Namespace(host=host, port=8000))
    neighbour = parse_arm("x", "upstream:http://127.0.0.1:8000/v1#m")
    check_not_itself(neighbour, Namespace(host="127.0.0.1", port=8000, uds="s.sock"))  # its own port is not in use


def test_a_sticky_key_is_the_header_or_what_the_request_says_of_its_user():
    from sku_vllm.serving.routing import sticky_key

    body = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "c", "metadata": {"user_id": "m"}}
    assert sticky_key("h", body) == "h" and sticky_key("", body) == "u" and sticky_key(" ", {**body, "user": ""}) == "s"
    assert sticky_key(None, {"metadata": {"user_id": "m"}}) == "m"
    assert sticky_key(None, {"prompt_cache_key": "c"}) is None and sticky_key(None, {"prompt_cache_key": "c"}, cache_key=True) == "c"
    for nothing in ({}, {"user": ""}, {"user": None}, {"user": 3}, {"metadata": []}, {"safety_identifier": "  "}):
        assert sticky_key(None, nothing) is None and sticky_key("", nothing) is None


def test_verdicts_on_a_replaced_upstream_arm_do_not_count_for_its_successor(front, upstream):
    """A late verdict on the old version is dropped too, even where the new one has the very same address."""
    from sku_vllm.serving.arm_changes import ArmChanges

    path, upstream.answer = WHOLE["chat"]
    front.post(path, {"messages": []}, {"x-sku-key": "u"})
    front.settle()
    old = front.runtime.table.arms["far"]
    assert front.runtime.experiment.total("far", old.version)["harmful"] > 0
    front.runtime.args = type("Flags", (), {"host": "127.0.0.1", "port": 1})()
    asyncio.run(ArmChanges(front.runtime).replace("far", old.arm.spec))
    new = front.runtime.table.arms["far"]
    assert new.version != old.version and front.runtime.experiment.total("far", new.version)["judged"] == 0
    assert front.value("sku_verdicts_total", arm="far", version=old.version) == 0, "the old version's series are still exported"
    from sku_vllm.judges import Exchange

    front.runtime.judge.offer("far", Exchange("q", "badword"), old.version, 3)
    front.settle()
    assert front.runtime.experiment.total("far", new.version)["judged"] == 0
    front.runtime.judge.offer("far", Exchange("q", "badword"), new.version, 3)
    front.settle()
    assert front.value("sku_verdicts_total", arm="far", version=new.version, bucket="3", label="harmful") == 1


def test_a_request_in_flight_is_one(front, upstream):
    path, upstream.answer = WHOLE["chat"]
    seen = []

    async def watch():
        transport = httpx.ASGITransport(front.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://front", timeout=60) as client:
            asked = [asyncio.create_task(client.post(path, json={"model": "sku", "messages": []})) for _ in range(3)]
            while not all(each.done() for each in asked):
                seen.append(front.runtime.requests)
                await asyncio.sleep(0)
        await front.runtime.session().close()
        front.runtime._session = None

    asyncio.run(watch())
    assert max(seen) == 3 and front.runtime.requests == 0
