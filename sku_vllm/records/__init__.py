"""Reading the records that commands write, `sku_<command>.json`: finding them, checking them, and the choice of `sku tune`."""

from sku_vllm.records.document import Document, collect, read_json
from sku_vllm.records.schema import schema_names, schema_of
from sku_vllm.records.tuned import Tuned, note_tuned, read_tuned, tuned_arm

__all__ = ["Document", "Tuned", "collect", "note_tuned", "read_json", "read_tuned", "schema_names", "schema_of", "tuned_arm"]
