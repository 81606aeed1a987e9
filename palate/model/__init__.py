"""Any causal model of the transformers library: loaded, named by its weights, given adapters. None is our own."""
