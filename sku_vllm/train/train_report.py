"""TrainReport: the results of a training run. Open this file to add something to `sku_train.json`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sku_vllm.errors import SkuError


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a run did; `sku_train.json` and `--json` print it.

    Attributes:
        output: the adapter directory. method: the method's name. base: the model it was trained on. adapter_kind: "lora" or "dense".
        rank: of the adapter that combines all rounds; 0 of a dense task vector. steps: optimizer steps, over all rounds.
        parameters: how many the base has. trainable: how many were trained.
        examples: rows seen. tokens: forward tokens, those of references included.
        seconds: of training alone. peak_memory_bytes: of the process, or of the GPU.
        packed: whether rows were computed without padding.
        losses: each term's unweighted mean over the last tenth of the steps that had it. risen: terms that
            training made worse, and by how many nats (see `Progress.risen`).
        fold_error: relative error of compressing the rounds' ranks to one that vLLM accepts; 0 if that was not needed.
        cut_answers: answers cut off by the length limit. skipped_rows: rows of each set whose prompt leaves no room for an answer within
            it, so that they were left out. refusal_share: share of refusals in what was drawn for a contrastive
            method, or None. targets: where its refusals came from (TrainConfig). looks: what each look at a source found.
        separation: how well the base tells harmful prompts from benign ones (train/probe.py), or None for too few prompts.
        resumed_from: step a resumed run continued at, or None. finished_before: the output existed already, so nothing was trained.
    """

    output: str
    method: str
    base: str
    adapter_kind: str
    rank: int
    steps: int
    parameters: int
    trainable: int
    examples: int
    tokens: int
    seconds: float
    peak_memory_bytes: int
    packed: bool
    losses: dict[str, float]
    fold_error: float
    cut_answers: int
    refusal_share: float | None = None
    targets: str | None = None
    looks: list[dict[str, Any]] | None = None
    separation: dict[str, Any] | None = None
    skipped_rows: dict[str, int] | None = None
    risen: dict[str, float] | None = None
    resumed_from: int | None = None
    finished_before: bool = False

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    @classmethod
    def read_finished(cls, output: Path) -> "TrainReport":
        """The report of a run that was finished before, from its directory.

        Raises:
            SkuError: its sku_train.json cannot be read.
        """
        path = output / "sku_train.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{name: stored.get(name) for name in cls.__slots__} | {"finished_before": True})
        except (OSError, ValueError, TypeError) as error:
            raise SkuError(f"{path}: not readable ({error})") from error
