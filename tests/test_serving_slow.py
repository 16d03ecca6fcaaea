"""Real servers in other shapes than the fast tests' one: faults in a worker and a judge, several API servers, tensor parallelism,
vLLM started by hand, restarts and signals, and a real Prometheus that evaluates dashboard and rules.
"""

import concurrent.futures
import contextlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from sku_vllm.errors import RunError
from sku_vllm.serving.server import Server, free_port

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
TOKEN = "open sesame"
FLAGS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32"]
PROMPTS = [f"w{number} w{number + 17} w{3 * number + 1}" for number in range(16)]
FAILING_WORKER = '''
import pathlib
from sku_vllm.serving.swap import SkuWorkerExtension, weights

class Failing(SkuWorkerExtension):
    """Breaks off in the middle of a reload when the marker file says so, as a full disk or a lost mount would."""

    def sku_weights(self, model, source):
        marker = pathlib.Path("{marker}")
        for number, pair in enumerate(weights(model, source)):
            if number == 7 and source is not None and marker.exists():
                raise OSError("input/output error")
            yield pair
'''


@contextlib.contextmanager
def serve(*arguments, port, log, env=None, ready=300):
    """`sku serve` (or any command) in a process of its own, as an operator starts it."""
    with open(log, "ab") as out:
        process = subprocess.Popen(arguments, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
    server = Server(process, "127.0.0.1", port, log, log.parent, TOKEN)
    try:
        server.wait_ready(ready)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def sku_serve(tiny, *arguments):
    return [sys.executable, "-m", "sku_vllm.cli", "serve", "--model", str(tiny / "base"), "--arm", "original=base",
            "--arm", f"negated=lora:{tiny}/adapter@1", "--token", TOKEN, *map(str, arguments)]


def family(process):
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def all_gone(processes, seconds=40):
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []


def complete(server, model="sku", prompt="w1 w2", tokens=6, **options):
    return httpx.post(
        f"{server.url}/completions", json={"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, **options}, timeout=60
    )


def text(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


class JudgeServer:
    """A judge over HTTP that answers "unsafe", stalls, or dies, as told."""

    def __init__(self):
        self.stalled = threading.Event()
        self.release = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                if outer.stalled.is_set():
                    outer.release.wait(60)
                body = json.dumps({"choices": [{"message": {"content": "unsafe"}}]}).encode()
                with contextlib.suppress(OSError):
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def kill(self):
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


def eventually(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False


def test_a_server_with_everything_going_wrong_then_killed_then_restarted(tiny, tmp_path, run_sku):
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
    env = {"PYTHONPATH": str(tmp_path)}
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
        guard(server, base)
        judge_faults(server, judge, base)
        server.control("PUT", "weights", {"weights": {"original": 0.25, "negated": 0.75}})
        processes = family(server.process)
        assert len(processes) >= 3
        server.process.kill()  # the hardest end: sku serve cannot clean up itself
        assert all_gone(processes), "something outlived sku serve"

    done = run_sku(*sku_serve(tiny, "--port", port, "--split", "original=0.9,negated=0.1", "--state", state)[3:])
    assert done.returncode == 2 and "--reset-state" in done.stderr
    several_api_servers(tiny, state, port, log, base, negated)


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


def guard(server, base):
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
    assert eventually(lambda: server.metric("sku_judge_errors_total") > errors, 60)


def several_api_servers(tiny, state, port, log, base, negated):
    """Restarted with two API servers: the state's weights are back, both processes route alike, metrics add up, SIGTERM ends all."""
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
    with serve(*command, port=port, log=log) as server:
        assert server.control("GET", "arms")["traffic"] == {"original": 0.25, "negated": 0.75}
        from sku_vllm.serving.routing import choose_arm

        def ask(number):
            prompt, key = PROMPTS[number % 16], f"user-{number}"
            reply = httpx.post(f"{server.url}/completions", headers={"X-SKU-Key": key}, timeout=60,
                               json={"model": "sku", "prompt": prompt, "max_tokens": 6, "temperature": 0})
            assert "x-sku-arm" not in reply.headers
            return text(reply) == {"original": base, "negated": negated}[choose_arm({"original": 0.25, "negated": 0.75}, key)][prompt]

        before = server.metric("sku_requests_total")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, range(96)))
        assert server.metric("sku_requests_total") - before == 96
        assert eventually(lambda: server.metric("sku_judged_total") >= 96)
        assert server.metric("sku_request_latency_seconds_count") == 96 and server.metric("sku_arm_weight", arm="negated") == 0.75
        server.control("PUT", "weights", {"weights": {"negated": 1.0}})
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda number: text(complete(server, "sku", PROMPTS[number % 16])), range(48)))
        assert answers == [negated[PROMPTS[number % 16]] for number in range(48)]
        for method, path, body in (
            ("POST", "swap", {"adapter": str(tiny / "adapter")}),
            ("POST", "arms", {"name": "x", "spec": f"lora:{tiny}/adapter@2"}),
        ):
            with pytest.raises(RunError, match="API server"):
                server.control(method, path, body)
        processes = family(server.process)
        server.process.terminate()
        assert all_gone(processes)


