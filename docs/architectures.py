"""Writes docs/architectures.md: how every causal family of transformers is scored, tried on a tiny model of each.

`python docs/architectures.py` takes half a minute. A family's config is its own default with small numbers in it, so
that a new family needs no line here unless its numbers hang together.
"""

import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

from palate.errors import ModelError
from palate.model.recurrent import stateful_layers
from palate.scoring import support

VOCABULARY = 300
MOST_LAYERS = 4

# the names under which configs keep a number, and the small one
SMALL = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "attention_hidden_size", "emb_dim"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "d_ff", "dff"), 64
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "kv_channels", "d_kv", "d_head"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 256),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    "num_expert_group": 1,
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "local_attention"), 5),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_linear_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    "mamba_d_ssm": 64,
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    "attention_chunk_size": 6,
    "index_topk": 4,
    "rotary_dim": 4,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "zero_expert_num": 2,
    "expert_ffn_hidden_size": 32,
}
DERIVED = ("head_dim", "num_key_value_heads")  # of which a default may be none
INTRODUCTION = """\
# Architectures

Written by `python docs/architectures.py` with transformers {version}: what the probe of `palate.scoring.support`, which
every model goes through, finds on a tiny random model of each causal family. {shared} of {rows} families are scored on
one stream with each prompt once, {stateful} of them with layers that carry a state along the text (linear attention,
state spaces, short convolutions); {fallback} fall back, {refused} are refused, and {not} have no small model.

- **shared**: each prompt once; loss and gradients equal one stock forward a row (float64, 1e-9:
  `tests/model/test_architectures.py`). A layer with a state runs over the prompt once and every branch goes on from its
  state; one that takes no state for more than one token (Mamba, Falcon Mamba, Jamba, Zamba, MiniMax) runs over the
  prompt again for every branch, it alone.
- **fallback (padded)**: padded rows through the stock forward, the head on scored positions alone. Its cost: a prompt
  is computed once a completion, and pads are computed. CPU time of forward and backward over that of the shared path,
  the same model forced onto padded rows (8 layers, width 256, two pairs a stream, median of 3 streams),
  prompts of about 350 tokens with completions of 35 / 180 with 300: Qwen3-Next 1.7 / 1.7, Qwen3.5 1.7 / 1.5,
  LFM2 1.7 / 1.5, Llama 1.9 / 1.7.
- **fallback (plain)**: as before, and the model's own full logits, for a family that changes what its head gets.
- **refused**: no log-probs that could be trusted, in the probe's own words, before anything is trained.

| family | scored | layers | why |
|---|---|---|---|
"""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_blocks")
# what hangs together otherwise, or is nothing by default
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_INDEXER = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=4)
OWN: dict[str, dict] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32},
    },
    "deepseek_v2": _EXPERTS,
    "dory": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "layer_types": None,
    },
    "dots1": _EXPERTS,
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "helium": {"head_dim": 8},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds": False},
    "xlnet": {"d_head": 8},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}


def small(default: PreTrainedConfig) -> dict:
    """The options of a small config of the same kind, one layer of each sort that the default has."""
    found = default.to_dict()
    options = {name: value for name, value in SMALL.items() if isinstance(found.get(name), int)}
    options |= {name: SMALL[name] for name in DERIVED if name in found}
    if isinstance(found.get("kv_lora_rank"), int):  # latent attention has as many keys as queries
        options["num_key_value_heads"] = 4
    layers = next((found[name] for name in LAYERS if isinstance(found.get(name), int)), None)
    if layers is not None:
        lists = {
            name: value
            for name, value in found.items()
            if isinstance(value, list) and len(value) == layers and name not in options
        }
        sorts = list(zip(*lists.values(), strict=True)) or [()] * layers
        kept = sorted({str(sort): place for place, sort in reversed(list(enumerate(sorts)))}.values())[:MOST_LAYERS]
        kept += [place for place in range(layers) if place not in kept][: max(0, 2 - len(kept))]
        options |= {name: [value[place] for place in kept] for name, value in lists.items()}
        options |= {name: len(kept) for name in LAYERS if isinstance(found.get(name), int)}
    for name, value in found.items():
        if name.endswith(("_token_id", "_token_index")) and value is not None:
            ordinary = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            options[name] = ordinary.get(name, VOCABULARY - 1)
    if "is_decoder" in found:
        options["is_decoder"] = True
    for name in getattr(default, "sub_configs", {}):
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            options[name] = small(part) | {"model_type": part.model_type}
    return options | OWN.get(default.model_type, {})


def build(family: str) -> nn.Module:
    """A tiny random model of the family, in eval mode, its weights spread so that layouts matter."""
    kind = CONFIG_MAPPING[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**small(kind()))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def traits(model: nn.Module) -> str:
    """What its layers are: how many attend, with a window or sinks, carry a state, choose among experts."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    paths = [name for name, _ in model.named_modules()]
    found = {
        "window": any("sliding" in kind for kind in kinds) or (not kinds and getattr(config, "sliding_window", None)),
        "state": bool(stateful_layers(model)),
        "experts": any(path.endswith("experts") for path in paths),
        "sinks": any("sink" in name for name in names),
        "soft cap": bool(getattr(config, "attn_logit_softcapping", None)),
        "latent keys": config.to_dict().get("kv_lora_rank") is not None,
    }
    return ", ".join(name for name, there in found.items() if there)


def row(family: str) -> tuple[str, str, str]:
    """(how it is scored, what its layers are, why not on a shared stream) of a family."""
    try:
        model = build(family)
    except Exception as error:  # whatever a config that was not meant for it raises
        return "not tried", "", f"no small model: {_first_line(error)}"
    try:
        found = support(model)
    except ModelError as error:
        return "refused", traits(model), _first_line(error)
    return {"shared": "shared"}.get(found.path, f"fallback ({found.path})"), traits(model), _first_line(found.reason)


def _first_line(said: object) -> str:
    """The first line, without measured digits, which differ from machine to machine."""
    text = next((line for line in str(said).splitlines() if line.strip()), "")
    return (
        re.sub(r" by [\d.e+-]+ nats a token", "", text).partition(" [E")[0].replace("|", "/").removeprefix("shared: ")
    )


def page(rows: dict[str, tuple[str, str, str]]) -> str:
    """docs/architectures.md."""
    counts = Counter(path.split()[0] for path, _, _ in rows.values())
    stateful = sum(path == "shared" and "state" in layers for path, layers, _ in rows.values())
    lines = "".join(f"| `{family}` | {' | '.join(cell or '-' for cell in cells)} |\n" for family, cells in rows.items())
    return INTRODUCTION.format(version=transformers.__version__, rows=len(rows), stateful=stateful, **counts) + lines


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found = {family: row(family) for family in sys.argv[1:] or FAMILIES}
    if sys.argv[1:]:
        sys.stdout.writelines(f"{family}: {'; '.join(cells)}\n" for family, cells in found.items())
    else:
        (Path(__file__).parent / "architectures.md").write_text(page(found), encoding="utf-8")
