"""Readiness: a server that answers is seen wherever it listens, and nothing else is. Small servers of every kind stand in for vLLM."""

import contextlib
import datetime
import http.server
import json
import os
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from argparse import Namespace

import pytest

from sku_vllm.errors import ConfigError
from sku_vllm.serving.address import Address, address_of, read_address, write_address
from sku_vllm.serving.serve_config import VARIABLE
from sku_vllm.serving.server import Server


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    """A self-signed certificate with its key, for localhost."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    certificate = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    path = tmp_path_factory.mktemp("pem") / "both.pem"
    plain = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


class Answers(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self):
        body = json.dumps({"error": {"message": "X-SKU-Token is missing or wrong"}} if self.status == 401 else {"ready": True}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


class OnSocket(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def get_request(self):
        request, _ = super().get_request()
        return request, ("local", 0)


@contextlib.contextmanager
def listening(host="127.0.0.1", uds=None, pem=None, client_certificate=False, status=200):
    """A server like this; yields its address."""
    handler = type("Handler", (Answers,), {"status": status})
    kind = http.server.ThreadingHTTPServer
    if ":" in host:
        kind = type("Six", (kind,), {"address_family": socket.AF_INET6})
    server = OnSocket(str(uds), handler) if uds else kind((host, 0), handler)
    if pem:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        if client_certificate:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(pem)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *arguments: None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield Address(host, 0 if uds else server.server_address[1], tls=bool(pem), uds=str(uds) if uds else None)
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def proxied(monkeypatch):
    """Everything would go through a proxy that is not there."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)


def test_a_server_is_seen_by_every_name_it_listens_under(proxied):
    for host in ("127.0.0.1", "::1", "0.0.0.0", "::", "localhost", socket.gethostbyname(socket.gethostname())):
        with listening(host) as address:
            assert address.answers(), host
            assert "[" in address.root or ":" not in address.host


def test_tls_is_spoken_to_tls_whatever_the_certificate(pem, proxied):
    with listening(pem=pem) as address:
        assert address.root.startswith("https://") and address.answers()
        assert not Address(address.host, address.port).answers(), "plain HTTP to a TLS port is no answer"
    with listening(pem=pem, client_certificate=True) as address:
        assert all(address.answers() for _ in range(20)), "it asks for a certificate: it is up"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_vllms_http_server_that_wants_a_certificate_is_seen(pem, proxied, loop):
    """uvicorn closes such a connection after the handshake, without an alert that says why."""
    import uvicorn

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"ready": true}'})

    given = {"ssl_keyfile": str(pem), "ssl_certfile": str(pem), "ssl_ca_certs": str(pem), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1], tls=True)
        config = uvicorn.Config(app, **given, loop=loop, lifespan="off", log_level="critical")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        assert not Address(address.host, address.port).answers(0.2), "nothing answers there yet"
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.05)
        assert all(address.answers() for _ in range(5))
        assert ctl(f"https://localhost:{address.port}", "--cacert", pem, "--cert", pem)[0] == 0
        server.should_exit = True
        thread.join(60)


def test_a_socket_is_asked_on_its_socket(tmp_path, proxied):
    with listening(uds=tmp_path / "s.sock") as address:
        assert address.root == f"unix:{tmp_path}/s.sock" and address.answers()
    assert not address.answers() and not Address(uds=str(tmp_path / "none.sock")).answers()


@pytest.mark.parametrize(("status", "up"), [(200, True), (401, True), (404, True), (503, False)])
def test_what_an_answer_is(status, up):
    with listening(status=status) as address:
        assert address.answers() == up


def test_what_is_written_down_is_where_vllm_listens(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "serve.yaml"))
    assert read_address(tmp_path) is None
    flags = {"host": None, "port": 8000, "ssl_keyfile": "k", "ssl_certfile": "c", "uds": None, "shutdown_timeout": 60}
    write_address(Namespace(**flags, served_model_name=["a", "b"]))
    found = read_address(tmp_path)
    assert (found.root, found.shutdown, found.alias) == ("https://127.0.0.1:8000", 60, "a")
    assert address_of(Namespace(host="::1", port=1)).root == "http://[::1]:1"


