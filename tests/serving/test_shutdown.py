"""What SIGTERM does to requests that are running, and to those that come after it."""

import asyncio
import concurrent.futures
import functools
import json
import signal
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from sku_vllm.serving.arms import parse_arm
from sku_vllm.serving.engine import wrap_generate
from sku_vllm.serving.initial_state import prepare_state
from sku_vllm.serving.middleware import SkuMiddleware
from sku_vllm.serving.open_routes import put_outermost
from sku_vllm.serving.route import ROUTE, Route
from sku_vllm.serving.runtime import Runtime
from sku_vllm.serving.serve_config import ServeConfig
from sku_vllm.serving.shutdown import TEARDOWN, answer_before_shutdown
from sku_vllm.serving.start import free_port
from sku_vllm.serving.state import Served
from sku_vllm.serving.vllm_compat import GracefulHTTPError

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from serving_tools import FLAGS, all_gone, eventually, family, frozen, serve, sku_serve  # noqa: E402

TOKENS = 40


class Engine:
    """An engine client as far as vLLM ends it; it notes how long it was given, and what the requests that it has left were told."""

    def __init__(self):
        self.given, self.told, self.output_processor = [], [], self

    def shutdown(self, timeout=None):
        self.given.append((timeout, threading.current_thread() is threading.main_thread()))

    def propagate_error(self, error):
        self.told.append(type(error).__name__)


class App:
    """The plugin's middleware in front of a route that answers once `go` is set."""

    def __init__(self, tmp_path):
        config = ServeConfig("m", ["original=base"], state=str(tmp_path / "state"))
        self.runtime, self.engine, app = Runtime(config), Engine(), FastAPI()
        prepare_state(config, self.runtime.state)
        self.runtime.ready = True
        self.begun, self.go = asyncio.Event(), asyncio.Event()
        app.add_middleware(SkuMiddleware, runtime=self.runtime)
        put_outermost(app, self.runtime)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        answer_before_shutdown(self.engine, self.runtime)

        @app.post("/v1/completions")
        async def answer():
            self.begun.set()
            await self.go.wait()
            return {"choices": [{"text": "fine"}]}

    async def ask(self):
        reply = await self.client.post("/v1/completions", json={"model": "sku", "prompt": "x"})
        return reply.status_code, reply.json()

    async def begin(self):
        """A request that is running."""
        running = asyncio.create_task(self.ask())
        await self.begun.wait()
        return running

    async def ready(self):
        return (await self.client.get("/v1/sku/ready")).status_code

    async def sigterm(self, timeout):
        """As vLLM ends its engine: in another thread, while the event loop goes on."""
        await asyncio.get_running_loop().run_in_executor(None, functools.partial(self.engine.shutdown, timeout=timeout))


def run(scenario, tmp_path):
    """A scenario in an event loop of its own, which must end."""

    async def whole():
        await asyncio.wait_for(scenario(App(tmp_path)), 600)

    asyncio.run(whole())


def test_the_engine_ends_after_the_last_answer(tmp_path):
    """A running request is answered, later ones are refused, readiness fails at once, and what is left of the time is the engine's."""

    async def scenario(app):
        assert await app.ready() == 200
        running = await app.begin()
        ending = asyncio.create_task(app.sigterm(600))
        while await app.ready() == 200:
            await asyncio.sleep(0.01)
        status, body = await app.ask()
        assert status == 503 and "shutting down" in body["error"]["message"]
        assert app.engine.given == [] and not running.done()
        app.go.set()
        assert (await running)[0] == 200
        await ending
        ((given, in_loop),) = app.engine.given
        assert TEARDOWN < given < 600 and not in_loop

    run(scenario, tmp_path)


def test_a_request_that_does_not_end_holds_nothing_up_for_longer(tmp_path):
    async def scenario(app):
        running = await app.begin()
        await app.sigterm(0.3)
        assert app.engine.given == [(TEARDOWN, False)] and not running.done()
        while not app.engine.told:
            await asyncio.sleep(0.01)
        assert app.engine.told == ["EngineDeadError"]
        running.cancel()

    run(scenario, tmp_path)


