"""The report of a distillation (what `--json` prints), and the manifest and README of the checkpoint.

Open this file to change a number that is reported, or how compute is counted.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sku_vllm.checkpoint.manifest import MANIFEST
from sku_vllm.distill.distill_request import DistillRequest
from sku_vllm.output import write_text

# A backward pass costs twice a forward pass (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), so a trained token counts three.
TRAINED = 3


@dataclass(frozen=True, slots=True)
class DistillReport:
    """What `sku distill --json` prints.

    Attributes:
        teacher_identity: base identity of the teacher. base_identity: of the model its manifest says it was made from, else the same.
        rows: what was learned from, by kind; left_out: drawn answers that were not used; skipped_rows: prompts without room, by set.
        trained_tokens: went forward and backward through the student. teacher_tokens: forward through the teacher beside them.
        drawn_tokens: forward through the teacher while it answered.
        compute: all of them as forward tokens, a trained one counted three times. pretraining_share: compute / (3 · pretraining tokens).
        loss: KL to the teacher, mean of the last tenth of the steps, nats per answer token; first_loss: of the first step.
        resumed_from: step of the checkpoint it continued from, or None.
    """

    output: str
    teacher: str
    teacher_identity: str
    base_identity: str
    alpha: float | None
    steps: int
    parameters: int
    rows: dict[str, int]
    left_out: dict[str, int]
    skipped_rows: dict[str, int]
    trained_tokens: int
    teacher_tokens: int
    drawn_tokens: int
    compute: int
    pretraining_share: float | None
    first_loss: float
    loss: float
    seconds: float
    peak_memory_bytes: int
    resumed_from: int | None = None

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self)

    @classmethod
    def read_finished(cls, directory: Path) -> "DistillReport":
        """The report in a finished directory's `sku_distill.json`."""
        found = json.loads((directory / "sku_distill.json").read_text(encoding="utf-8"))
        return cls(**{name: found[name] for name in cls.__slots__})


def compute_of(trained: int, drawn: int) -> int:
    """Forward tokens that a distillation is worth: the teacher computes every trained token once as well."""
    return (TRAINED + 1) * trained + drawn


def share_of(compute: int, pretraining_tokens: int | None) -> float | None:
    """Compute as a share of that of pretraining."""
    return None if pretraining_tokens is None else compute / (TRAINED * pretraining_tokens)


def made_from(teacher: Path, identity: str) -> dict[str, Any]:
    """What the teacher's manifest says it was made from, for the student's own: base, adapters and their scales."""
    file = teacher / MANIFEST
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {"base_identity": found.get("base_identity", identity), "adapters": found.get("adapters", [])}


def build_manifest(report: DistillReport, request: DistillRequest, lineage: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The manifest without its digests of files. It has no times and no paths, so that the same inputs give the same bytes."""
    config = request.config
    start = {"fresh": True} if config.fresh else {"alpha": config.alpha, "layer_alphas": config.layer_alphas, "noise_std": config.noise_std}
    return {
        "schema": "sku.manifest/1",
        **lineage,
        "dtype": dtype,
        "rounding": "nearest",
        "backend": "distill",
        "tensors": {},
        "distilled": {"teacher_identity": report.teacher_identity, **start, "steps": report.steps, "seed": config.seed},
    }


def write_card(partial: Path, report: DistillReport) -> None:
    """README.md of the checkpoint: what it was distilled from, and what has to be measured."""
    start = "fresh weights" if report.alpha is None else f"{report.alpha:g} of the teacher's weights and noise"
    write_text(
        partial / "README.md",
        "# A checkpoint distilled from an unlearned model\n\n"
        f"Written by `sku distill`: teacher (identity `{report.teacher_identity[:16]}…`), student begun as {start}, "
        f"{report.steps} steps on the teacher's own answers.\n\n"
        "`sku verify` checks these files against `sku_manifest.json`. Whether the knowledge is gone has to be measured:\n"
        "run `sku attack relearn` and `sku eval` on this directory before you rely on it.\n",
    )
