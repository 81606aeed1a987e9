"""Teach a language model what people prefer: preference pairs in, a better model and the evidence out.

The public names, in the order data meets them. Each is imported when it is first asked for, so `import palate` is
quick and `palate --help` needs no torch.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    # records: text as people wrote it
    "read_pairs": "palate.data.sources",
    "read_demonstrations": "palate.data.sources",
    "read_feedback": "palate.data.sources",
    "read_prompts": "palate.data.sources",
    "doctor": "palate.data.doctor",
    "Message": "palate.data.records",
    "Demonstration": "palate.data.records",
    "PreferencePair": "palate.data.records",
    "Feedback": "palate.data.records",
    "Ranking": "palate.data.records",
    # models
    "load": "palate.model.load",
    "save": "palate.model.load",
    "add_lora": "palate.model.adapters",
    # tokens
    "tokenize": "palate.data.tokens",
    "tokenize_pair": "palate.data.tokens",
    "tokenize_demonstration": "palate.data.tokens",
    "tokenize_feedback": "palate.data.tokens",
    "tokenize_ranking": "palate.data.tokens",
    "annotate": "palate.reference",
    # batches
    "stream": "palate.data.stream",
    "collate": "palate.data.batch",
    "collate_pairs": "palate.data.batch",
    "collate_rankings": "palate.data.batch",
    "collate_feedback": "palate.data.batch",
    # log-probs and losses
    "token_logps": "palate.scoring",
    "sequence_logps": "palate.scoring",
    "LOSSES": "palate.losses",
    "PairLogps": "palate.losses",
    "RankedLogps": "palate.losses",
    "FeedbackLogps": "palate.losses",
    "pairwise_loss": "palate.losses",
    # steps
    "pairwise": "palate.train.objectives",
    "ranked": "palate.train.objectives",
    "feedback": "palate.train.objectives",
    "completion_nll": "palate.train.objectives",
    "reward": "palate.train.objectives",
    "ppo": "palate.train.objectives",
    "OptimConfig": "palate.train.optim",
    "TrainState": "palate.train.loop",
    "steps": "palate.train.loop",
    "Ranks": "palate.distributed",
    "evaluate": "palate.evaluation.preference",
    "generate": "palate.sampling.generate",
    "open_judge": "palate.sampling.judge",
    "best_of": "palate.sampling.best_of",
    "PalateError": "palate.errors",
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604, the names are all text


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'palate' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__():
    return sorted(__all__)
