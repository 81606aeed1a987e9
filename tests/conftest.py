"""Fixtures that every folder of tests shares: tiny models, a tokenizer, the real data where it is, no network."""

import os
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in [name for name in os.environ if name.startswith("PALATE_") and name != "PALATE_TEST_DATA"]:
    del os.environ[_name]  # a developer's own settings must not steer tests
os.environ["PALATE_REPORT"] = "false"  # a second a run; tests of the page ask for it

import pytest  # noqa: E402

CORPUS = [
    "Once upon a time there was a little girl named Lily. She loved to play outside with her friends.",
    "What is the capital of France? The capital of France is Paris, a city on the river Seine.",
    "def add(a, b):\n    return a + b\n",
    "Yes. No. Perhaps? I do not know; ask someone else: 1, 2, 30 or 45678.",
] * 4


@pytest.fixture(autouse=True)
def cache_dir(tmp_path_factory, monkeypatch) -> Path:
    """The store of scores, empty for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PALATE_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One thread, so that sums come out in the same order every time."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data, $PALATE_TEST_DATA."""
    named = os.environ.get("PALATE_TEST_DATA")
    if not named or not Path(named).is_dir():
        warnings.warn("PALATE_TEST_DATA names no folder: tests on real data are skipped", stacklevel=1)
        pytest.skip("set PALATE_TEST_DATA to the folder of real data")
    return Path(named)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer of 300 tokens with BOS, end and pad; any text decodes to itself."""
    from palate.model.tokenizer import train_tokenizer

    return train_tokenizer(CORPUS, 300)


@pytest.fixture(scope="session")
def tiny_llama():
    """A function from a seed to a fresh Llama of two layers, width 64, 300 tokens, in float32 and eval mode."""

    def make(seed: int = 0, **changes):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = {
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "tie_word_embeddings": False,
        }
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        try:
            return LlamaForCausalLM(LlamaConfig(**(shape | changes))).eval()
        finally:
            torch.random.set_rng_state(state)

    return make


@pytest.fixture
def float64(monkeypatch):
    """Lifts the float32 islands of transformers' forward (norms, softmax, rotary tables) to float64 while it is used.

    They cast with `.to(torch.float32)`, `.float()` and `dtype=torch.float32`; for a float64 model these become
    float64, so that two ways to one number agree to 1e-9 and a difference is a bug rather than rounding.
    """
    import torch
    from torch.nn import functional

    to, softmax, tensor_softmax = torch.Tensor.to, functional.softmax, torch.softmax

    def lifted_to(self, *args, **kwargs):
        if self.dtype == torch.float64:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return to(self, *args, **kwargs)

    def lifted(function):
        def call(*args, **kwargs):
            if args and args[0].dtype == torch.float64 and kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch.Tensor, "to", lifted_to)
    monkeypatch.setattr(
        torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else to(self, torch.float32)
    )
    monkeypatch.setattr(functional, "softmax", lifted(softmax))
    monkeypatch.setattr(torch, "softmax", lifted(tensor_softmax))


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu"):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
