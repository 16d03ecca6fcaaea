"""`sku negate`: write the negated adapter, which subtracts the knowledge when PEFT or vLLM adds it."""

import click

from sku_vllm.cli.options import log, print_json, sku_command
from sku_vllm.cli.tuned import MISSING_ADAPTER, read_choice, tuned_option
from sku_vllm.errors import ConfigError


@sku_command("negate")
@click.option("--adapter", help="Adapter directory that sku train (or PEFT) wrote.")
@click.option("--scale", type=float, show_default="1.0", help="Strength of the negation, ≥ 0; 1 subtracts exactly what was trained.")
@tuned_option()
@click.option("--model", help="Base of an adapter that carries whole tensors along; they have to be its own.")
@click.option("--output", required=True, help="Directory to write; must not exist or be empty.")
@click.option("--as-is", is_flag=True, help="Accept an adapter that is already negated, and negate it again.")
def command(
    adapter: str | None, scale: float | None, tuned: str | None, model: str | None, output: str, as_is: bool, json_output: bool
) -> None:
    """Write an adapter that subtracts the knowledge when PEFT or vLLM adds it.

    \b
    sku negate --adapter ADAPTER --scale 1 --output negated
    sku negate --tuned TUNED --output negated
    """
    if tuned:
        choice = read_choice(tuned, {"--adapter": adapter, "--scale": scale})
        adapter, scale = choice.adapter, choice.scale
    elif not adapter:
        raise ConfigError(MISSING_ADAPTER)
    from sku_vllm.adapter.negation import negate_adapter

    strength = 1.0 if scale is None else scale
    result = negate_adapter(adapter, strength, output, as_is=as_is, model=model)
    if json_output:
        print_json(result)
    else:
        log(f"{output}: {result['tensors']} tensors, scale {strength:g}; add it with PEFT or vLLM; like the raw adapter, never publish it")
