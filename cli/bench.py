"""`sku bench NAME`: each benchmark is a module of its own, imported only when it runs."""

import importlib

import click

from sku_vllm.errors import ConfigError

BENCHMARKS = {
    "kernel": ("bench_delta_merge", "Delta-merge kernel against addmm_ and PEFT, beside the measured copy bandwidth."),
    "fuse": ("bench_fuse", "Fusing a checkpoint against copying it, PEFT and mergekit."),
    "train": ("bench_train", "Identification training against the published loop."),
    "dry-run": ("bench_dry_run", "What `sku train --dry-run` says against what the run then takes."),
    "serve": ("bench_serve", "Throughput and latency of the arms of one server."),
    "agreement": ("bench_agreement", "Log-probabilities of one text from five ways to the negated model."),
    "methods": ("bench_methods", "Every unlearning method on the same data at matched utility."),
}


class Benchmarks(click.Group):
    """The table above as subcommands, so that `sku bench --help` imports none of them."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(BENCHMARKS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in BENCHMARKS:
            return None
        module = f"sku_vllm.benchmarks.{BENCHMARKS[name][0]}"
        try:
            return importlib.import_module(module).command
        except ModuleNotFoundError as error:
            if error.name != module:
                raise ConfigError(
                    f"bench {name}: needs the Python package {error.name!r}; install it with: pip install {error.name}"
                ) from error
            raise ConfigError(f"bench {name}: {module} is not part of this installation") from error

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Benchmarks"):
            formatter.write_dl([(name, text) for name, (_, text) in BENCHMARKS.items()])


@click.group(name="bench", cls=Benchmarks)
def command() -> None:
    """Measure this machine: ratios of interleaved runs, with machine, versions and date in the result."""
