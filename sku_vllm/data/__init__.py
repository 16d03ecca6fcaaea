"""Forget and retain sets: readers of files, rows, and the prompt template that turns rows into tokens.

Nothing here needs torch; the template works with any Hugging Face tokenizer.
"""

from sku_vllm.data.columns import Columns
from sku_vllm.data.readers import Reading, read_rows, read_source
from sku_vllm.data.rows import Row
from sku_vllm.data.sets import ForgetSet, RetainSet, load_dataset
from sku_vllm.data.template import Encoded, PromptTemplate

__all__ = ["Columns", "Encoded", "ForgetSet", "PromptTemplate", "Reading", "RetainSet", "Row", "load_dataset", "read_rows", "read_source"]
