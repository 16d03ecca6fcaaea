"""The exceptions of sku_vllm.

    SkuError                 anything this package raises on purpose
    ├── InputError           exit 2: what the user gave cannot be used; names file, key or flag, and the remedy
    │   ├── ConfigError      a flag, a YAML key, a preset, a method, an arm
    │   ├── DataError        rows, lexicons, tokenizers, judged text (with the line or row number)
    │   ├── CheckpointError  a model directory or one of its tensors
    │   └── AdapterError     an adapter directory, or an adapter that does not fit its base
    ├── NegativeResult       exit 1: the run was sound and its answer is no (mismatch, no scale qualifies, alarm)
    └── RunError             exit 3: the run failed
        ├── DivergenceError  training went NaN or exploded; the last good adapter is kept
        └── JudgeError       a judge could not be reached or answered nonsense

The command line prints the message as one line and exits with `exit_code`; `--debug` shows the traceback.
"""


class SkuError(Exception):
    exit_code = 3


class InputError(SkuError):
    exit_code = 2


class ConfigError(InputError):
    pass


class DataError(InputError):
    pass


class CheckpointError(InputError):
    pass


class AdapterError(InputError):
    pass


class NegativeResult(SkuError):
    exit_code = 1


class RunError(SkuError):
    exit_code = 3


class DivergenceError(RunError):
    pass


class JudgeError(RunError):
    pass
