"""One real server through its faults: a worker that breaks off, a judge that stalls and dies, a rollback, SIGKILL; and a restart with two
API servers that remembers.
"""

import concurrent.futures
import sys
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from sku_vllm.errors import RunError
from sku_vllm.serving.start import free_port

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from serving_prometheus import check_prometheus  # noqa: E402
from serving_tools import FLAGS, PROMPTS, TOKEN, JudgeServer, all_gone, complete, eventually, family, serve, sku_serve, text  # noqa: E402

pytestmark = pytest.mark.slow
FAILING_WORKER = '''
import pathlib
from sku_vllm.serving.worker_extension import SkuWorkerExtension, weights

class Failing(SkuWorkerExtension):
    """Breaks off in the middle of a reload when the marker file says so, as a full disk or a lost mount would."""

    def sku_weights(self, model, source):
        marker = pathlib.Path("{marker}")
        for number, pair in enumerate(weights(model, source)):
            if number == 7 and marker.exists() and (source is not None or marker.read_text() == "the way back too"):
                raise OSError("input/output error")
            yield pair
'''


def test_a_server_with_everything_going_wrong_then_killed_then_restarted(tiny, tmp_path, run_sku, scratch):
    """One server through its faults (each asserted where it happens), SIGKILL, and a restart that remembers."""
    judge, marker, state = JudgeServer(), tmp_path / "break", tmp_path / "state"
    (tmp_path / "failing_worker.py").write_text(FAILING_WORKER.format(marker=marker))
    port, log = free_port("127.0.0.1"), tmp_path / "server.log"
    command = sku_serve(
        tiny,
        "--port",
        port,
        "--split",
        "original=1,negated=0",
        "--judge",
        f"openai:{judge.url}#m",
        "--judge-queue",
        16,
        "--shadow",
        "negated=1.0",
        "--rollback-if",
        "harmful>0.5 after 40",
        "--expose-arms",
        "--state",
        state,
        "--worker-extension-cls",
        "failing_worker.Failing",
        *FLAGS,
    )
    env = {"PYTHONPATH": str(tmp_path), "TMPDIR": str(scratch)}
    with serve(*command, port=port, log=log, env=env) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        assert [model.id for model in client.models.list().data] == ["sku", "original", "negated"]
        base = {prompt: text(complete(server, "original", prompt)) for prompt in PROMPTS}
        negated = {prompt: text(complete(server, "negated", prompt)) for prompt in PROMPTS}

        # shadow: the original answers, the negated arm is judged on the same requests
        before = server.metric("sku_requests_total", arm="negated")
        for prompt in PROMPTS[:8]:
            assert text(complete(server, "sku", prompt)) == base[prompt]
        assert eventually(lambda: server.metric("sku_requests_total", arm="negated") - before >= 8)
        assert eventually(lambda: server.metric("sku_judged_total", arm="negated") >= 8)

        check_prometheus(server, tmp_path)
        worker_error(server, marker, tiny, base, negated)
        the_way_back_fails_too(server, marker, tiny, base, negated)
        rollback(server)
        judge_faults(server, judge, base)
        server.control("PUT", "weights", {"weights": {"original": 0.25, "negated": 0.75}})
        server.control("POST", "arms", {"name": "half", "spec": f"lora:{tiny}/adapter@0.5"})
        server.control("POST", "arms", {"name": "far", "spec": "upstream:http://127.0.0.1:9/v1#m"})
        half = {prompt: text(complete(server, "half", prompt)) for prompt in PROMPTS}
        processes = family(server.process)
        assert len(processes) >= 3
        server.process.kill()  # the hardest end: sku serve cannot clean up itself
        assert all_gone(processes), "something outlived sku serve"

    (left,) = scratch.glob("sku-serve-*")
    assert list(left.glob("adapters/*")) == [] and (left / "serve.yaml").stat().st_mode & 0o777 == 0o600
    done = run_sku(*sku_serve(tiny, "--port", port, "--split", "original=0.9,negated=0.1", "--state", state)[3:])
    assert done.returncode == 2 and "--reset-state" in done.stderr
    several_api_servers(tiny, state, port, log, base, negated, half, scratch)
    assert list(scratch.glob("sku-serve-*")) == [], "the killed server's directory was not reclaimed, or the next one left its own"


def worker_error(server, marker, tiny, base, negated):
    """A worker that fails in the middle of a swap leaves the base in place, exactly, for both arms."""
    marker.touch()
    with pytest.raises(RunError, match="base serves again.*input/output error|input/output error"):
        server.control("POST", "swap", {"adapter": str(tiny / "adapter"), "scale": 1.0})
    assert {prompt: text(complete(server, "original", prompt)) for prompt in PROMPTS} == base
    assert {prompt: text(complete(server, "negated", prompt)) for prompt in PROMPTS} == negated
    marker.unlink()
    assert server.control("POST", "swap", {"adapter": str(tiny / "adapter"), "scale": 1.0})["probe"]["from_expected"] < 1e-4
    assert text(complete(server, "sku", PROMPTS[0])) == negated[PROMPTS[0]]
    server.control("POST", "restore")


