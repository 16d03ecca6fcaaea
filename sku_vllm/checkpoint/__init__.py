"""Checkpoints on disk: reading safetensors files, the identity of a base model, and the manifest of a fused checkpoint."""

from sku_vllm.checkpoint.reader import CheckpointReader, base_identity, checkpoint_directory

__all__ = ["CheckpointReader", "base_identity", "checkpoint_directory"]
