import sys

import pytest
from runs_kit import TEMPLATE, Command, save_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """A folder with a tiny model and its tokenizer, no chat template."""
    return save_model(tmp_path_factory.mktemp("model") / "tiny", tiny_llama(0), tiny_tokenizer)


@pytest.fixture(scope="session")
def chatty(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """The same with a chat template."""
    return save_model(tmp_path_factory.mktemp("model") / "chatty", tiny_llama(0), tiny_tokenizer, TEMPLATE)


@pytest.fixture
def palate(capsys, tmp_path, monkeypatch):
    """The command line, in an empty folder of its own, and without the judges that an earlier test imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "liking", raising=False)
    return Command(capsys)


@pytest.fixture(scope="session")
def ending(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """A folder with a tiny model whose completions end after four tokens or so."""
    import torch

    model = tiny_llama(0)
    with torch.no_grad():  # a coordinate that is the same everywhere speaks for the end token
        model.get_input_embeddings().weight[:, 0] = 1.0
        model.get_output_embeddings().weight[tiny_tokenizer.eos_token_id, 0] = 0.6
    return save_model(tmp_path_factory.mktemp("model") / "ending", model, tiny_tokenizer, TEMPLATE)