def the_way_back_fails_too(server, marker, tiny, base, negated):
    """Where the base cannot be loaded either, nothing answers, readiness says so, and a later restore heals it exactly."""
    marker.write_text("the way back too")
    with pytest.raises(RunError, match="and so did the way back"):
        server.control("POST", "swap", {"adapter": str(tiny / "adapter"), "scale": 1.0})
    assert httpx.get(f"{server.url}/sku/ready", timeout=300).status_code == 503
    assert {complete(server, arm).status_code for arm in ("sku", "original", "negated")} == {503}
    with pytest.raises(RunError, match="500"):
        server.control("POST", "restore")
    marker.unlink()
    assert server.control("POST", "restore")["probe"]["from_base"] == 0.0
    assert httpx.get(f"{server.url}/sku/ready", timeout=300).status_code == 200
    assert {prompt: text(complete(server, "original", prompt)) for prompt in PROMPTS} == base
    assert {prompt: text(complete(server, "negated", prompt)) for prompt in PROMPTS} == negated


def rollback(server):
    """Everything the judge sees is "unsafe": once the negated arm has weight, 40 verdicts take it away, and status says why."""
    server.control("PUT", "weights", {"weights": {"original": 0.5, "negated": 0.5}})
    for number in range(60):
        complete(server, "negated", PROMPTS[number % len(PROMPTS)])
        if server.control("GET", "arms")["arms"]["negated"]["weight"] == 0:
            break
    assert eventually(lambda: complete(server, "negated") and server.control("GET", "arms")["traffic"] == {"original": 1, "negated": 0})
    assert "harmful" in server.control("GET", "status")["notes"][-1]


def judge_faults(server, judge, base):
    """Stalled, then dead: every request is answered as before, drops and errors are counted."""
    judge.stalled.set()
    dropped = server.metric("sku_judge_dropped_total")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda number: complete(server, "original", PROMPTS[number % 16]), range(160)))
    assert [text(reply) for reply in replies] == [base[PROMPTS[number % 16]] for number in range(160)]
    assert eventually(lambda: server.metric("sku_judge_dropped_total") > dropped)
    errors = server.metric("sku_judge_errors_total")
    judge.kill()
    assert text(complete(server, "original", PROMPTS[0])) == base[PROMPTS[0]]
    assert eventually(lambda: server.metric("sku_judge_errors_total") > errors)


def counted(server):
    """Whether the page of whichever API server answers holds what both have counted: verdicts, and the negated arm's times."""
    arms = server.control("GET", "experiment")["arms"]
    return sum(row["judged"] for row in arms.values()) == 96, arms["negated"]["latency_s"]["n"] > 48


def several_api_servers(tiny, state, port, log, base, negated, half, scratch):
    """Restarted with two API servers: the state's weights and the arms that were added are back, both processes route alike, metrics add
    up, SIGTERM ends all.
    """
    command = sku_serve(
        tiny,
        "--port",
        port,
        "--split",
        "original=1,negated=0",
        "--judge",
        f"lexicon:{tiny}/lexicon.json",
        "--state",
        state,
        "--blind",
        "--api-server-count",
        2,
        *FLAGS,
    )
    with serve(*command, port=port, log=log, env={"TMPDIR": str(scratch)}) as server:
        assert server.control("GET", "arms")["traffic"] == {"original": 0.25, "negated": 0.75, "half": 0.0, "far": 0.0}
        from sku_vllm.serving.routing import choose_arm

        def ask(number):
            prompt, key = PROMPTS[number % 16], f"user-{number}"
            reply = httpx.post(
                f"{server.url}/completions",
                headers={"X-SKU-Key": key},
                timeout=300,
                json={"model": "sku", "prompt": prompt, "max_tokens": 6, "temperature": 0},
            )
            assert "x-sku-arm" not in reply.headers
            return text(reply) == {"original": base, "negated": negated}[choose_arm({"original": 0.25, "negated": 0.75}, key)][prompt]

        before = server.metric("sku_requests_total")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, range(96)))
        assert server.metric("sku_requests_total") - before == 96
        assert eventually(lambda: server.metric("sku_judged_total") >= 96)
        judges = [each for each in family(server.process) if "sku_vllm.serving.judge_process" in each.cmdline()]
        assert len(judges) == 2  # one per API server, whose verdicts are one experiment
        for _ in range(8):  # whichever of the two answers
            assert eventually(lambda: all(counted(server)))
        assert server.metric("sku_request_latency_seconds_count") == 96 and server.metric("sku_arm_weight", arm="negated") == 0.75
        chosen = {"X-SKU-Token": TOKEN, "X-SKU-Arm": "half"}
        for prompt in PROMPTS:
            body = {"model": "sku", "prompt": prompt, "max_tokens": 6, "temperature": 0}
            assert text(httpx.post(f"{server.url}/completions", headers=chosen, json=body, timeout=300)) == half[prompt]
        server.control("PUT", "weights", {"weights": {"negated": 1.0}})
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda number: text(complete(server, "sku", PROMPTS[number % 16])), range(48)))
        assert answers == [negated[PROMPTS[number % 16]] for number in range(48)]
        for each in judges:
            each.kill()
        assert eventually(lambda: all(each.status() == psutil.STATUS_ZOMBIE for each in judges))  # until their server asks them again
        judged = server.metric("sku_judged_total")
        assert all(text(complete(server, "sku", PROMPTS[number])) == negated[PROMPTS[number]] for number in range(16))
        assert eventually(lambda: server.metric("sku_judged_total") >= judged + 16), "no new judge after the old one was killed"
        for method, path, body in (
            ("POST", "swap", {"adapter": str(tiny / "adapter")}),
            ("POST", "arms", {"name": "x", "spec": f"lora:{tiny}/adapter@2"}),
        ):
            with pytest.raises(RunError, match="API server"):
                server.control(method, path, body)
        processes = family(server.process)
        server.process.terminate()
        assert all_gone(processes)
