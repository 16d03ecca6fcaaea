"""The configurations of the lab's models: small ones of standard Hugging Face architectures. Open this file to add an architecture."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Width 128 in 4 heads of 32 (vLLM's CPU attention takes heads of 32, 64, 80, …), embeddings untied (vLLM on CPU cannot swap tied
# ones): 0.9M parameters. At 3.7 MB they can be shipped in float32, so rounding does not affect the demo's numbers.
WIDTH, HEADS, LAYERS, POSITIONS = 128, 4, 3, 512


def _llama(ids: dict[str, Any]) -> "PretrainedConfig":
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_hidden_layers=LAYERS,
        intermediate_size=336,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        **ids,
    )


def _opt(ids: dict[str, Any]) -> "PretrainedConfig":
    from transformers import OPTConfig

    return OPTConfig(
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        ffn_dim=4 * WIDTH,
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        **ids,
    )


def _qwen3(ids: dict[str, Any]) -> "PretrainedConfig":
    from transformers import Qwen3Config

    return Qwen3Config(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        head_dim=WIDTH // HEADS,
        num_hidden_layers=LAYERS,
        intermediate_size=384,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        **ids,
    )


def _gpt_neox(ids: dict[str, Any]) -> "PretrainedConfig":
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        **ids,
    )


# name: configuration from {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}
ARCHITECTURES: dict[str, Callable[[dict[str, Any]], "PretrainedConfig"]] = {
    "llama": _llama,
    "opt": _opt,
    "qwen3": _qwen3,
    "gpt-neox": _gpt_neox,
}
