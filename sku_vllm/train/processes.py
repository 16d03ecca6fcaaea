"""Start the processes of a run (one, or those of `accelerate launch`), their tracker, and the output directory that they share.

Open this file to see what `--tracker` starts, or which process writes.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sku_vllm.errors import ConfigError
from sku_vllm.output import output_directory, partial_path
from sku_vllm.train import sharding
from sku_vllm.train.saving import PRIVATE

if TYPE_CHECKING:
    from accelerate import Accelerator


def start_accelerator(tracker: str | None, output: Path) -> "Accelerator":
    """Make the Accelerator of this run, with a tracker if one is named; tensorboard and wandb log to OUTPUT.logs/.

    Raises:
        ConfigError: FSDP1 or DeepSpeed was asked for, or a tracker that is unknown, not installed, or cannot be started.
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    sharding.check_launch()
    places = ProjectConfiguration(project_dir=str(output.parent), logging_dir=str(output.parent / f"{output.name}.logs"))
    try:
        accelerator = Accelerator(log_with=tracker, project_config=places)
    except ValueError as error:
        raise ConfigError(f"--tracker {tracker}: {error}") from error
    if tracker:
        _start_tracker(accelerator, tracker)
    sharding.shard_on_cpu(accelerator)
    return accelerator


def _start_tracker(accelerator: "Accelerator", tracker: str) -> None:
    if not accelerator.log_with:
        raise ConfigError(f"--tracker {tracker}: not installed; pip install {tracker}")
    logs = Path(accelerator.logging_dir)
    logs.mkdir(parents=True, exist_ok=True)  # without it wandb silently uses another directory
    try:
        accelerator.init_trackers("sku", init_kwargs={"wandb": {"dir": str(logs)}})
    except Exception as error:  # each tracker raises its own exceptions without a login or server
        raise ConfigError(f"--tracker {tracker}: cannot be started ({(str(error) or type(error).__name__).splitlines()[0]})") from error


def main_process_says(accelerator: "Accelerator", answer: bool) -> bool:
    """The main process's answer, for every process: clocks differ between them, and all have to do the same."""
    if accelerator.num_processes == 1:
        return answer
    import torch
    from accelerate.utils import broadcast

    return bool(broadcast(torch.tensor(int(answer), device=accelerator.device)).item())


class SharedDirectory:
    """`output_directory` on the main process; the others wait until the partial directory exists, and until it is renamed."""

    def __init__(self, output: Path, resume: bool, accelerator: "Accelerator") -> None:
        self.output, self.accelerator = output, accelerator
        self.partial = partial_path(output)
        self.directory = output_directory(output, resume=resume, keep=True, mode=PRIVATE) if accelerator.is_main_process else None

    def __enter__(self) -> Path:
        if self.directory:
            self.directory.__enter__()
        self.accelerator.wait_for_everyone()
        return self.partial

    def __exit__(self, *error: Any) -> None:
        if self.directory:
            self.directory.__exit__(*error)
        if error[0] is None:
            self.accelerator.wait_for_everyone()
