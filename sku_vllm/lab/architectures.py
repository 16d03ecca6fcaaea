"""Small configurations of plain Hugging Face architectures; transformers is imported only when one is asked for."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Width 128 in 4 heads of 32 (vLLM's CPU attention takes heads of 32, 64, 80, …), untied (vLLM on CPU cannot swap tied
# weights): 0.9M parameters, 3.7 MB in float32, so that what the demo prints carries no rounding of its own.
WIDTH, HEADS, LAYERS, POSITIONS = 128, 4, 3, 512


def _llama(ids: dict[str, int]) -> "PretrainedConfig":
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, num_hidden_layers=LAYERS, intermediate_size=336,
        max_position_embeddings=POSITIONS, tie_word_embeddings=False, **ids,
    )


def _opt(ids: dict[str, int]) -> "PretrainedConfig":
    from transformers import OPTConfig

    return OPTConfig(
        hidden_size=WIDTH, word_embed_proj_dim=WIDTH, num_attention_heads=HEADS, num_hidden_layers=LAYERS, ffn_dim=4 * WIDTH,
        max_position_embeddings=POSITIONS, dropout=0.0, attention_dropout=0.0, tie_word_embeddings=False, **ids,
    )


def _qwen3(ids: dict[str, int]) -> "PretrainedConfig":
    from transformers import Qwen3Config

    return Qwen3Config(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS // 2, head_dim=WIDTH // HEADS, num_hidden_layers=LAYERS,
        intermediate_size=384, max_position_embeddings=POSITIONS, tie_word_embeddings=False, **ids,
    )


def _gpt_neox(ids: dict[str, int]) -> "PretrainedConfig":
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=LAYERS, intermediate_size=4 * WIDTH,
        max_position_embeddings=POSITIONS, tie_word_embeddings=False, **ids,
    )


# name: configuration from {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}
ARCHITECTURES: dict[str, Callable[[dict[str, int]], "PretrainedConfig"]] = {
    "llama": _llama, "opt": _opt, "qwen3": _qwen3, "gpt-neox": _gpt_neox,
}
