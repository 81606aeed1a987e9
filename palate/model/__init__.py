"""Any causal model of the transformers library: loaded, named by its weights, given adapters. None is our own."""

from typing import Any, TypeAlias

# A transformers model, or peft's wrapper around one. Of an nn.Module, type checkers take every attribute for a tensor.
Model: TypeAlias = Any
