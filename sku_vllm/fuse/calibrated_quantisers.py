"""Quantisers of record that are calibrated on text, layer by layer: GPTQ by gptqmodel, AWQ by llmcompressor, both to four bits.

They read and write checkpoints, so what they quantise lies on disk a second time for as long as that takes, in a directory that only this
user can read and that is removed whatever happens. Open this file to add a quantiser of this kind.
"""

import contextlib
import importlib.util
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sku_vllm.errors import ConfigError, RunError, SkuError
from sku_vllm.fuse.check_quantisers import CALIBRATED

BITS, GROUP, TEXTS = 4, 128, 128


def check_installed(name: str, flag: str) -> None:
    """Raise ConfigError, naming the extra, if the package of a calibrated quantiser is missing. flag: that asked for it."""
    if importlib.util.find_spec(CALIBRATED[name]) is None:
        raise ConfigError(f"{flag} {name}: needs {CALIBRATED[name]}; install it with: pip install 'sku-vllm[{name}]'")


@contextlib.contextmanager
def quantised(name: str, source: Path, texts: Sequence[str]) -> Iterator[Any]:
    """The checkpoint in `source`, with its tokenizer, quantised: a model of transformers, whose linear layers are the quantiser's.

    Args:
        texts: what it is calibrated on; the first TEXTS are used.

    Raises:
        RunError: the quantiser failed.
    """
    with tempfile.TemporaryDirectory(prefix="sku-quantise-") as place:
        Path(place).chmod(stat.S_IRWXU)
        try:
            model = QUANTISE[name](source, Path(place) / "quantised", list(texts[:TEXTS])).eval()
        except (KeyboardInterrupt, SkuError):
            raise
        except Exception as error:  # whatever another package raises
            said = str(error).splitlines()[0] if str(error) else ""
            raise RunError(f"{name}: {CALIBRATED[name]} failed on this model ({type(error).__name__}: {said})") from error
        yield model


def weight_of(module: Any) -> Tensor | None:
    """What a linear layer of any quantiser multiplies with, [out, in]; None for a module that has no such weight."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 2:
        return weight.detach()
    with torch.no_grad():
        if hasattr(module, "dequantize_weight"):  # gptqmodel's layers; [in, out]
            values: Tensor = module.dequantize_weight()
            return values.T
        if not hasattr(module, "in_features"):
            return None
        bias, module.bias = getattr(module, "bias", None), None  # each product is then one weight, unrounded by a sum
        columns: Tensor = module(torch.eye(module.in_features))
        module.bias = bias
    return columns.T


def _gptq(source: Path, target: Path, texts: list[str]) -> Any:
    from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]

    source = source.absolute()
    with contextlib.chdir(target.parent):  # it writes logs where it runs
        loaded = GPTQModel.load(str(source), QuantizeConfig(bits=BITS, group_size=GROUP))
        loaded.quantize(texts, batch_size=1)
        loaded.save(str(target))
        return GPTQModel.load(str(target)).model


def _awq(source: Path, target: Path, texts: list[str]) -> Any:
    from datasets import Dataset
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.awq import AWQModifier  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    recipe = AWQModifier(targets=["Linear"], scheme="W4A16", ignore=["lm_head"])
    data = Dataset.from_dict({"text": texts})
    oneshot(model=str(source), dataset=data, recipe=recipe, output_dir=str(target), num_calibration_samples=len(texts))
    return AutoModelForCausalLM.from_pretrained(target, use_safetensors=True)


# from (checkpoint, where to write, texts) to the quantised model
QUANTISE: dict[str, Callable[[Path, Path, list[str]], Any]] = {"gptq": _gptq, "awq": _awq}
