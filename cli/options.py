"""What every subcommand shares: `--config`, `--json`, `--debug`, and the decorator that adds them."""

import json
import math
from collections.abc import Callable
from typing import Any, TypeVar, overload

import click
from click.core import ParameterSource

from sku_vllm.adapter_at_scale import split_at_scale
from sku_vllm.errors import ConfigError, nearest

T = TypeVar("T")

SHARED = {"config", "json_output", "debug", "help"}


class SkuCommand(click.Command):
    """A command that refuses infinite numbers and NaN, and empty values such as `--retain ""`, which come from unset shell variables."""

    def invoke(self, context: click.Context) -> Any:
        for parameter in self.params:
            value = context.params.get(parameter.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{parameter.opts[0]} {value}: has to be a finite number")
            given = context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
            if given and (value == "" or (isinstance(value, tuple) and "" in value)):
                raise ConfigError(f"{parameter.opts[0]}: is empty; is a shell variable not set?")
        return super().invoke(context)


def sku_command(name: str, no: str | None = None) -> Callable[[Callable[..., Any]], click.Command]:
    """Like `click.command(name)`, with `--config FILE` (flags win), `--json` (argument `json_output`) and `--debug`.

    Args:
        no: what exit code 1 means, for the help page; None where the command never exits with 1.
    """
    codes = f"Exit codes: 0 done; {f'1 {no}; ' if no else ''}2 bad input; 3 the run failed; 130 interrupted."

    def decorate(function: Callable[..., Any]) -> click.Command:
        function = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")(function)
        function = click.option("--json", "json_output", is_flag=True, help="Print one JSON object on stdout; logs go to stderr.")(function)
        function = click.option(
            "--config",
            type=click.Path(dir_okay=False),
            is_eager=True,
            expose_value=False,
            callback=_read_config,
            help="YAML file of this command's options; flags on the command line win.",
        )(function)
        return click.command(name, cls=SkuCommand, epilog=codes, context_settings={"show_default": True})(function)

    return decorate


def _read_config(context: click.Context, parameter: click.Parameter, path: str | None) -> None:
    if path is None:
        return
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected one `option: value` per line")
    known = {parameter.name: parameter for parameter in context.command.params if parameter.name not in SHARED}
    spelled = {}
    for parameter in known.values():
        for option in parameter.opts:
            spelled[option.lstrip("-").replace("-", "_")] = parameter.name
    defaults = {}
    for key, value in values.items():
        name = spelled.get(str(key).replace("-", "_"))
        if name is None:
            raise ConfigError(
                f"--config {path}: unknown key {key!r}{nearest(str(key).replace('_', '-'), [s.replace('_', '-') for s in spelled])}"
            )
        many = getattr(known[name], "multiple", False)
        if isinstance(value, dict) or (isinstance(value, list) and not many):
            raise ConfigError(f"--config {path}: {key}: expected one value, not a {'mapping' if isinstance(value, dict) else 'list'}")
        # click wants a sequence where an option may be given several times
        defaults[name] = [value] if many and not isinstance(value, list) else value
    context.default_map = {**(context.default_map or {}), **defaults}


def named_files(values: tuple[str, ...], flag: str) -> dict[str, str]:
    """`NAME=FILE` options as a mapping, in the order given."""
    named: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or not name or not path:
            raise ConfigError(f"{flag} {value}: expected NAME=FILE, for instance unseen=data/unseen.jsonl")
        if name in named:
            raise ConfigError(f"{flag} {value}: the name {name!r} is given twice")
        named[name] = path
    return named


@overload
def adapter_at_scale(value: str) -> tuple[str, float | None]: ...
@overload
def adapter_at_scale(value: str, default: T) -> tuple[str, float | T]: ...
def adapter_at_scale(value: str, default: Any = None) -> tuple[str, Any]:
    """`ADAPTER@SCALE` as `split_at_scale` reads it, or ADAPTER with `default`."""
    path, text = split_at_scale(value)
    return (path, default) if text is None else (path, float(text))


def print_json(value: Any) -> None:
    """Print the result of `--json` on stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def log(message: str) -> None:
    """Print a message for the user on stderr."""
    click.echo(message, err=True)
