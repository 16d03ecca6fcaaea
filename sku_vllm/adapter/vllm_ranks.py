"""The LoRA ranks that vLLM accepts: training pads adapters to one of them, serving and evaluation start vLLM with the largest they need.

Open this file when vLLM accepts other ranks; a test compares them with the installed vLLM.
"""

# The values of max_lora_rank (vllm/config/lora.py, MaxLoRARanks).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_rank(rank: int) -> int:
    """The smallest rank vLLM accepts that holds `rank`; the largest of all where none does."""
    return next((accepted for accepted in VLLM_RANKS if accepted >= rank), VLLM_RANKS[-1])
