"""Real quantisers that are calibrated on text, layer by layer: GPTQ by gptqmodel, AWQ by llmcompressor.

They read and write checkpoints, so the model under attack is on disk for as long as that takes, in a directory that only this user can read
and that is removed whatever happens.
"""

import importlib.util
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku_vllm.errors import ConfigError
from sku_vllm.fuse.check_quantisers import CALIBRATED

BITS, GROUP, TEXTS = 4, 128, 128


def check_installed(name: str) -> None:
    """Raise ConfigError, naming the extra, if the package of a calibrated quantiser is missing."""
    if importlib.util.find_spec(CALIBRATED[name]) is None:
        raise ConfigError(f"--quantizer {name}: needs {CALIBRATED[name]}; install it with: pip install 'sku-vllm[{name}]'")


@contextmanager
def calibrated(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[PreTrainedModel]:
    """The model quantised to four bits, as transformers loads what the quantiser wrote.

    texts: what it is calibrated on; the first TEXTS are used.
    """
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory(prefix="sku-attack-") as place:
        Path(place).chmod(stat.S_IRWXU)
        source, target = Path(place) / "edited", Path(place) / "quantised"
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        _QUANTISE[name](source, target, list(texts[:TEXTS]))
        loaded = AutoModelForCausalLM.from_pretrained(target, device_map={"": model.device}, use_safetensors=True)
        yield loaded.eval()


def _gptq(source: Path, target: Path, texts: list[str]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]

    loaded = GPTQModel.load(str(source), QuantizeConfig(bits=BITS, group_size=GROUP))
    loaded.quantize(texts, batch_size=1)
    loaded.save(str(target))


def _awq(source: Path, target: Path, texts: list[str]) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.awq import AWQModifier  # type: ignore[import-not-found]

    recipe = AWQModifier(targets=["Linear"], scheme="W4A16", ignore=["lm_head"])
    data = Dataset.from_dict({"text": texts})
    oneshot(model=str(source), dataset=data, recipe=recipe, output_dir=str(target), num_calibration_samples=len(texts))


_QUANTISE: dict[str, Any] = {"gptq": _gptq, "awq": _awq}
