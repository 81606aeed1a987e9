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
    """The command line, in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return Command(capsys)
