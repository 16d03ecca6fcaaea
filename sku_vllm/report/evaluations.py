"""The evaluations in a report: which weights each one measured, and whether these are the base, base − adapter or a fused checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sku_vllm.errors import SkuError
from sku_vllm.records import Document, read_json
from sku_vllm.records.rows_file import changed_rows
from sku_vllm.records.schema import check_record

Role = Literal["base", "adapter", "fused", "other"]


@dataclass(frozen=True, slots=True)
class Fused:
    """A fused checkpoint: its `sku fuse` record, identity (see `base_identity`; None without weights), manifest and stored dtype."""

    document: Document
    identity: str | None
    manifest: dict[str, Any]
    dtype: str | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One `sku eval` record.

    identity: of the measured weights; None when it was not recorded (a hub id). checkpoints: names of the fused checkpoints in the
    report that have the same weights. dtype: that it computed in; "auto" where an older record does not say it. rows: the digest of the
    rows of each set, by its name in rows.jsonl; empty where an older record does not say it. changed: a line where the rows.jsonl beside
    the record is not the one it was written with.
    """

    name: str
    role: Role
    model: str
    adapter: str | None
    scale: float | None
    dtype: str
    backend: str
    judges: tuple[str, ...]
    identity: str | None
    forget: dict[str, dict[str, dict[str, Any]]]
    retain: dict[str, Any]
    border: dict[str, dict[str, Any]]
    agreement: list[dict[str, Any]] | None
    directory: Path
    checkpoints: tuple[str, ...] = ()
    rows: dict[str, str] = field(default_factory=dict)
    changed: str | None = None

    @property
    def edited(self) -> bool:
        """Whether knowledge was subtracted from this model."""
        return self.role in ("adapter", "fused")


def evaluations(documents: Sequence[Document], fused: Sequence[Fused]) -> list[Evaluation]:
    """Every `sku_eval.json`, bases first, fused checkpoints last."""
    records = [document for document in documents if document.command == "eval"]
    bases = {str(document.config.get("base")) for document in records if document.config.get("base")}
    bases |= {str(document.config.get("model")) for document in documents if document.command in ("fuse", "tune")}
    bases |= {str(document.data.get("base")) for document in documents if document.command == "train"}
    bases |= {str(document.config.get("model")) for document in records if document.config.get("adapter")}
    found = [_evaluation(document, bases, fused) for document in records]
    return sorted(found, key=lambda evaluation: ("base", "other", "adapter", "fused").index(evaluation.role))


def other_rows(evaluations: Sequence[Evaluation]) -> list[str]:
    """A line for each set of one name that did not hold the same rows in all evaluations that say what they asked."""
    lines = []
    for name in dict.fromkeys(name for evaluation in evaluations for name in evaluation.rows):
        asked: dict[str, list[str]] = {}
        for evaluation in evaluations:
            if name in evaluation.rows:
                asked.setdefault(evaluation.rows[name], []).append(evaluation.name)
        if len(asked) > 1:
            lines.append(f"{name} is one set in {', another in '.join(map(' and '.join, asked.values()))}")
    return lines


def _evaluation(document: Document, bases: set[str], fused: Sequence[Fused]) -> Evaluation:
    config = document.config
    identity, model = config.get("model_identity"), str(config.get("model", ""))
    same = tuple(one.document.name for one in fused if _same(one, identity, model, document.directory))
    if config.get("adapter"):
        role: Role = "adapter"
    elif same:
        role = "fused"
    else:
        role = "base" if model in bases else "other"
    judge = config.get("judge") or ()
    return Evaluation(
        name=document.name,
        role=role,
        model=model,
        adapter=config.get("adapter"),
        scale=(config.get("scale") if config.get("scale") is not None else 1.0) if config.get("adapter") else None,
        dtype=str(config.get("computed_in") or config.get("dtype") or "auto"),
        backend=str(config.get("backend") or "transformers"),
        judges=(judge,) if isinstance(judge, str) else tuple(judge),
        identity=identity,
        forget=document.data.get("forget") or {},
        retain=document.data.get("retain") or {},
        border=document.data.get("border") or {},
        agreement=document.data.get("agreement"),
        directory=document.directory,
        checkpoints=same if role == "fused" else (),
        rows=document.data.get("row_digests") or {},
        changed=changed_rows(document.directory, document.data),
    )


def _same(checkpoint: Fused, identity: str | None, model: str, beside: Path) -> bool:
    """Whether an evaluation measured this checkpoint: by identity if both are known, else by the model's path.

    The path may be relative to the working directory or to any directory above the record (`beside`).
    """
    if identity and checkpoint.identity:
        return identity == checkpoint.identity
    target = checkpoint.document.directory.resolve()
    return any((place / model).resolve() == target for place in (Path(), *beside.resolve().parents)) if model else False


def read_fused(document: Document) -> Fused:
    """The checkpoint in the directory of a `sku_fuse.json`. Its identity is computed now, since the weights may have been changed."""
    place = document.directory
    manifest: dict[str, Any] = {}
    if (file := place / "sku_manifest.json").is_file():
        manifest = read_json(file)
        check_record(file, "manifest", manifest)
    config = read_json(place / "config.json") if (place / "config.json").is_file() else {}
    written = manifest.get("dtype")
    dtype = written if written not in (None, "keep") else config.get("dtype") or config.get("torch_dtype")
    return Fused(document, checkpoint_identity(place), manifest, dtype)


def checkpoint_identity(directory: Path) -> str | None:
    """The identity of the weights now in a directory; None where there are none."""
    from sku_vllm.checkpoint.reader import base_identity

    try:
        return base_identity(directory)
    except (SkuError, OSError):
        return None
