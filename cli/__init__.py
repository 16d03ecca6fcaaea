"""The `sku` command. Each subcommand has a file of its own, imported only when it runs, so `sku --help` loads neither torch nor vllm."""

import importlib
import logging
import os
import sys
import traceback
from pathlib import Path

import click

from sku_vllm.cli.interrupts import raise_interrupts
from sku_vllm.errors import SkuError
from sku_vllm.version import __version__

# name: (one line of help, group of the help page)
COMMANDS = {
    "demo": ("Train, fuse, measure and serve on a small built-in model, in about five minutes.", "Start here"),
    "lab": ("Write the built-in models and their fictional data to a directory.", "Start here"),
    "train": ("Train an adapter that holds a model's harmful knowledge.", "Make a model safer"),
    "tune": ("Choose the scale of subtraction with least harm within limits on utility.", "Make a model safer"),
    "negate": ("Write the negated adapter, which subtracts the knowledge when it is added.", "Make a model safer"),
    "fuse": ("Subtract an adapter from a checkpoint and write the merged weights.", "Make a model safer"),
    "distill": ("Distil a fused checkpoint into a damaged copy of itself: erasure instead of suppression.", "Make a model safer"),
    "verify": ("Check a fused checkpoint against its manifest.", "Make a model safer"),
    "eval": ("Measure harmful rate, refusals, gibberish and utility of a model.", "Measure"),
    "judge": ("Label answers that are already in a file.", "Measure"),
    "attack": ("Try to bring the knowledge back: relearning, abliterating, quantising, rephrasing, prefilling.", "Measure"),
    "compare": ("Compare two models on the same prompts, with paired statistics.", "Measure"),
    "report": ("Write one page from the records of the other commands.", "Measure"),
    "bench": ("Run the benchmarks of kernel, fuse, train, serve and methods.", "Measure"),
    "serve": ("Start vLLM's OpenAI server with original and negated model side by side.", "Serve"),
    "ctl": ("Change a running server: its arms, their shares of traffic, the engine's weights.", "Serve"),
    "chat": ("Ask several arms of a running server the same, answers side by side.", "Serve"),
    "monitor": ("Ask a running server at intervals whether harmful answers come back.", "Serve"),
}


class SkuGroup(click.Group):
    """Subcommands by name from COMMANDS; the help page is written from the table, not from the modules."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Import the module of this command; None where there is no such command."""
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"sku_vllm.cli.{name}").command
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """A section of the help page for each group."""
        for group in dict.fromkeys(group for _, group in COMMANDS.values()):
            with formatter.section(group):
                formatter.write_dl([(name, text) for name, (text, where) in COMMANDS.items() if where == group])


@click.group(cls=SkuGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="sku")
def sku() -> None:
    """Find a model's harmful knowledge as an adapter, subtract it, and serve the safer model.

    Exit codes: 0 done; 1 a negative result, see the command; 2 bad input; 3 the run failed; 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run `sku`. Every error of this package (`SkuError`) or of click becomes one line on stderr and an exit code, without a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] not in (["serve"], ["bench"]):
        # By default OpenMP threads busy-wait, which slows other jobs on the same cores: training the lab's Llama next to one other
        # two-thread job on 2 cores ran at 2.0 thousand tokens/s with busy-waiting and 4.2 without. vLLM and benchmarks choose for
        # themselves.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    raise_interrupts()
    _show_notices()
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
    """(message, exit code) of an unexpected exception: 2 for a file that cannot be used, which the user can fix, else 3."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", 2
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if f"{os.sep}sku_vllm{os.sep}" in frame.filename]
    where = f"{Path(own[-1].filename).name} line {own[-1].lineno}: " if own else ""
    return f"{where}{type(error).__name__}: {error}; this error was not expected: --debug shows where it came from, please report it", 3


def _fail(message: str, code: int) -> None:
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(code)


class _Notices(logging.Handler):
    """What readers and judges say, such as the form a file was recognised as: one line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message; stderr is looked up each time, since tests and progress bars replace it."""
        click.echo(record.getMessage(), err=True)


def _show_notices() -> None:
    logger = logging.getLogger("sku_vllm")
    if not logger.handlers:
        logger.addHandler(_Notices())
        logger.setLevel(logging.INFO)
        logger.propagate = False
