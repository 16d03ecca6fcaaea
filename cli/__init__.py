"""The `sku` command. Each subcommand has a file of its own, imported only when it runs, so `sku --help` loads neither torch nor vllm."""

import importlib
import os
import signal
import sys
import traceback
from pathlib import Path

import click

from sku_vllm import __version__
from sku_vllm.errors import SkuError

# name: (one line of help, group of the help page)
COMMANDS = {
    "demo": ("The whole road on a small built-in model, in about five minutes.", "Start here"),
    "lab": ("Write the built-in models and their fictional data to a directory.", "Start here"),
    "train": ("Identify: train an adapter that holds a model's harmful knowledge.", "Make a model safer"),
    "tune": ("Choose the scale: least harm within limits on utility.", "Make a model safer"),
    "negate": ("Write an adapter that subtracts the knowledge when it is added.", "Make a model safer"),
    "fuse": ("Subtract an adapter from a checkpoint and write the merged weights.", "Make a model safer"),
    "verify": ("Check a fused checkpoint against its manifest.", "Make a model safer"),
    "eval": ("Harmful rate, refusals, gibberish and utility of a model.", "Measure"),
    "judge": ("Label answers that are already in a file.", "Measure"),
    "attack": ("Relearn, quantise, rephrase, prefill: does the knowledge come back?", "Measure"),
    "compare": ("Two models over the same prompts, with paired statistics.", "Measure"),
    "report": ("One page from whatever the other commands left behind.", "Measure"),
    "bench": ("Benchmarks of kernel, fuse, train, serve and methods.", "Measure"),
    "serve": ("vLLM's OpenAI server with original and negated arms side by side.", "Serve"),
    "ctl": ("Change a running server: arms, weights, swap, restore, experiment.", "Serve"),
    "monitor": ("Watch a running server for knowledge that comes back.", "Serve"),
}


class SkuGroup(click.Group):
    """Subcommands by name from COMMANDS; the help page is written from the table, not from the modules."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"sku_vllm.cli.{name}").command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        for group in dict.fromkeys(group for _, group in COMMANDS.values()):
            with formatter.section(group):
                formatter.write_dl([(name, text) for name, (text, where) in COMMANDS.items() if where == group])


@click.group(cls=SkuGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="sku")
def sku() -> None:
    """Find a model's harmful knowledge as an adapter, subtract it, and serve the safer model.

    Exit codes: 0 done; 1 the answer is no; 2 bad input; 3 the run failed; 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run `sku`; every error we raise on purpose becomes one line on stderr and an exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] not in (["serve"], ["bench"]):
        # OpenMP threads that spin while they wait starve each other on a shared machine: training the lab's Llama beside one
        # other two-thread job on 2 cores ran at 2.0 thousand tokens/s spinning and 4.2 sleeping. vLLM and benchmarks keep their own.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        # click returns the status of --help and --version instead of exiting.
        sys.exit(sku.main(arguments, prog_name="sku", standalone_mode=False) or 0)
    except SkuError as error:
        if "--debug" in arguments:
            raise
        _fail(str(error), error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "sku"
        _fail(f"{error.format_message()} (see {where} --help)", 2)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        if "--debug" in arguments:
            raise
        _fail(*_unforeseen(error))


def _unforeseen(error: Exception) -> tuple[str, int]:
    """(message, exit code) of an error nobody raised on purpose; one of the file system is the user's to mend."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", 2
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if f"{os.sep}sku_vllm{os.sep}" in frame.filename] or [None]
    where = f"{Path(ours[-1].filename).name} line {ours[-1].lineno}: " if ours[-1] else ""
    return f"{where}{type(error).__name__}: {error}; nobody foresaw this: --debug shows where it came from, please report it", 3


def _fail(message: str, code: int) -> None:
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(code)


def _terminate(number: int, frame: object) -> None:
    """SIGTERM unwinds like Ctrl-C, so that nothing half-written and no server stays behind."""
    raise KeyboardInterrupt
