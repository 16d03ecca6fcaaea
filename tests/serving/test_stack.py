"""`sku serve` in other people's surroundings: TLS, keys, sockets, a proxy in the environment, names that clients keep, a drain, traces."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from sku_vllm.serving.address import Address
from sku_vllm.serving.server import Server
from sku_vllm.serving.start import free_port

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from serving_tools import FLAGS, TOKEN, PluginServer, eventually, sku_serve  # noqa: E402

pytestmark = pytest.mark.slow
PROXY = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


def started(command, log, address):
    """`sku serve` with a proxy in its environment that is not there, once it has said that it serves."""
    with open(log, "wb") as out:
        process = subprocess.Popen([*command, "--json"], stdout=out, stderr=out, env={**os.environ, **PROXY, "OMP_NUM_THREADS": "1"})
    server = Server(process, (address.host, address.port), log, log.parent, TOKEN)
    server.address = address
    assert eventually(lambda: process.poll() is not None or '"pid"' in log.read_text(errors="replace"), 1200)
    assert process.poll() is None, log.read_text(errors="replace")[-2000:]
    return server


class Collector:
    """Takes OpenTelemetry spans over HTTP, as an OTLP collector does."""

    def __init__(self):
        import http.server

        self.spans, outer = [], self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                outer.take(self.rfile.read(int(self.headers["Content-Length"])), self.headers.get("Content-Encoding"))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, body, encoding):
        import gzip

        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        request = ExportTraceServiceRequest()
        request.ParseFromString(gzip.decompress(body) if encoding == "gzip" else body)
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += [
                    {each.key: each.value.string_value for each in span.attributes} | {"name": span.name} for span in scope.spans
                ]


def test_tls_a_key_two_names_a_path_a_proxy_and_traces(tiny, tmp_path, monkeypatch, run_sku):
    """One server with all of them, as `sku serve` starts it."""
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            "k.pem",
            "-out",
            "c.pem",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
        ]
        + ["-addext", "subjectAltName=DNS:localhost"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    collector, port, log = Collector(), free_port("127.0.0.1"), tmp_path / "server.log"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # for the traces
    flags = ["--ssl-keyfile", tmp_path / "k.pem", "--ssl-certfile", tmp_path / "c.pem", "--api-key", "K1", "--root-path", "/gate"]
    flags += ["--served-model-name", "prod", "prod-latest", "--shutdown-timeout", 90, "--otlp-traces-endpoint", collector.url]
    server = started(sku_serve(tiny, "--port", port, *flags, *FLAGS), log, Address(port=port, tls=True))
    try:
        text = log.read_text(errors="replace")
        said = json.JSONDecoder().raw_decode(text, text.index("\n{") + 1)[0]
        assert said["url"] == f"https://127.0.0.1:{port}/v1" and 'as model "prod"' in log.read_text(errors="replace")
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=False, timeout=300, trust_env=False) as anyone:
            assert anyone.get("/v1/sku/ready").json() == anyone.get("/gate/v1/sku/ready").json() == {"ready": True}
            assert anyone.get("/v1/sku/ui").status_code == 200 and anyone.get("/v1/models").status_code == 401
            assert anyone.get("/v1/sku/status", headers={"X-SKU-Token": TOKEN}).status_code == 401
            keyed = {"Authorization": "Bearer K1", "X-SKU-Token": TOKEN}
            models = anyone.get("/v1/models", headers=keyed).json()["data"]
            assert [(model["id"], model["root"]) for model in models] == [(name, str(tiny / "base")) for name in ("prod", "prod-latest")]
            body = {"prompt": "w1 w2", "max_tokens": 3}
            for path in ("/v1/completions", "/gate/v1/completions"):
                for name in ("prod", "prod-latest"):
                    reply = anyone.post(path, json={**body, "model": name}, headers={**keyed, "X-SKU-Arm": "negated"})
                    assert reply.status_code == 200 and reply.json()["model"] == "prod", (path, name, reply.text)
            assert anyone.post("/v1/completions", json={**body, "model": "sku"}, headers=keyed).status_code == 404
            commands(run_sku, port, tmp_path / "c.pem")
            assert 'model_name="prod"' in anyone.get("/metrics").text
            assert eventually(lambda: any(span.get("sku.arm") == "negated" for span in collector.spans), 60), collector.spans[-3:]
    finally:
        server.process.kill()
        server.process.wait()


def commands(run_sku, port, certificate):
    """The commands reach a server with TLS and a key past a proxy that is not there, and name the flag that is missing."""
    direct = PROXY | dict.fromkeys(("ALL_PROXY", "all_proxy"), "socks5h://127.0.0.1:9") | {"NO_PROXY": ""}

    def sku(*arguments):
        return run_sku(*arguments, "--server", f"https://localhost:{port}", "--token", TOKEN, env=direct)

    assert sku("ctl", "ready", "--cacert", certificate).returncode == 0
    for flags, word in ((["--cacert", certificate], "--api-key"), (["--api-key", "K1"], "--cacert")):
        refused = sku("ctl", "status", *flags)
        assert refused.returncode > 1 and word in refused.stderr, refused.stderr
    both = ["--cacert", certificate, "--api-key", "K1"]
    assert sku("ctl", "experiment", *both).returncode == 0
    said = sku("chat", "--json", "--max-tokens", 2, *both, "w1 w2")
    assert said.returncode == 0 and set(json.loads(said.stdout)["answers"]) == {"original", "negated"}, said.stderr


def test_a_socket(tiny, tmp_path, run_sku):
    """`--uds`; and its port, which is not used, may be taken."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = ["--uds", "s.sock", "--port", taken.getsockname()[1]]
        os.chdir(tmp_path)
        server = started(sku_serve(tiny, *flags, *FLAGS), tmp_path / "server.log", Address(uds=str(tmp_path / "s.sock")))
        try:
            assert server.control("GET", "ready") == {"ready": True}
            assert f"serving unix:{tmp_path}/s.sock" in (tmp_path / "server.log").read_text(errors="replace")
            done = run_sku("ctl", "status", "--server", f"unix:{tmp_path}/s.sock", "--token", TOKEN)
            assert done.returncode == 0 and "\nready\n" in done.stdout, done.stderr
        finally:
            server.process.terminate()
            assert server.process.wait(120) is not None