def test_vllm_started_by_hand_with_two_ranks(tiny, tmp_path):
    """VLLM_PLUGINS=sku and SKU_SERVE_CONFIG, no `sku serve`, tensor parallelism 2: arms, NAME@SCALE, swap and exact restore."""
    (tmp_path / "root").mkdir()
    shutil.copytree(tiny / "adapter", tmp_path / "root/adapter")
    (tmp_path / "root/link").symlink_to(tiny / "adapter")
    port, log = free_port("127.0.0.1"), tmp_path / "server.log"
    (tmp_path / "serve.yaml").write_text(
        f"model: {tiny}/base\narms: {{original: base, negated: 'lora:{tiny}/adapter@1'}}\nsplit: {{original: 0.5, negated: 0.5}}\n"
        f"judge: lexicon:{tiny}/lexicon.json\nexpose_arms: true\ntoken: {TOKEN}\nstate: {tmp_path}/state\nadapter_root: {tmp_path}/root\n"
    )
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(tiny / "base"),
        "--port",
        str(port),
        "--enable-lora",
        "--max-loras",
        "4",
        "--max-lora-rank",
        "8",
        "--tensor-parallel-size",
        "2",
        "--worker-extension-cls",
        "sku_vllm.serving.swap.SkuWorkerExtension",
        *FLAGS,
    ]
    env = {
        "VLLM_PLUGINS": "sku",
        "SKU_SERVE_CONFIG": str(tmp_path / "serve.yaml"),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    with serve(*command, port=port, log=log, env=env, ready=400) as server:
        base = {prompt: text(complete(server, "original", prompt)) for prompt in PROMPTS}
        negated = {prompt: text(complete(server, "negated", prompt)) for prompt in PROMPTS}
        assert sum(base[prompt] != negated[prompt] for prompt in PROMPTS) > 8
        resolver(server, base, negated)
        done = server.control("POST", "swap", {"adapter": str(tiny / "adapter"), "scale": 1.0})
        assert done["probe"]["from_base"] > 1e-4
        assert {prompt: text(complete(server, "sku", prompt)) for prompt in PROMPTS} == negated
        assert complete(server, "original").status_code == complete(server, "adapter@1").status_code == 409
        assert server.control("POST", "restore")["probe"]["from_base"] == 0.0
        assert {prompt: text(complete(server, "original", prompt)) for prompt in PROMPTS} == base
        assert server.metric("sku_requests_total", arm="swapped") == len(PROMPTS)


def resolver(server, base, negated):
    """NAME@SCALE below the root resolves, more of them than there are slots, and the base's rows stay the base's; nothing else does."""
    assert {prompt: text(complete(server, "adapter@1", prompt)) for prompt in PROMPTS[:6]} == {
        prompt: negated[prompt] for prompt in PROMPTS[:6]
    }
    asked = [(model, prompt) for prompt in PROMPTS[:6] for model in ("original", "adapter@0.1", "adapter@1.00", "negated")]
    for scale in ("0.2", "0.3", "0.4"):
        assert text(complete(server, f"adapter@{scale}", PROMPTS[0]))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(
                    lambda each: text(complete(server, *each)), [(arm, prompt) for arm, prompt in asked if arm in ("original", "negated")]
                )
            )
        assert answers == [{"original": base, "negated": negated}[arm][prompt] for arm, prompt in asked if arm in ("original", "negated")]
    for model in (
        "link@1",
        "../adapter@1",
        "/etc@1",
        "nobody@1",
        "adapter@99",
        "adapter@-1",
        "adapter@nan",
        "a" * 200 + "@1",
        "adapter",
        "root/adapter@1",
    ):
        assert complete(server, model).status_code == 404, model
    for path in ("load_lora_adapter", "unload_lora_adapter"):
        reply = httpx.post(f"{server.url}/{path}", json={"lora_name": "x", "lora_path": "/etc"})
        assert reply.status_code == 403


# ---- Prometheus and dashboards ------------------------------------------------------------------------------------


def expressions():
    """Every PromQL expression of dashboard and rules, with Grafana's interval filled in."""
    import yaml

    board = json.loads((ROOT / "deploy/grafana/sku.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())
    found += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    return [expression.replace("$__rate_interval", "15s") for expression in found]


def check_prometheus(server, tmp_path):
    """A real Prometheus scrapes the server and loads the rules; every panel's and alert's expression evaluates, panels to data."""
    binary = shutil.which("prometheus")
    assert binary, "install the Debian package prometheus; this test does not skip"
    subprocess.run(["promtool", "check", "rules", str(ROOT / "deploy/prometheus/rules.yml")], check=True, capture_output=True)
    port = free_port("127.0.0.1")
    (tmp_path / "prometheus.yml").write_text(
        f"global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{ROOT}/deploy/prometheus/rules.yml']\n"
        f"scrape_configs: [{{job_name: sku, static_configs: [{{targets: ['127.0.0.1:{server.port}']}}]}}]\n"
    )
    process = subprocess.Popen(
        [
            binary,
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/tsdb",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    api = f"http://127.0.0.1:{port}/api/v1"
    try:
        assert eventually(lambda: _scraped(api))
        for number in range(12):
            complete(server, ("original", "negated")[number % 2], PROMPTS[number])
            time.sleep(0.5)
        time.sleep(2)
        results = {expression: httpx.get(f"{api}/query", params={"query": expression}).json() for expression in expressions()}
        assert {expression for expression, reply in results.items() if reply["status"] != "success"} == set()
        dashboard = json.loads((ROOT / "deploy/grafana/sku.json").read_text())
        panels = [target["expr"].replace("$__rate_interval", "15s") for panel in dashboard["panels"] for target in panel["targets"]]
        # only swaps have not happened yet
        empty = [expression for expression in panels if not results[expression]["data"]["result"] and "sku_swap" not in expression]
        assert empty == []
        rules = [rule for group in httpx.get(f"{api}/rules").json()["data"]["groups"] for rule in group["rules"]]
        assert rules and {rule["health"] for rule in rules} == {"ok"}
    finally:
        process.terminate()
        process.wait(20)


def _scraped(api):
    with contextlib.suppress(httpx.HTTPError):
        result = httpx.get(f"{api}/query", params={"query": "sku_plugin_up"}).json()["data"]["result"]
        return bool(result) and result[0]["value"][1] == "1"
    return False
