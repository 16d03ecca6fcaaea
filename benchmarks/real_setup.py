"""Setup: what all cells of one table of bench_real share. Open this file to add a flag that decides their numbers."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.evaluate.limits import SCALES
from sku_vllm.methods.train_config import TrainConfig
from sku_vllm.output import write_json

METHODS = ("sku-contrastive-two", "refusal-tune", "sku", "task-vector", "npo", "simnpo", "grad-diff", "rmu", "undial")
OWN, PUBLISHED = "own", "published"


@dataclass(frozen=True, slots=True)
class Setup:
    """Model, data and sizes of a table. A work directory holds cells of one setup only.

    Attributes:
        model: directory of the base. data: directory of rows, see `RealData`. work: where adapters and finished cells are kept.
        judge: SPEC of the judge. world: seed of the lab's world that the base was taught (`--organism`); None for real data.
        forget_answers: "published", those in the file, or "own", the base's compliant ones.
        targets, steps, samples: settings of training (TrainConfig); None takes each method's own.
        forget_rows, retain_rows: most rows to train on. measured: most rows of a set that is tuned or measured on. None takes all.
        scales: that are tried. sampled: sampled answers per forget prompt. max_new_tokens: of an answer. dtype: as in ModelSpec.
        lm_eval: whether to run the tasks in DATA/lm_eval.
    """

    model: Path
    data: Path
    work: Path
    judge: str = "answered"
    world: int | None = None
    forget_answers: str = PUBLISHED
    targets: str = "auto"
    steps: int | None = None
    samples: int | None = None
    forget_rows: int | None = None
    retain_rows: int | None = None
    measured: int | None = None
    scales: tuple[float, ...] = SCALES
    sampled: int = 1
    max_new_tokens: int = 48
    dtype: str = "auto"
    lm_eval: bool = False

    def train_config(self, method: str, seed: int) -> TrainConfig:
        """The settings of one cell's training. Raises ConfigError for an unknown method or a value out of range, naming the flag."""
        return TrainConfig.of(method, seed=seed, targets=self.targets, steps=self.steps, samples=self.samples, dtype=self.dtype)

    def eval_config(self, seed: int = 0) -> EvalConfig:
        """How answers are generated. Raises ConfigError for a value out of range, naming the flag."""
        return EvalConfig(samples=self.sampled, max_new_tokens=self.max_new_tokens, seed=seed)

    def to_json(self) -> dict[str, Any]:
        """What decides the numbers, without the directories of model, data and work."""
        values = {name: value for name, value in asdict(self).items() if name not in ("data", "work")}
        judge = self.judge.partition(":")[0]
        return {**values, "model": self.model.resolve().name, "judge": judge, "scales": list(self.scales)}

    def claim(self) -> None:
        """Note the setup in its work directory. Raises ConfigError if that holds cells of another one, naming what differs."""
        file, mine = self.work / "setup.json", self.to_json()
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else mine
        if changed := sorted(name for name in mine if mine[name] != kept.get(name)):
            name = changed[0]
            raise ConfigError(
                f"--work {self.work}: holds cells with {name} {kept.get(name)}, not {mine[name]}; give the same settings or another --work"
            )
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(file, mine)
