"""The exceptions of sku_vllm.

    SkuError                 base of every exception that this package raises deliberately
    ├── InputError           exit 2: an input cannot be used; the message names file, key or flag, and the remedy
    │   ├── ConfigError      a wrong flag, YAML key, preset, method or arm (one model of a traffic split)
    │   ├── DataError        wrong rows, lexicon, tokenizer or judged text (with the line or row number)
    │   ├── CheckpointError  an unusable model directory, or one of its tensors
    │   └── AdapterError     an unusable adapter directory, or an adapter that does not fit its base
    ├── NegativeResult       exit 1: the command worked, and the result is negative (files differ, no scale qualifies, an alarm)
    └── RunError             exit 3: the run failed
        ├── DivergenceError  a loss or gradient stopped being finite; the last good adapter is kept
        └── JudgeError       a judge could not be reached, or its reply could not be used
            └── UnreadableReply  the judge answered, but with no verdict; other answers may well get one

The command line prints the message as one line and exits with `exit_code`; `--debug` shows the traceback. Open this file to see
what a caller can catch.
"""

import difflib
from collections.abc import Sequence


class SkuError(Exception):
    """Base of every exception that this package raises deliberately."""

    exit_code = 3


class InputError(SkuError):
    """An input cannot be used; the message names file, key or flag, and the remedy."""

    exit_code = 2


class ConfigError(InputError):
    """A wrong flag, YAML key, preset, method or arm (one model of a traffic split)."""


class DataError(InputError):
    """Wrong rows, lexicon, tokenizer or judged text; the message has the line or row number."""


class CheckpointError(InputError):
    """An unusable model directory, or one of its tensors."""


class AdapterError(InputError):
    """An unusable adapter directory, or an adapter that does not fit its base."""


class NegativeResult(SkuError):
    """The command worked, and the result is negative: files differ, no scale qualifies, a monitor raised an alarm."""

    exit_code = 1


class RunError(SkuError):
    """The run failed."""

    exit_code = 3


class DivergenceError(RunError):
    """A loss or gradient stopped being finite; the last good adapter is kept."""


class JudgeError(RunError):
    """A judge could not be reached, or its reply could not be used."""


class UnreadableReply(JudgeError):
    """The judge answered, but with no verdict; other answers may well get one."""


def nearest(word: str, choices: Sequence[str]) -> str:
    """The end of an error about an unknown name: `; did you mean 'X'?` for a close match, else the list of choices."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; choose from {', '.join(sorted(choices))}"
