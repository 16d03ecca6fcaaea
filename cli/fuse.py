"""`sku fuse`: subtract adapters from a checkpoint and write the merged weights."""

import click

from sku_vllm.cli.options import adapter_at_scale, log, print_json, sku_command


@sku_command("fuse")
@click.option("--model", required=True, help="Base model: a directory, or a hub id.")
@click.option("--revision", help="Revision of a hub id.")
@click.option(
    "--adapter", "adapters", multiple=True, required=True, metavar="A[@S]", help="Adapter directory, with its scale; may be repeated."
)
@click.option("--scale", type=float, default=1.0, help="Scale of the adapters that name none, ≥ 0.")
@click.option(
    "--layer-scales", type=click.Path(dir_okay=False), help="JSON file {regular expression: scale}: scales by weight name; 0 elsewhere."
)
@click.option("--output", required=True, help="Directory to write; must not exist or be empty.")
@click.option("--dtype", default="keep", help="keep, float32, bfloat16 or float16.")
@click.option("--untie", is_flag=True, help="Write tied input and output embeddings apart.")
@click.option(
    "--fp8-scales", default="keep", help="keep those of FP8 weights, counting what they clip, or recompute them to fit (two passes)."
)
@click.option("--simulate", default="", help="Comma-separated int4, int8, fp8: how much of the edit those would leave.")
@click.option("--stochastic", is_flag=True, help="Round up or down at random, so that small edits survive on average.")
@click.option("--seed", type=int, default=0, help="Seed of --stochastic.")
@click.option("--device", default="auto", help="auto (the faster one, measured), cpu or cuda: where weights are merged.")
@click.option("--no-digests", is_flag=True, help="Leave file digests out of the manifest (faster; sku verify then has nothing to check).")
@click.option("--signing-key", type=click.Path(dir_okay=False), help="Key file: also write an HMAC-SHA256 of the manifest.")
@click.option("--any-base", is_flag=True, help="Accept an adapter that was trained on another base.")
@click.option("--as-is", is_flag=True, help="Accept a negated adapter (subtracting it puts the harm back).")
def command(
    model: str,
    revision: str | None,
    adapters: tuple[str, ...],
    scale: float,
    layer_scales: str | None,
    output: str,
    dtype: str,
    untie: bool,
    fp8_scales: str,
    simulate: str,
    stochastic: bool,
    seed: int,
    device: str,
    no_digests: bool,
    signing_key: str | None,
    any_base: bool,
    as_is: bool,
    json_output: bool,
) -> None:
    """Subtract adapters from a checkpoint: base − scale·delta, rounded once, written beside a manifest.

    \b
    sku fuse --model DIR --adapter ADAPTER@1.0 --output safer
    """
    from sku_vllm.fuse import fuse_checkpoint, read_layer_scales

    scales = read_layer_scales(layer_scales) if layer_scales else scale
    with _progress() as advance:
        report = fuse_checkpoint(
            model,
            [adapter_at_scale(value, scales) for value in adapters],
            output,
            dtype=dtype,
            untie=untie,
            fp8_scales=fp8_scales,
            kinds=[kind for kind in simulate.split(",") if kind],
            digests=not no_digests,
            any_base=any_base,
            as_is=as_is,
            seed=seed if stochastic else None,
            device=device,
            signing_key=signing_key,
            revision=revision,
            progress=advance,
        )
    for line in report.warnings:
        log(f"warning: {line}")
    if json_output:
        print_json(report.to_json())
        return
    kept = "" if report.retained is None else f", {report.retained:.2%} of the edit retained"
    copy = report.plain_copy
    beside = f" (a plain copy, estimated from {copy['sampled_bytes'] / 1e6:.0f} MB: {copy['seconds']:.1f} s)" if copy else ""
    scales = f", FP8 scales {report.fp8_scales}" if report.fp8_scales else ""
    after = f" after {report.setup_seconds:.1f} s of setup" if report.setup_seconds >= 1 else ""
    log(f"{output}: {report.tensors} tensors edited{kept}{scales}; {report.bytes / 1e9:.2f} GB in {report.seconds:.1f} s{after}{beside}")
    for kind, row in report.simulated.items():
        if row["retained"] is not None:
            log(f"  {kind}: {row['retained']:.1%} would be left, noise {row['noise']:.2f}")
    log(f"next: sku verify {output}; sku eval --model {output} …")


def _progress():
    """A bar on a terminal; nothing in a log, where the one line at the end says it."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    @contextmanager
    def run():
        console = Console(stderr=True)
        columns = (TextColumn("fuse"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("fuse", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    return run()
