"""`sku verify`: check the files of a fused checkpoint against its manifest."""

import click

from sku_vllm.cli.options import log, print_json, sku_command


@sku_command("verify", no="something differs, is missing or was added")
@click.argument("directory")
@click.option("--signing-key", type=click.Path(dir_okay=False), help="Key file given to sku fuse: also check the manifest's signature.")
def command(directory: str, signing_key: str | None, json_output: bool) -> None:
    """Check every file of a fused checkpoint against its manifest, and name those that differ.

    \b
    sku verify safer
    """
    from sku_vllm.checkpoint.manifest import verify_checkpoint

    result = verify_checkpoint(directory, signing_key)
    if json_output:
        print_json(result)
    else:
        aside = f"; left aside: {', '.join(result['aside'])}" if result["aside"] else ""
        log(f"{directory}: {result['files']} files, {result['bytes'] / 1e9:.2f} GB, all as the manifest says{aside}")
