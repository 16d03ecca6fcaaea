"""Make PEFT attach what an adapter means: it attaches all that the file holds, and only what has the names of the loaded class.

Open this file when `sku eval` refuses an adapter that `sku fuse` takes, or the two disagree.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sku_vllm.adapter.adapter import LoraAdapter
from sku_vllm.adapter.adapter_keys import factor_key
from sku_vllm.adapter.packed_experts import misread
from sku_vllm.adapter.weight_names import Layout
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.errors import AdapterError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


@contextmanager
def own_weights_kept(model: "torch.nn.Module", adapter: LoraAdapter) -> Iterator[None]:
    """Put the model's own embeddings back after PEFT has put in the adapter's copies of them, which may be rounded."""
    own = [(value, value.detach().clone()) for name, value in model.named_parameters() if name in adapter.copies]
    yield
    for value, before in own:
        value.data.copy_(before)


def check_attachable(adapter: LoraAdapter, reader: CheckpointReader) -> None:
    """Make sure that what PEFT attaches can be subtracted.

    Raises:
        AdapterError: retrained tensors, which would be put in and not subtracted, or experts that PEFT would take the other way round.
    """
    if not adapter.copies and not adapter.stacks:
        return
    layout = Layout(reader)
    retrained = layout.check_copies(adapter)
    if retrained:
        raise AdapterError(f"{adapter.path}: {'; '.join(retrained)}, so it cannot be subtracted; train without them")
    turned = misread(layout.packed(adapter, []), adapter.config)
    if turned:
        raise AdapterError(
            f"{adapter.path}: PEFT {adapter.config.get('peft_version') or 'of an unknown release'} wrote the factors of {turned[0]}, and "
            "the installed one may take them the other way round; sku fuse turns them: fuse it, and give the fused checkpoint"
        )


def fill_missing(model: "PeftModel", adapter: LoraAdapter, reader: CheckpointReader, warnings: Sequence[str]) -> None:
    """Load the factors that PEFT left out since the adapter names their modules as another class, release or wrapper does.

    warnings: what PEFT said while it loaded the adapter.

    Raises:
        AdapterError: the adapter has no factors for some of the modules, which would stay unedited.
    """
    missing = [name for line in warnings if "missing adapter keys" in line for name in re.findall(r"'([^']+)'", line)]
    if not missing:
        return
    layout, file = Layout(reader), CheckpointReader(adapter.file)
    factors = ((factor, key) for key in file.names if (factor := factor_key(key)) is not None)
    stored = {(layout.declared_module(factor.module), factor.side): key for factor, key in factors}
    parameters = dict(model.named_parameters())
    for name in missing:
        factor = factor_key(name)
        key = None if factor is None else stored.get((layout.declared_module(factor.module), factor.side))
        if key is None or file.info(key).shape != tuple(parameters[name].shape):
            raise AdapterError(f"{adapter.path}: has no factors for {name}, which would stay unedited; save it again with PEFT")
        parameters[name].data.copy_(file.mapped(key))
