"""Text in, verdict out. Nothing here loads torch until an `hf:` judge is asked for."""

from sku_vllm.judges.exchange import LABELS, Exchange, Judge, Label, Labeller, Verdict
from sku_vllm.judges.labeller import decide, load_labeller
from sku_vllm.judges.spec import judge_of, load_judge

__all__ = ["LABELS", "Exchange", "Judge", "Label", "Labeller", "Verdict", "decide", "judge_of", "load_judge", "load_labeller"]
