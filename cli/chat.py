"""`sku chat`: one prompt to several arms of a running server, their answers side by side as they come."""

import sys
import threading
from typing import Any

import click

from sku_vllm.cli.options import print_json, sku_command
from sku_vllm.errors import ConfigError


@sku_command("chat")
@click.option("--server", default="http://127.0.0.1:8000", help="URL or unix:PATH of the server.")
@click.option("--arms", default="original,negated", help="Which arms to ask, NAME,NAME.")
@click.option("--model", default=None, help="Model name in the requests.  [default: the one that the server's clients use]")
@click.option("--token", envvar="SKU_TOKEN", help="Its control token, which may choose arms.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="vLLM's own --api-key, where the server has one.")
@click.option("--cacert", type=click.Path(dir_okay=False), help="PEM file of the server's certificate authority or own certificate.")
@click.option("--cert", type=click.Path(dir_okay=False), help="PEM file with a client's certificate and key, for --ssl-cert-reqs.")
@click.option("--insecure", is_flag=True, help="Accept any certificate.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, help="Longest answer, in tokens.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, help="0: the likeliest answer.")
@click.option("--timeout", type=click.FloatRange(0.1), default=120.0, help="Seconds to wait for the next piece.")
@click.argument("prompt", required=False)
def command(json_output: bool, prompt: str | None, **options: Any) -> None:
    """Ask several arms of a running server the same.

    \b
    sku chat --server http://host:8000 --arms original,negated "How do I …?"

    Without PROMPT it asks for one after the other, until Ctrl-D; each is a conversation of its own.
    """
    from sku_vllm.client.chat import served_name
    from sku_vllm.client.server_address import server_address, trusting
    from sku_vllm.client.streamed_chat import ask_arms

    address = server_address(options["server"], trusting(options["cacert"], options["cert"], options["insecure"]))
    arms = list(dict.fromkeys(filter(None, options["arms"].split(","))))
    if not arms:
        raise ConfigError("--arms: name at least one, for instance original,negated")
    key, token = options["api_key"], options["token"]
    headers = {**({"Authorization": f"Bearer {key}"} if key else {}), **({"X-SKU-Token": token} if token else {})}
    model = options["model"]
    if model is None:
        with address.client(options["timeout"]) as client:
            model = served_name(client, headers)
    while True:
        asked = prompt if prompt is not None else _prompt()
        if not asked:
            return
        body = {
            "model": model,
            "messages": [{"role": "user", "content": asked}],
            "max_tokens": options["max_tokens"],
            "temperature": options["temperature"],
            "stream": True,
        }
        columns = Columns(arms, live=sys.stdout.isatty() and not json_output)
        with columns:
            answers = ask_arms(address, arms, body, headers, options["timeout"], columns.add)
        print_json({"prompt": asked, "answers": answers}) if json_output else columns.print()
        if prompt is not None:
            return


def _prompt() -> str:
    """The next line of a terminal or of a pipe; "" at the end."""
    if sys.stdin.isatty():
        click.echo("you: ", nl=False, err=True)
    return sys.stdin.readline().strip()


class Columns:
    """The answers so far, one column an arm. live: drawn again with every piece, which needs a terminal."""

    def __init__(self, arms: list[str], live: bool) -> None:
        from rich.live import Live

        self.answers = dict.fromkeys(arms, "")
        self.lock = threading.Lock()
        self.live = Live(self._table(), refresh_per_second=12, transient=True) if live else None

    def __enter__(self) -> None:
        if self.live:
            self.live.start()

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()

    def add(self, arm: str, text: str) -> None:
        """Add a piece to an arm's answer."""
        with self.lock:
            self.answers[arm] += text
            if self.live:
                self.live.update(self._table())

    def print(self) -> None:
        """The finished answers: side by side on a terminal, else one below the other."""
        if self.live:
            from rich.console import Console

            Console().print(self._table())
            return
        for arm, answer in self.answers.items():
            click.echo(f"{arm}: {answer}")

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(expand=True)
        for arm in self.answers:
            table.add_column(arm, ratio=1)
        table.add_row(*(Text(answer) for answer in self.answers.values()))
        return table
