"""`sku fuse`: subtract adapters from a checkpoint and write the merged weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from sku_vllm.cli.options import adapter_at_scale, log, print_json, sku_command
from sku_vllm.cli.tuned import MISSING_ADAPTER, read_choice, tuned_option
from sku_vllm.errors import ConfigError

if TYPE_CHECKING:
    from sku_vllm.client.hub import Repository
    from sku_vllm.fuse import FuseReport


@sku_command("fuse")
@click.option("--model", required=True, help="Base model: a directory, or a hub id.")
@click.option("--revision", help="Revision of a hub id.")
@click.option("--adapter", "adapters", multiple=True, metavar="A[@S]", help="Adapter directory, with its scale; may be repeated.")
@click.option("--scale", type=float, show_default="1.0", help="Scale of the adapters that name none, ≥ 0.")
@tuned_option()
@click.option(
    "--layer-scales", type=click.Path(dir_okay=False), help="JSON file {regular expression: scale}: scales by weight name; 0 elsewhere."
)
@click.option("--output", required=True, help="Directory to write; must not exist or be empty.")
@click.option("--dtype", default="keep", help="keep, float32, bfloat16 or float16.")
@click.option("--untie", is_flag=True, help="Write tied input and output embeddings as two tensors.")
@click.option(
    "--fp8-scales",
    default="keep",
    help="Scales of FP8 weights: keep the base's (clipped values are counted), or recompute them to fit the edit (two passes).",
)
@click.option(
    "--simulate", default="", help="Comma-separated int4, int8, fp8: report how much of the edit would be left after such quantisation."
)
@click.option(
    "--check",
    default="",
    help="Comma-separated gptq, awq, nf4, gguf:Q4_K_M, gguf:Q8_0, …: the same by the quantiser itself, from an optional package.",
)
@click.option(
    "--calibrate", type=click.Path(dir_okay=False), help="Rows on whose text gptq and awq are calibrated, such as the retain set."
)
@click.option("--stochastic", is_flag=True, help="Round up or down at random, so that small edits survive on average.")
@click.option("--seed", type=int, default=0, help="Seed of --stochastic.")
@click.option("--device", default="auto", help="auto (the faster one, measured), cpu or cuda: where weights are merged.")
@click.option("--no-digests", is_flag=True, help="Leave file digests out of the manifest (faster; sku verify then has nothing to check).")
@click.option("--signing-key", type=click.Path(dir_okay=False), help="Key file: also write an HMAC-SHA256 of the manifest.")
@click.option("--push", metavar="ORG/NAME", help="Also upload the checkpoint to this repository of the Hugging Face hub, a private one.")
@click.option("--public", is_flag=True, help="With --push: a public repository. Where the base is public, this publishes the edit.")
@click.option("--any-base", is_flag=True, help="Accept an adapter that was trained on another base.")
@click.option("--as-is", is_flag=True, help="Accept a negated adapter (subtracting it puts the harm back).")
def command(
    model: str,
    revision: str | None,
    adapters: tuple[str, ...],
    scale: float | None,
    tuned: str | None,
    layer_scales: str | None,
    output: str,
    dtype: str,
    untie: bool,
    fp8_scales: str,
    simulate: str,
    check: str,
    calibrate: str | None,
    stochastic: bool,
    seed: int,
    device: str,
    no_digests: bool,
    signing_key: str | None,
    push: str | None,
    public: bool,
    any_base: bool,
    as_is: bool,
    json_output: bool,
) -> None:
    """Subtract adapters from a checkpoint: base − scale·delta, rounded once, written beside a manifest.

    \b
    sku fuse --model DIR --adapter ADAPTER@1.0 --output safer
    sku fuse --model DIR --tuned TUNED --output safer
    """
    if tuned:
        choice = read_choice(tuned, {"--adapter": adapters, "--scale": scale, "--layer-scales": layer_scales})
        adapters, scale = (choice.adapter,), choice.scale
    elif not adapters:
        raise ConfigError(MISSING_ADAPTER)
    from sku_vllm.fuse import FuseRequest, fuse_checkpoint, read_layer_scales

    default = read_layer_scales(layer_scales) if layer_scales else 1.0 if scale is None else scale
    request = FuseRequest(
        model,
        [(adapters[0], default)] if tuned else [adapter_at_scale(value, default) for value in adapters],
        output,
        dtype=dtype,
        untie=untie,
        fp8_scales=fp8_scales,
        simulate=[kind for kind in simulate.split(",") if kind],
        check=[kind for kind in check.split(",") if kind],
        calibrate=calibrate,
        digests=not no_digests,
        seed=seed if stochastic else None,
        device=device,
        signing_key=signing_key,
        revision=revision,
        any_base=any_base,
        as_is=as_is,
    )
    repository = _repository(push, public)
    with _bar() as advance:
        report = fuse_checkpoint(request, advance)
    for line in report.warnings:
        log(f"warning: {line}")
    if json_output:
        print_json(report.to_json())
    else:
        _say(output, report)
    if repository is not None:
        log(f"uploaded to {repository.upload_checkpoint(output)}")


def _repository(push: str | None, public: bool) -> "Repository | None":
    """Where to upload to, made before the work, so that nobody waits for it in vain."""
    if push is None:
        if public:
            raise ConfigError("--public: says how to --push, which is not given; leave it out")
        return None
    from sku_vllm.client.hub import WARNING, Repository

    if public:
        log(f"warning: {WARNING}")
    return Repository(push, public=public)


def _say(output: str, report: "FuseReport") -> None:
    """Print the result in one line, one more per simulated quantiser, and the next commands."""
    kept = "" if report.retained is None else f", {report.retained:.2%} of the edit retained"
    copy = report.plain_copy
    beside = f" (a plain copy, estimated from {copy['sampled_bytes'] / 1e6:.0f} MB: {copy['seconds']:.1f} s)" if copy else ""
    scales = f", FP8 scales {report.fp8_scales}" if report.fp8_scales else ""
    after = f" after {report.setup_seconds:.1f} s of setup" if report.setup_seconds >= 1 else ""
    log(f"{output}: {report.tensors} tensors edited{kept}{scales}; {report.bytes / 1e9:.2f} GB in {report.seconds:.1f} s{after}{beside}")
    for kind, row in (report.simulated | report.checked).items():
        if row["retained"] is not None:
            log(f"  {kind}: {row['retained']:.1%} would be left, noise {row['noise']:.2f}")
    log(f"next: sku verify {output}; sku eval --model {output} …")


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal. In a log it shows nothing; the line at the end has the result."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("fuse"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("fuse", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
