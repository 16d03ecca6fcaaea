"""The HTTP client against a real server: what is sent, which way it goes, and what a failure says."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sku_vllm.client.http import ServerRefused, fetch, fetch_json, http_client
from sku_vllm.client.url import http_url
from sku_vllm.errors import ConfigError, RunError


class Handler(BaseHTTPRequestHandler):
    """Echoes a request; refuses /refused, and sends whoever asks for /moved to /, or for /elsewhere?URL to that."""

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length).decode()
        if self.path == "/moved" or self.path.startswith("/elsewhere?"):
            self.send_response(301)
            self.send_header("Location", self.path.partition("?")[2] or "/")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        text = json.dumps({"method": self.command, "path": self.path, "body": body, "token": self.headers.get("X-SKU-Token")})
        answer = (text if self.path != "/text" else "no JSON").encode()
        self.send_response(409 if self.path == "/refused" else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_request_arrives_as_it_was_meant(url: str) -> None:
    found = fetch_json(f"{url}/x", method="PUT", body={"text": "ü \ud800"}, headers={"X-SKU-Token": "grün"})
    assert (found["method"], json.loads(found["body"]), found["token"]) == ("PUT", {"text": "ü \ud800"}, "grün")
    assert fetch_json(url)["method"] == "GET" and fetch_json(url)["body"] == ""
    assert fetch_json(f"{url}/moved")["path"] == "/"


def test_a_refusal_names_the_address_and_keeps_what_was_said_apart(url: str) -> None:
    with pytest.raises(ServerRefused, match=rf"{url}/refused: answered 409 Conflict$") as refusal:
        fetch(f"{url}/refused", method="POST", body={"prompt": "secret"})
    assert refusal.value.status == 409 and "secret" in refusal.value.body
    with pytest.raises(ValueError):
        fetch_json(f"{url}/text")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://no-such-host.invalid", "http://[::1"])
def test_no_answer_is_one_line_that_names_the_address(address: str) -> None:
    with pytest.raises(RunError, match="is the server up, and is this its address") as error:
        fetch(address, method="POST", body={"prompt": "secret"}, timeout=5)
    assert str(error.value).startswith(address) and "secret" not in str(error.value) and "\n" not in str(error.value)


def test_proxies_are_for_other_machines_and_only_where_asked_for(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The echoing server stands in for the proxy: whoever goes through it gets an answer for a host that does not exist."""
    monkeypatch.setenv("http_proxy", url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    elsewhere = "http://no-such-host.invalid/x"
    assert fetch_json(elsewhere, proxy=True)["path"] == elsewhere
    with pytest.raises(RunError):
        fetch(elsewhere)
    assert fetch_json(f"{url}/y", proxy=True)["path"] == "/y" == fetch_json(f"{url}/y")["path"]  # not http://127.0.0.1/y


def test_a_proxy_that_cannot_be_used_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SOCKS proxy wants a package of its own. Whoever goes through no proxy does not notice."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "socksio", None)
    for address, word in (("socks5h://127.0.0.1:9", "socksio"), ("gopher://127.0.0.1:9", "gopher")):
        monkeypatch.setenv("all_proxy", address)
        with pytest.raises(ConfigError, match=f"ALL_PROXY.*{word}"):
            http_client(proxy=True)
        http_client().close()


def test_a_redirect_takes_the_control_token_to_no_other_host(url: str) -> None:
    for base, token in ((url, "t"), (url.replace("127.0.0.1", "localhost"), None)):
        with http_client(base=base) as client:
            found = fetch_json(f"/elsewhere?{url}/x", headers={"X-SKU-Token": "t"}, client=client)
        assert (found["path"], found["token"]) == ("/x", token)


def test_one_client_serves_several_requests(url: str) -> None:
    with http_client() as client:
        assert [fetch_json(f"{url}/{number}", client=client)["path"] for number in range(3)] == ["/0", "/1", "/2"]


def test_what_is_an_address() -> None:
    assert all(map(http_url, ("http://host", "https://host:1/v1", "http://[::1]:8000")))
    assert not any(map(http_url, ("host", "file:///x", "http://", "http://host:99999", "http://[", "http://host:0x")))
