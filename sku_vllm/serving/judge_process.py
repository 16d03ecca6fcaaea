"""The judge in a process of its own, which may be slow, hang or die without costing a request anything.

In the server's process a judge would hold the interpreter lock for up to 5 ms at a time (0.2 ms an answer for the built-in
detectors alone), and a classifier's threads would compete with the engine's.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO, Any

from sku_vllm.errors import ConfigError, JudgeError
from sku_vllm.judges import Exchange, Verdict, load_labeller
from sku_vllm.serving.launch import die_with_parent

NICE = 10
PAUSE = 1.0


class JudgeProcess:
    """A labeller that asks the process; begun anew by the next batch when it has died. Used by one thread at a time.

    Raises:
        ConfigError: from the constructor, for a SPEC that cannot be loaded.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.process = self._start()

    def __call__(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Raises JudgeError when the judge fails on this batch, or its process is gone."""
        if self.process.poll() is not None:
            time.sleep(PAUSE)  # a judge that cannot live is not begun a thousand times a second
            self.process = self._start()
        try:
            write(self.process.stdin, [[each.prompt, each.response] for each in exchanges])
            answer = read(self.process.stdout)
        except (OSError, EOFError) as error:
            self.process.kill()
            self.process.wait()
            raise JudgeError("the judge's process is gone; the next batch begins another one") from error
        if isinstance(answer, str):
            raise JudgeError(answer)
        return [Verdict(*each) for each in answer]

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "sku_vllm.serving.judge_process", self.spec]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            refused = read(process.stdout)
        except EOFError as error:
            raise JudgeError(f"--judge {self.spec}: its process ended while it was loading") from error
        if refused:
            process.wait()
            raise ConfigError(refused)
        return process


def write(pipe: IO[bytes] | None, value: Any) -> None:
    assert pipe is not None
    pipe.write(json.dumps(value).encode() + b"\n")
    pipe.flush()


def read(pipe: IO[bytes] | None) -> Any:
    """One line of JSON. Raises EOFError at the end."""
    assert pipe is not None
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return json.loads(line)


def main(spec: str) -> None:
    """Batches on stdin, verdicts on stdout, until stdin ends. An error is a string: its kind only, since messages may quote text."""
    die_with_parent()
    os.nice(NICE)
    out, sys.stdout = sys.stdout.buffer, sys.stderr  # a judge that prints must not be taken for its verdicts
    try:
        labeller = load_labeller(spec)
    except Exception as error:
        return write(out, str(error) or type(error).__name__)
    write(out, "")
    for line in sys.stdin.buffer:
        try:
            verdicts = labeller([Exchange(*each) for each in json.loads(line)])
            write(out, [[each.label, each.harmful, each.refusal, each.gibberish] for each in verdicts])
        except Exception as error:
            write(out, type(error).__name__)


if __name__ == "__main__":
    main(sys.argv[1])