def test_the_page_in_a_real_browser_on_a_phone(tmp_path):
    """Chromium: no request elsewhere, no error, nothing too wide; it asks for key and token, shows the arms, changes weights."""
    from playwright.sync_api import sync_playwright

    server = PluginServer(tmp_path / "one", keyed=True, expose_arms=True).wait()
    for number in range(4):
        server.ask("say badword", X_SKU_Arm="other", X_SKU_Key=str(number))
    assert eventually(lambda: server.judged() == 4)
    try:
        with sync_playwright() as player:
            browser = player.chromium.launch(executable_path=shutil.which("chromium") or "/usr/bin/chromium", args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 360, "height": 740})
            asked, errors = [], []
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(f"{server.root}/v1/sku/ui")
            assert not page.locator("#main").is_visible()
            page.fill("#token", TOKEN)
            page.click("#door button")
            page.wait_for_selector("#problem:has-text('API key')")
            page.fill("#key", "key")
            page.click("#door button")
            page.wait_for_selector(".arm:has-text('harmful 100.0 %')")
            assert "keep measuring" in page.inner_text("#verdict") and page.locator("svg").count() >= 1
            page.fill("#inputs input[name=other]", "0.25")
            page.fill("#inputs input[name=original]", "0.75")
            page.click("#weights button")
            page.wait_for_selector("#done:has-text('done')")
            assert server.control("GET", "arms")[1]["traffic"] == {"original": 0.75, "other": 0.25}
            page.on("dialog", lambda dialog: dialog.accept())
            page.fill("#spec", "third=base")
            for button, there in (("add", True), ("replace", True), ("remove", False)):
                page.click(f"#{button}")
                page.wait_for_selector(f"#done:has-text('{button}: done')")
                assert ("third" in server.control("GET", "arms")[1]["arms"]) == there
            page.fill("#source", "/no/adapter@0.5")
            page.click("#swap")
            page.wait_for_selector("#problem:has-text('swap: ')")
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            assert {url.split("/v1/")[0] for url in asked} == {server.root} and errors == []
            browser.close()
    finally:
        server.stop()
