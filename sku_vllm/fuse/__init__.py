"""base − scale·delta, written shard by shard as a checkpoint that loads like its base."""

from sku_vllm.fuse.fuse import fuse_checkpoint
from sku_vllm.fuse.fuse_report import FuseReport
from sku_vllm.fuse.fuse_request import FuseRequest, read_layer_scales

__all__ = ["FuseReport", "FuseRequest", "fuse_checkpoint", "read_layer_scales"]
