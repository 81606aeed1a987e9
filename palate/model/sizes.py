"""Configs of small Llamas by their size, for `new:SIZE`: what a laptop trains in minutes to hours."""

from typing import Any


def _llama(vocab: int, width: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """A config.json. The special tokens are those of `train_tokenizer`, which learns the vocabulary from the data."""
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


# the name is the number of parameters, embeddings counted, to 5 %
SIZES = {
    "1m": _llama(2048, 128, 352, 4, 4, 2),
    "5m": _llama(4096, 256, 640, 6, 8, 4),
    "20m": _llama(8192, 512, 1280, 6, 8, 4),
}
