"""What `sku attack` does with its options: read the rows, attack, write the directory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sku_vllm.data import read_rows
from sku_vllm.evaluate.attack import AttackConfig, attack
from sku_vllm.evaluate.columns import column_names
from sku_vllm.evaluate.command import CONFIG_FIELDS
from sku_vllm.evaluate.config import EvalConfig
from sku_vllm.evaluate.recovery import recovery_svg
from sku_vllm.judges import judge_of
from sku_vllm.output import output_directory, record, write_text


def run_attack(kinds: Sequence[str], options: Mapping[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Run `sku attack` with its options by name; `forget` maps names to files. Returns what `--json` prints."""
    columns = column_names(options["columns"])

    def rows(path: str | None, need_response: bool = False) -> list:
        return read_rows(path, columns=columns, need_response=need_response) if path else []

    settings = AttackConfig(
        steps=tuple(sorted(set(options["steps"]))), fractions=tuple(options["fractions"]), lr=options["lr"],
        batch_size=options["relearn_batch_size"], quantizers=tuple(options["quantizer"]), prefill_tokens=options["prefill_tokens"],
    )
    result = attack(
        options["model"], kinds, forget={name: rows(path) for name, path in options["forget"].items()},
        retain=read_rows(options["retain"], columns=columns, safe=True), relearn=rows(options["relearn"], True),
        benign=rows(options["benign"], True), judge=judge_of(options["judge"]), settings=settings, progress=progress,
        config=EvalConfig(**{name: options[name] for name in CONFIG_FIELDS}),
        **{name: options[name] for name in ("adapter", "scale", "base", "dtype", "revision", "any_base", "as_is")},
    )
    if options["output"]:
        with output_directory(options["output"]) as directory:
            if relearned := result["attacks"].get("relearn"):
                write_text(directory / "recovery.svg", recovery_svg(relearned))
            record(directory, "attack", result, {**options, "kinds": list(kinds)})
    return result
