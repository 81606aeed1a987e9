"""Tiny random models of every family that the tests speak of, and the float64 truth they are held against."""

from contextlib import contextmanager

import numpy as np
import torch
import transformers
from torch import nn

from palate.data.tokens import TokenGroup

VOCABULARY = 300
_LLAMA = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GPT = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=256, bos_token_id=1, eos_token_id=2)
_MHA = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}

# name -> (config class, options); windows are shorter than the texts of the tests
FAMILIES = {
    "llama": ("LlamaConfig", _LLAMA),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", _LLAMA | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", _LLAMA | {"head_dim": 16, "sliding_window": 5}),
    "gemma3": (
        "Gemma3TextConfig",
        _LLAMA | {"head_dim": 16, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": ("GPT2Config", _GPT),
    "gpt_neox": ("GPTNeoXConfig", _MHA),
    "phi": ("PhiConfig", _MHA),
    "mistral": ("MistralConfig", _LLAMA | {"sliding_window": 5}),
    "olmo": ("OlmoConfig", _MHA),
    "gpt_oss": (
        "GptOssConfig",
        _LLAMA
        | {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "cohere": ("CohereConfig", _LLAMA),
    "granite": ("GraniteConfig", _LLAMA | {"logits_scaling": 3.0}),
}
FALLBACK = {
    "gpt_neo": (
        "GPTNeoConfig",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 256}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    ),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}),
    "falcon_alibi": ("FalconConfig", _MHA | {"alibi": True}),
}


def build(name: str, seed: int = 0, dtype=torch.float32) -> nn.Module:
    """A random model of the family in eval mode; its weights are spread so that layouts matter."""
    kind, options = (FAMILIES | FALLBACK)[name]
    config = getattr(transformers, kind)(**options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def random_group(generator: np.random.Generator, prompt: int, *completions: int, **fields) -> TokenGroup:
    """A group of random ids, every completion token scored."""
    draw = lambda n: generator.integers(3, VOCABULARY, n).astype(np.int32)  # noqa: E731
    return TokenGroup(
        draw(prompt),
        tuple(draw(n) for n in completions),
        tuple(((0, n),) for n in completions),
        preferences=fields.pop("preferences", ((0, 1),) if len(completions) == 2 else ()),
        **fields,
    )


def truth(model: nn.Module, group: TokenGroup, k: int) -> list[float]:
    """Log-probs of completion k's scored tokens: one stock forward of the one row, log-softmax in float64."""
    prompt, ids = group.prompt.tolist(), group.completions[k].tolist()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0].double()
    logps = logits.log_softmax(-1)
    at = len(prompt)
    scored = [i for start, stop in group.spans[k] for i in range(start, stop) if at + i > 0]
    return [float(logps[at + i - 1, ids[i]]) for i in scored]


def totals(model: nn.Module, groups) -> np.ndarray:
    """Summed `truth` of every completion, in order."""
    return np.array([sum(truth(model, g, k)) for g in groups for k in range(len(g.completions))])


@contextmanager
def lifted():
    """float64 all the way: transformers' float32 islands (norms, rotary tables, softmax) follow their input's dtype."""

    def wide(original):
        def widened(x, *args, **kwargs):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
                kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
            return original(x, *args, **kwargs)

        return widened

    places = [(torch.Tensor, name) for name in ("to", "type", "sum", "softmax")]
    places += [(torch, "sum"), (torch, "softmax"), (torch.nn.functional, "softmax")]
    before = [(place, name, getattr(place, name)) for place, name in places]
    float_ = torch.Tensor.float
    for place, name, original in before:
        setattr(place, name, wide(original))
    torch.Tensor.float = lambda self, *a, **k: self if self.dtype == torch.float64 else float_(self, *a, **k)
    try:
        yield
    finally:
        torch.Tensor.float = float_
        for place, name, original in before:
            setattr(place, name, original)
