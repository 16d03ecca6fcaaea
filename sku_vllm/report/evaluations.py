"""The evaluations in a report: which model each one judged, and what part that model plays."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sku_vllm.errors import SkuError
from sku_vllm.report.collect import Document, read_json
from sku_vllm.report.shape import MANIFEST, check_shape

Role = Literal["base", "adapter", "fused", "other"]


@dataclass(frozen=True, slots=True)
class Fused:
    """A fused checkpoint: what wrote it, its identity (sha256 as in the contracts), its manifest and the dtype it is stored in."""

    document: Document
    identity: str | None
    manifest: dict[str, Any]
    dtype: str | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One `sku eval`. `identity` is the judged weights' identity; None when it was not recorded (a hub id).

    `checkpoints` are the names of the fused checkpoints that hold the judged weights.
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
    agreement: list[dict[str, Any]] | None
    directory: Path
    checkpoints: tuple[str, ...] = ()

    @property
    def edited(self) -> bool:
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
        dtype=str(config.get("dtype") or "auto"),
        backend=str(config.get("backend") or "transformers"),
        judges=(judge,) if isinstance(judge, str) else tuple(judge),
        identity=identity,
        forget=document.data.get("forget") or {},
        retain=document.data.get("retain") or {},
        agreement=document.data.get("agreement"),
        directory=document.directory,
        checkpoints=same if role == "fused" else (),
    )


def _same(checkpoint: Fused, identity: str | None, model: str, beside: Path) -> bool:
    """By identity where both are known, else by path: as given, or relative to a directory above the record."""
    if identity and checkpoint.identity:
        return identity == checkpoint.identity
    target = checkpoint.document.directory.resolve()
    return any((place / model).resolve() == target for place in (Path(), *beside.resolve().parents)) if model else False


def read_fused(document: Document) -> Fused:
    """The checkpoint beside a `sku_fuse.json`, as it lies there now."""
    place = document.directory
    manifest = read_json(place / "sku_manifest.json") if (place / "sku_manifest.json").is_file() else {}
    check_shape(place / "sku_manifest.json", manifest, MANIFEST)
    config = read_json(place / "config.json") if (place / "config.json").is_file() else {}
    written = manifest.get("dtype")
    dtype = written if written not in (None, "keep") else config.get("dtype") or config.get("torch_dtype")
    return Fused(document, checkpoint_identity(place), manifest, dtype)


def checkpoint_identity(directory: Path) -> str | None:
    """The identity of the weights that lie there now; None where there are none any more."""
    from sku_vllm.checkpoint import base_identity

    try:
        return base_identity(directory)
    except (SkuError, OSError):
        return None
