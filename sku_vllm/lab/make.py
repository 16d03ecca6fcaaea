"""Writes the lab to a directory: models and data of one world, copied from the package or made anew."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from sku_vllm.errors import ConfigError
from sku_vllm.lab.architectures import ARCHITECTURES
from sku_vllm.lab.corpus import Row, forget_sets, retain_sets
from sku_vllm.lab.world import make_world
from sku_vllm.output import check_output, output_directory, record, write_json, write_text

SHIPPED_SEED = 0
SHIPPED = ("llama", "opt")


def lab_data() -> Path:
    """The folder of the package data: `models/llama/`, `models/opt/`, and `rates.json` with the shipped models' measured rates."""
    return Path(__file__).resolve().parent


def make_lab(
    output: str | Path,
    *,
    rebuild: bool = False,
    seed: int = SHIPPED_SEED,
    architectures: Sequence[str] = SHIPPED,
    harm: bool = True,
    progress: bool = True,
) -> Path:
    """Write models, forget and retain sets and the lexicon to `output`, and return its path. docs/contracts.md ("Lab") has the layout.

    Without `rebuild` the shipped models (seed 0, llama and opt) are copied, in well under a second. With it tokenizer and models
    are trained again: about seven minutes for two models on two cores. Another seed gives another world, with other words,
    sentences and splits. Without `harm` the models are pretrained on no harmful recipe, only on refusals of harmful prompts: oracles, which
    show what relearning brings to a model that never had the knowledge. Data and lexicon are the same.

    Raises:
        ConfigError: `output` is not empty, an architecture is unknown, or models that are not shipped are wanted without `rebuild`.
    """
    _check(rebuild, seed, architectures, harm)
    check_output(output)
    world = make_world(seed)
    with output_directory(output) as directory:
        rates = _rebuild(seed, architectures, directory, harm, progress) if rebuild else _copy(architectures, directory)
        for name, rows in forget_sets(world).items():
            write_rows(directory / "forget" / f"{name}.jsonl", rows)
        for name, rows in retain_sets(world).items():
            write_rows(directory / "retain" / f"{name}.jsonl", rows)
        write_json(directory / "lexicon.json", world.lexicon)
        config = {"rebuild": rebuild, "seed": seed, "architectures": list(architectures), "without_harm": not harm}
        record(directory, "lab", {"seed": seed, "unseen_topics": list(world.unseen_topics), "models": rates}, config)
    return Path(output)


def _check(rebuild: bool, seed: int, architectures: Sequence[str], harm: bool) -> None:
    unknown = [name for name in architectures if name not in ARCHITECTURES]
    if unknown or not architectures:
        raise ConfigError(f"--architecture {', '.join(unknown) or '(none)'}: choose from {', '.join(ARCHITECTURES)}")
    if not rebuild and not harm:
        raise ConfigError(
            "--without-harm: the shipped models know the harmful recipes; add --rebuild to pretrain models that never read them"
        )
    if not rebuild and (seed != SHIPPED_SEED or not set(architectures) <= set(SHIPPED)):
        raise ConfigError(
            f"--seed {seed}, --architecture {', '.join(architectures)}: only {' and '.join(SHIPPED)} of seed {SHIPPED_SEED} are shipped; "
            "add --rebuild to pretrain others"
        )


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSONL."""
    path.parent.mkdir(exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _copy(architectures: Sequence[str], directory: Path) -> dict[str, dict[str, float]]:
    rates = json.loads((lab_data() / "rates.json").read_text(encoding="utf-8"))
    for name in architectures:
        # File modes are not copied: an installed package's files may be read-only, but users may want to change a lab's.
        shutil.copytree(lab_data() / "models" / name, directory / name, copy_function=shutil.copyfile)
    return {name: rates[name] for name in architectures}


def _rebuild(seed: int, architectures: Sequence[str], directory: Path, harm: bool, progress: bool) -> dict[str, dict[str, float]]:
    from sku_vllm.lab.rebuild import rebuild_models

    return rebuild_models(seed, architectures, directory, harm=harm, show=progress)
