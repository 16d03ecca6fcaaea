"""DistillRequest: teacher, data and settings of one distillation, which the command line, benchmarks and Python callers all make."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sku_vllm.data import Row
from sku_vllm.data.rows import rows_digest
from sku_vllm.distill.distill_config import DistillConfig
from sku_vllm.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class DistillRequest:
    """One distillation.

    Attributes:
        teacher: directory or hub id of the unlearned model, such as `sku fuse` writes. revision: of a hub id.
        forget: rows whose prompts the teacher answers; their own answers are never read. retain: rows whose prompts it answers as well.
        output: directory to write, which may not exist yet unless it is empty.
        text: documents that the student also learns the teacher's predictions of, every token of them.
        judge: SPEC of a judge; answers of the teacher that it calls harmful are left out, whatever they answer. Without one, answers
            to forget prompts are used only where the refusal judge calls them refusals.
        pretraining_tokens: tokens that the model was pretrained on, to say what share of that compute this is; None says nothing.
        save_seconds: time between checkpoints. resume: continue what OUTPUT.partial/ holds.

    Raises:
        ConfigError: an invalid field, naming the flag. DataError: no forget or no retain rows.
    """

    teacher: str | Path
    forget: Sequence[Row]
    retain: Sequence[Row]
    output: str | Path
    config: DistillConfig = field(default_factory=DistillConfig)
    text: Sequence[str] = ()
    judge: str | None = None
    pretraining_tokens: int | None = None
    revision: str | None = None
    save_seconds: float = 60.0
    resume: bool = False

    def __post_init__(self) -> None:
        for flag, value in (("--teacher", self.teacher), ("--output", self.output)):
            if not str(value):
                raise ConfigError(f"{flag}: is empty; name a directory")
        for flag, rows in (("--forget", self.forget), ("--retain", self.retain)):
            if not rows:
                raise DataError(f"{flag}: no rows; the teacher needs prompts to answer")
        if self.pretraining_tokens is not None and self.pretraining_tokens < 1:
            raise ConfigError(f"--pretraining-tokens {self.pretraining_tokens}: has to be at least 1")
        if not self.save_seconds >= 0:
            raise ConfigError(f"--save-seconds {self.save_seconds}: has to be 0 or more")

    @property
    def directory(self) -> Path:
        """`output` as a path."""
        return Path(self.output)

    @property
    def rows_digest(self) -> str:
        """sha256 of every row and text that was given, in order: a resumed run has to be given the same again."""
        return rows_digest(self.forget, self.retain, [Row.ask(text) for text in self.text])

    def to_json(self) -> dict[str, Any]:
        """The configuration that `sku_distill.json` records: what affects the result, without the output's path."""
        own = {"teacher": str(self.teacher), "revision": self.revision, "judge": self.judge, "rows": self.rows_digest}
        return {**own, "pretraining_tokens": self.pretraining_tokens, **self.config.to_json()}