def test_waiting_ends_when_the_server_answers_where_it_says_and_when_it_dies(tmp_path):
    """The port of the constructor is only a guess; and without a limit a server may take as long as it likes."""
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with listening() as address:
            (tmp_path / "serve.yaml.listening").write_text(json.dumps({"host": address.host, "port": address.port}))
            server = Server(alive, ("127.0.0.1", 9), None, tmp_path, None)
            server.wait_ready(None)
            assert server.port == address.port and server.control("GET", "ready") == {"ready": True}
    finally:
        alive.communicate(b"\n")
    with pytest.raises(Exception, match="ended with code 0"):
        Server(alive, ("127.0.0.1", 9), None, tmp_path, None).wait_ready(None)


def test_a_socket_that_a_killed_server_left_is_removed_and_nothing_else(tmp_path):
    from sku_vllm.serving.vllm_flags import check_socket

    with listening(uds=tmp_path / "s.sock"), pytest.raises(ConfigError, match="a server listens there"):
        check_socket(Namespace(uds=str(tmp_path / "s.sock")))
    assert (tmp_path / "s.sock").exists()
    check_socket(Namespace(uds=str(tmp_path / "s.sock")))
    assert not (tmp_path / "s.sock").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not a socket"):
        check_socket(Namespace(uds=str(tmp_path / "file")))


def test_a_socket_whose_whole_path_is_too_long_is_reached_from_where_one_is(tmp_path, monkeypatch):
    """vLLM listens on the path as it was given, which may be short; the whole one, which the process that started it knows, is not."""
    from sku_vllm.serving.vllm_flags import check_socket

    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.chdir(deep)
    with listening(uds="s.sock") as relative:
        address = Address(uds=str(deep / relative.uds))
        assert address.answers() and address.client().get("/health").status_code == 200
        assert ctl(f"unix:{deep}/s.sock")[0] == ctl("unix:s.sock")[0] == 0
    for path, word in ((f"{deep}/s.sock", "107 bytes at most"), ("none/s.sock", "none is no directory")):
        with pytest.raises(ConfigError, match=word):
            check_socket(Namespace(uds=path))
    check_socket(Namespace(uds="s2.sock"))


# ---- sku ctl ------------------------------------------------------------------------------------------------------


def ctl(server, *flags):
    """(exit code, output) of `sku ctl ready` in this process."""
    from click.testing import CliRunner

    from sku_vllm.cli.ctl import command
    from sku_vllm.errors import SkuError

    found = CliRunner().invoke(command, ["ready", "--server", server, *map(str, flags)], catch_exceptions=True)
    if isinstance(found.exception, SkuError):
        return found.exception.exit_code, str(found.exception)
    return found.exit_code, found.output


def test_ctl_reaches_a_server_of_every_kind_and_says_which_flag_is_missing(pem, tmp_path, proxied):
    with listening() as address:
        assert ctl(address.root)[0] == 0 and ctl(f"{address.root}/v1/")[0] == 0
    own = socket.gethostbyname(socket.gethostname())
    with listening(own) as address:
        assert ctl(address.root)[0] == 0, "through the proxy"
    with listening(uds=tmp_path / "s.sock") as address:
        assert ctl(address.root)[0] == 0 and ctl(f"unix:{os.path.relpath(tmp_path)}/s.sock")[0] == 0
    with listening(pem=pem) as address:
        server = f"https://localhost:{address.port}"
        assert ctl(server, "--cacert", pem)[0] == ctl(server, "--insecure")[0] == 0
        assert "--cacert" in ctl(server)[1]
        assert "https://" in ctl(server.replace("https", "http"))[1]
    with listening(pem=pem, client_certificate=True) as address:
        server = f"https://localhost:{address.port}"
        assert ctl(server, "--cacert", pem, "--cert", pem)[0] == 0 and ctl(server, "--cacert", pem)[0] == 3
    with listening(status=401) as address:
        assert "--token" in ctl(address.root)[1]
    for flags in (["--cacert", tmp_path / "none"], ["--cacert", pem, "--insecure"]):
        assert ctl("https://localhost:1", *flags)[0] == 2
    assert ctl("ftp://x")[0] == ctl("unix:")[0] == 2
