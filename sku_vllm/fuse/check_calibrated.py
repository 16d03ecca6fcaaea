"""`sku fuse --check gptq,awq`: base and fused checkpoint are both quantised, and the edited weights of the two compared.

Open this file to change what is measured of a quantiser that is calibrated on text.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sku_vllm.adapter.delta import matrix_shape
from sku_vllm.adapter.placement import Placed, terms_of
from sku_vllm.adapter.transformers_names import names_of
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.data import PromptTemplate, read_rows
from sku_vllm.fuse.calibrated_quantisers import quantised, weight_of
from sku_vllm.kernels.delta_merge import MergeStats
from sku_vllm.kernels.delta_merge.reference import sum_terms
from sku_vllm.model import load_tokenizer
from sku_vllm.quantize import left_of


def calibration_texts(file: str | Path, model: Path) -> list[str]:
    """Prompts with their answers, as the model sees them. file: rows in any form that is read, such as the retain set."""
    template = PromptTemplate.of(load_tokenizer(model))
    return [template.prompt_text(row) + (row.response or "") for row in read_rows(file)]


def check_calibrated(
    kind: str, reader: CheckpointReader, fused: Path, placed: Mapping[str, Sequence[Placed]], texts: Sequence[str]
) -> dict[str, MergeStats]:
    """How much of the edit is left in each edited tensor that is the weight of a linear layer; others are left out.

    Args:
        kind: of CALIBRATED. fused: the directory of the fused checkpoint. placed: the edits, by tensor.

    Raises:
        RunError: the quantiser failed.
    """
    with quantised(kind, reader.directory, texts) as model:
        before = {name: weight.cpu().clone() for name, weight in _weights(model, reader, placed)}
    found: dict[str, MergeStats] = {}
    with quantised(kind, fused, texts) as model:
        for name, after in _weights(model, reader, placed):
            if name in before:
                rows, columns = matrix_shape(reader.info(name).shape)
                delta = torch.empty(rows, columns, dtype=torch.float32)
                sum_terms([term for edit in placed[name] for term in terms_of(edit, 0, rows)], 0, delta)
                found[name] = left_of(delta, before[name].float() - after.cpu().float())
    return found


def _weights(model: torch.nn.Module, reader: CheckpointReader, edited: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    from transformers.pytorch_utils import Conv1D

    names = names_of(reader)
    alone = {} if names is None else {found[0][0]: name for name, found in names.sources.items() if len(found) == 1 and not found[0][1]}
    modules = dict(model.named_modules())
    for tensor in edited:
        parameter = alone.get(tensor, tensor)
        module = modules.get(parameter.removesuffix(".weight"))
        weight = None if module is None else weight_of(module)
        if weight is not None and names is not None and names.stored_in_by_out(parameter) and not isinstance(module, Conv1D):
            weight = weight.T  # a quantiser's layer is [out, in], in place of GPT-2's [in, out]
        if weight is not None and tuple(weight.shape) == tuple(reader.info(tensor).shape):
            yield tensor, weight
