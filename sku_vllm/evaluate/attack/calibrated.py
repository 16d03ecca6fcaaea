"""Real quantisers that are calibrated on text, on the model under attack: GPTQ by gptqmodel, AWQ by llmcompressor.

They read checkpoints, so the model is on disk for as long as that takes, in a directory that only this user can read and that is removed
whatever happens.
"""

import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku_vllm.fuse.calibrated_quantisers import quantised


@contextmanager
def calibrated(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[PreTrainedModel]:
    """The model quantised to four bits, as its quantiser or transformers loads it. texts: what it is calibrated on."""
    with tempfile.TemporaryDirectory(prefix="sku-attack-") as place:
        Path(place).chmod(stat.S_IRWXU)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        with quantised(name, Path(place), texts) as loaded:
            yield loaded.to(model.device)
