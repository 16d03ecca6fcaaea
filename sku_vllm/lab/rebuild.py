"""Pretrains several models at the same time, each in a process of its own with one thread.

With one thread sums are computed in the same order on every machine, so a seed gives the same model. It is also faster: in so small
a model, two threads would wait for each other at every operation. `python -m sku_vllm.lab.rebuild ARCHITECTURE SEED DIRECTORY
[without-harm]` is the command of such a process; it reports its progress in JSON lines.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sku_vllm.errors import RunError
from sku_vllm.lab.pretrain_bar import Report, progress_of

WITHOUT_HARM = "without-harm"


def rebuild_models(
    seed: int, architectures: Sequence[str], directory: Path, *, harm: bool = True, show: bool = True
) -> dict[str, dict[str, float]]:
    """Pretrain a model of each architecture into `directory/ARCHITECTURE/`. Returns {architecture: its rates from `measure_base`}.

    Raises:
        RunError: a pretraining process failed; the message contains its last line of output.
    """
    running: list[subprocess.Popen[str]] = []
    kind = [] if harm else [WITHOUT_HARM]
    pool = ThreadPoolExecutor(min(len(architectures), os.cpu_count() or 1))
    try:
        with progress_of(architectures, show) as report:
            found = pool.map(lambda name: _follow([name, str(seed), str(directory / name), *kind], report, running), architectures)
            return dict(zip(architectures, found, strict=True))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.kill()


def _follow(arguments: list[str], report: Report, running: list[subprocess.Popen[str]]) -> dict[str, float]:
    name = arguments[0]
    command = [sys.executable, "-m", "sku_vllm.lab.rebuild", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        running.append(process)
        rates: dict[str, float] = {}
        for line in process.stdout or ():
            told = json.loads(line)
            if "rates" in told:
                rates = told["rates"]
            else:
                report(name, told["step"], told["steps"], told["loss"])
        words = (process.stderr.read() if process.stderr else "").strip().splitlines()
    if process.returncode or not rates:
        reason = words[-1] if words else f"exit code {process.returncode}"
        raise RunError(f"pretraining {name} failed: {reason}; start again, with more free memory if it was killed")
    return rates


def _work(name: str, seed: int, directory: Path, harm: bool) -> None:
    from transformers.utils import logging

    from sku_vllm.lab.measure import measure_base
    from sku_vllm.lab.pretrain import pretrain
    from sku_vllm.lab.tokenizer import make_tokenizer, save_tokenizer
    from sku_vllm.lab.world import make_world

    logging.disable_progress_bar()
    world = make_world(seed)
    tokenizer = make_tokenizer(world)

    def tell(step: int, steps: int, loss: float) -> None:
        if step % 10 == 0:
            print(json.dumps({"step": step, "steps": steps, "loss": loss}), flush=True)

    model = pretrain(world, tokenizer, name, harm=harm, progress=tell)
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    print(json.dumps({"rates": measure_base(model, tokenizer, world)}), flush=True)


if __name__ == "__main__":
    _work(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), WITHOUT_HARM not in sys.argv[4:])
