"""TrainRequest: the model, data and settings of one training run, which the command line, the demo and Python callers all make.

Open this file to see what `train_adapter` and `estimate_run` take.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sku_vllm.data import ForgetSet, RetainSet, Row
from sku_vllm.errors import ConfigError
from sku_vllm.methods.train_config import TrainConfig

SAVE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """One training run.

    Attributes:
        model: directory or hub id of the base. revision: of a hub id; None takes the hub's default branch.
        forget: harmful prompts and answers. retain: benign ones to keep; None for methods that need none.
        output: directory to write, which may not exist yet unless it is empty.
        config: the method and its settings.
        refusals: rows whose responses refuse, for refusal-tune and for contrastive methods, which otherwise find refusals themselves.
        border: benign prompts in the style of the forget set, which contrastive methods keep the base's answers to.
        tracker: tensorboard or wandb, logging to OUTPUT.logs/, or mlflow, logging to where MLFLOW_TRACKING_URI says.
        save_seconds: time between checkpoints.
        resume: continue what OUTPUT.partial/ holds.

    Raises:
        ConfigError: an invalid field, naming the flag.
    """

    model: str | Path
    forget: ForgetSet
    retain: RetainSet | None
    output: str | Path
    config: TrainConfig = field(default_factory=TrainConfig.of)
    refusals: Sequence[Row] = ()
    border: Sequence[Row] = ()
    revision: str | None = None
    tracker: str | None = None
    save_seconds: float = SAVE_SECONDS
    resume: bool = False

    def __post_init__(self) -> None:
        if not str(self.model):
            raise ConfigError("--model: is empty; name a model directory or hub id")
        if not str(self.output):
            raise ConfigError("--output: is empty; name a directory that does not exist yet")
        if not isinstance(self.forget, ForgetSet):
            raise ConfigError(f"--forget: {type(self.forget).__name__} instead of a ForgetSet; make one with load_dataset(rows, 'forget')")
        if not isinstance(self.retain, RetainSet | None):
            raise ConfigError(f"--retain: {type(self.retain).__name__} instead of a RetainSet; make one with load_dataset(rows, 'retain')")
        _check_refusals(self.refusals)
        if not self.save_seconds >= 0:
            raise ConfigError(f"--save-seconds {self.save_seconds}: has to be 0 or more")

    @property
    def directory(self) -> Path:
        """`output` as a path."""
        return Path(self.output)


def _check_refusals(rows: Sequence[Row]) -> None:
    """Raise ConfigError if the refusal judge does not call every response a refusal."""
    from sku_vllm.judges.refusal import is_refusal

    other = [(number, row) for number, row in enumerate(rows, 1) if not is_refusal(row.response or "")]
    if other:
        number, row = other[0]
        raise ConfigError(
            f"--refusals: {len(other)} of {len(rows)} responses are no refusals to the refusal judge, first "
            f"that of row {row.id or number}; reword or drop them"
        )
