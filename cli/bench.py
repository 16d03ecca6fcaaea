"""`sku bench NAME`: the benchmarks by name. Each is a module in `sku_vllm.benchmarks`, imported only when it runs."""

import importlib

import click

from sku_vllm.errors import ConfigError

BENCHMARKS = {
    "kernel": ("bench_delta_merge", "Delta-merge kernel compared with addmm_, PEFT and the measured copy bandwidth."),
    "fuse": ("bench_fuse", "Fusing a checkpoint compared with copying it, PEFT and mergekit."),
    "train": ("bench_train", "Training an adapter compared with the training loop published with SKU."),
    "dry-run": ("bench_dry_run", "The estimates of `sku train --dry-run` compared with the real run."),
    "eval": ("bench_eval", "The answers of `sku eval` compared with transformers' own generate."),
    "serve": ("bench_serve", "Throughput and latency of the arms of one server."),
    "agreement": ("bench_agreement", "Log-probabilities of one text under five implementations of the negated model."),
    "erase": ("bench_erase", "What relearning brings back to fused, distilled and never harmful models, against compute."),
    "requests": ("bench_requests", "Requests to forget one after another, and one withdrawn: stacked adapters, or fused in turn."),
    "methods": ("bench_methods", "Every unlearning method on the same data at matched utility."),
    "real": ("bench_real", "Unlearning methods on a real model and real prompts, beside a linear probe of the base."),
}


class Benchmarks(click.Group):
    """BENCHMARKS as subcommands, so that `sku bench --help` imports none of them."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(BENCHMARKS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Import the module of this benchmark; None where there is no such benchmark.

        Raises:
            ConfigError: it needs a package that is not installed.
        """
        if name not in BENCHMARKS:
            return None
        module = f"sku_vllm.benchmarks.{BENCHMARKS[name][0]}"
        try:
            command: click.Command = importlib.import_module(module).command
        except ModuleNotFoundError as error:
            if error.name != module:
                raise ConfigError(
                    f"bench {name}: needs the Python package {error.name!r}; install it with: pip install {error.name}"
                ) from error
            raise ConfigError(f"bench {name}: {module} is not part of this installation") from error
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of the help page."""
        with formatter.section("Benchmarks"):
            formatter.write_dl([(name, text) for name, (_, text) in BENCHMARKS.items()])


@click.group(name="bench", cls=Benchmarks)
def command() -> None:
    """Run a benchmark on this machine. Most compare alternating runs; results name machine, versions and date."""
