"""Erasure: an unlearned model is distilled into a damaged copy of itself, without what suppression leaves in the weights."""

from sku_vllm.distill.distill import distill_checkpoint
from sku_vllm.distill.distill_config import DistillConfig
from sku_vllm.distill.distill_report import DistillReport
from sku_vllm.distill.distill_request import DistillRequest

__all__ = ["DistillConfig", "DistillReport", "DistillRequest", "distill_checkpoint"]
