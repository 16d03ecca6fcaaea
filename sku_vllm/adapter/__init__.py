"""Adapters: how PEFT's files are read and negated, the deltas they hold, and which checkpoint tensors each delta is subtracted from."""

from sku_vllm.adapter.adapter import LoraAdapter, load_adapter
from sku_vllm.adapter.negation import negate_adapter

__all__ = ["LoraAdapter", "load_adapter", "negate_adapter"]