@pytest.mark.parametrize("begun", [False, True])
def test_an_upstream_arm_that_does_not_end_holds_nothing_up_either(tmp_path, begun):
    """vLLM's HTTP server waits for its requests without an end: at the end of the drain they answer 503, or their stream breaks off."""

    async def scenario(app):
        async def hangs(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            if begun:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n: ping\n\n")
                await writer.drain()
            app.begun.set()
            await asyncio.Event().wait()

        server = await asyncio.start_server(hangs, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        table = app.runtime.table
        far = Served(parse_arm("far", f"upstream:{url}#m"), version="v")
        app.runtime.change(table.changed(arms={"far": far}, split={"far": 1.0}))
        app.runtime.mark = "this-server"
        running = await app.begin()
        await app.sigterm(0.3)
        if begun:
            with pytest.raises(ConnectionError):
                await running
        else:
            status, body = await running
            assert status == 503 and "shutting down" in body["error"]["message"]
        assert app.runtime.requests == 0 and not app.runtime.relays
        await app.runtime.session().close()

    run(scenario, tmp_path)


@pytest.mark.parametrize(("closing", "said"), [(True, "shutting down"), (False, "arm 'a' failed")])
def test_what_the_engine_leaves_says_why(tmp_path, closing, said):
    """An engine that ends at the end of a drain is no failure of the arm."""

    async def scenario(app):
        async def dead(*_, **__):
            raise RuntimeError("dead")
            yield

        app.engine.generate, app.runtime.closing = dead, closing
        wrap_generate(app.engine, app.runtime)
        ROUTE.set(Route("a", "v", None, [()], time.perf_counter()))
        with pytest.raises(GracefulHTTPError, match=said):
            _ = [output async for output in app.engine.generate("x", None, "1")]

    run(scenario, tmp_path)


def test_without_a_timeout_or_in_the_event_loop_the_engine_ends_at_once(tmp_path):
    """No --shutdown-timeout is vLLM's default; in the event loop, as after an engine that died, waiting would never end."""

    async def scenario(app):
        running = await app.begin()
        await app.sigterm(0)
        app.engine.shutdown(timeout=600)
        assert app.engine.given == [(0, False), (600, True)] and not running.done()
        running.cancel()

    run(scenario, tmp_path)


def ask(server, number, **options):
    """(texts, finish reasons) of a completion, whole or streamed, from the arm of one user."""
    body = {
        "model": "sku",
        "user": "ann",
        "prompt": f"w{number} w{number + 17}",
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        **options,
    }
    reply = httpx.post(f"{server.url}/completions", json=body, timeout=600)
    assert reply.status_code == 200, reply.text
    if not options.get("stream"):
        assert reply.json()["usage"]["completion_tokens"] == TOKENS * options.get("n", 1)
        return [(choice["text"], choice["finish_reason"]) for choice in reply.json()["choices"]]
    *lines, done = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert done == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines]
    return [("".join(choice["text"] for choice in choices), choices[-1]["finish_reason"])]


@pytest.mark.slow
def test_requests_running_at_sigterm_are_answered_in_full(tiny, tmp_path):
    """More of them than the engine runs at once, so that some wait for their turn; it stands still until SIGTERM has been understood."""
    port, log = free_port("127.0.0.1"), tmp_path / "server.log"
    command = sku_serve(tiny, "--port", port, "--shutdown-timeout", 1200, *FLAGS)
    kinds = [{"stream": number % 2 == 0} | ({"n": 3, "temperature": 1} if number % 4 == 1 else {}) for number in range(40)]
    with serve(*command, port=port, log=log) as server, concurrent.futures.ThreadPoolExecutor(len(kinds)) as pool:
        expected, everything = ask(server, 0), family(server.process)
        with frozen(server):
            asked = [pool.submit(ask, server, number, **options) for number, options in enumerate(kinds)]
            assert eventually(lambda: server.control("GET", "status")["in_flight"] == len(kinds))
            server.process.send_signal(signal.SIGTERM)
            assert eventually(lambda: httpx.get(f"{server.url}/sku/ready", timeout=60).status_code == 503)
            late = httpx.post(f"{server.url}/completions", json={"model": "sku", "prompt": "w1"}, timeout=600)
            assert late.status_code == 503 and "shutting down" in late.json()["error"]["message"]
        answers = [each.result() for each in asked]
        assert answers[0] == expected
        assert all(text and reason == "length" for answer in answers for text, reason in answer)
        assert all_gone(everything, 600)


@pytest.mark.slow
def test_requests_that_are_not_done_in_time_answer_503_and_the_server_ends(tiny, tmp_path, scratch):
    """The engine stands still until it is killed, so that no request can be done; and nothing of it stays in the temporary directory."""
    port, log = free_port("127.0.0.1"), tmp_path / "server.log"
    command = sku_serve(tiny, "--port", port, "--shutdown-timeout", 1, *FLAGS)
    with serve(*command, port=port, log=log, env={"TMPDIR": str(scratch)}) as server, concurrent.futures.ThreadPoolExecutor(8) as pool:
        everything = family(server.process)
        with frozen(server):
            body = {"model": "sku", "prompt": "w1", "max_tokens": 4}
            asked = [pool.submit(httpx.post, f"{server.url}/completions", json=body, timeout=600) for _ in range(8)]
            assert eventually(lambda: server.control("GET", "status")["in_flight"] == 8)
            server.process.send_signal(signal.SIGTERM)
            answers = [each.result() for each in asked]
            assert [answer.status_code for answer in answers] == [503] * 8
            assert all("shutting down" in answer.text for answer in answers)
        assert all_gone(everything, 600)
    assert vllms(scratch) == []


def vllms(scratch):
    """What vLLM has left in this temporary directory, but for torch's cache, which is for the next start."""
    return [path.name for path in scratch.iterdir() if not path.name.startswith("torchinductor")]


@pytest.mark.slow
def test_two_api_servers_answer_what_is_running_at_sigterm(tiny, tmp_path, scratch):
    """Each waits for its own requests and refuses new ones; the engine, which both share, ends after them."""
    port, log, begun = free_port("127.0.0.1"), tmp_path / "server.log", []
    flags = ["--shutdown-timeout", 1200, "--api-server-count", 2, "--state", tmp_path / "state"]
    command = sku_serve(tiny, "--port", port, *flags, *FLAGS)
    alone = {"Connection": "close"}  # a connection of its own, which either of the two may take

    def streamed(server, number):
        body = {"model": "sku", "prompt": f"w{number}", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/completions", json=body, headers=alone, timeout=1200) as reply:
            begun.append(reply.status_code)
            lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
        assert lines.pop() == "[DONE]"
        return json.loads(lines[-1])["choices"][0]["finish_reason"]

    with serve(*command, port=port, log=log, env={"TMPDIR": str(scratch)}) as server, concurrent.futures.ThreadPoolExecutor(24) as pool:
        everything = family(server.process)
        with frozen(server):
            asked = [pool.submit(streamed, server, number) for number in range(24)]
            assert eventually(lambda: begun == [200] * 24)
            server.process.send_signal(signal.SIGTERM)

            def refused():
                replies = [httpx.get(f"{server.url}/sku/ready", headers=alone, timeout=60) for _ in range(8)]
                return {reply.status_code for reply in replies} == {503}

            assert eventually(refused)
            late = httpx.post(f"{server.url}/completions", json={"model": "sku", "prompt": "w1"}, headers=alone, timeout=600)
            assert late.status_code == 503 and "shutting down" in late.json()["error"]["message"]
        assert [each.result() for each in asked] == ["length"] * 24
        assert all_gone(everything, 600)
    assert vllms(scratch) == []
