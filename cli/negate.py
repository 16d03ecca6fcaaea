"""`sku negate`: an adapter whose addition subtracts what was identified."""

import click

from sku_vllm.cli.options import log, print_json, sku_command


@sku_command("negate")
@click.option("--adapter", required=True, help="Adapter directory that sku train (or PEFT) wrote.")
@click.option("--scale", type=float, default=1.0, help="Strength of the negation, ≥ 0; 1 subtracts exactly what was trained.")
@click.option("--output", required=True, help="Directory to write; must not exist or be empty.")
@click.option("--as-is", is_flag=True, help="Accept an adapter that is already negated, and negate it again.")
def command(adapter: str, scale: float, output: str, as_is: bool, json_output: bool) -> None:
    """Write an adapter that subtracts the knowledge when PEFT or vLLM adds it.

    \b
    sku negate --adapter ADAPTER --scale 1 --output negated
    """
    from sku_vllm.adapter import negate

    result = negate(adapter, scale, output, as_is=as_is)
    if json_output:
        print_json(result)
    else:
        log(f"{output}: {result['tensors']} tensors, scale {scale:g}; add it with PEFT or vLLM; publish it no more than the raw one")
