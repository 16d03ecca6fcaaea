"""What `sku attack` does with its options: read the rows, attack, write the directory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sku_vllm.data import read_rows
from sku_vllm.evaluate.attack import AttackConfig, attack
from sku_vllm.evaluate.columns import column_names
from sku_vllm.evaluate.command import CONFIG_FIELDS
from sku_vllm.evaluate.config import EvalConfig
from sku_vllm.evaluate.recovery import recovery_svg
from sku_vllm.evaluate.unfinished import measuring_directory
from sku_vllm.judges import judge_of
from sku_vllm.output import record, write_text


def run_attack(kinds: Sequence[str], options: Mapping[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Run `sku attack` with its options by name; `forget` maps names to files. Returns what `--json` prints."""
    columns = column_names(options["columns"])

    def rows(path: str | None, need_response: bool = False) -> list:
        return read_rows(path, columns=columns, need_response=need_response) if path else []

    settings = AttackConfig(
        steps=tuple(sorted(set(options["steps"]))), fractions=tuple(options["fractions"]), lr=options["lr"],
        batch_size=options["relearn_batch_size"], quantizers=tuple(options["quantizer"]), prefill_tokens=options["prefill_tokens"],
    )
    config, judge = EvalConfig(**{name: options[name] for name in CONFIG_FIELDS}), judge_of(options["judge"])
    forget = {name: rows(path) for name, path in options["forget"].items()}
    retain = read_rows(options["retain"], columns=columns, safe=True)
    relearn, benign = rows(options["relearn"], True), rows(options["benign"], True)
    options = {**options, "kinds": list(kinds)}
    with measuring_directory(options, *forget.values(), retain, relearn, benign) as directory:
        result = attack(
            options["model"], kinds, forget=forget, retain=retain, relearn=relearn, benign=benign, judge=judge, config=config,
            settings=settings, kept=directory, progress=progress,
            **{name: options[name] for name in ("adapter", "scale", "base", "dtype", "revision", "any_base", "as_is")},
        )
        if directory:
            if relearned := result["attacks"].get("relearn"):
                write_text(directory / "recovery.svg", recovery_svg(relearned))
            record(directory, "attack", result, {key: value for key, value in options.items() if key != "resume"})
    return result
