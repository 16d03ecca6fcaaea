"""Forget and retain sets: readers, prompt template, answer masks, packing.

`read_rows` and the sets need no torch; the template works with any Hugging Face tokenizer.
"""

from sku_vllm.data.readers import read_rows
from sku_vllm.data.rows import Row
from sku_vllm.data.sets import ForgetSet, RetainSet, load_dataset
from sku_vllm.data.template import Encoded, PromptTemplate

__all__ = ["Encoded", "ForgetSet", "PromptTemplate", "RetainSet", "Row", "load_dataset", "read_rows"]
