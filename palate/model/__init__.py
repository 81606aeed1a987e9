"""Any causal model of the transformers library: loaded, named by its weights, given adapters. We write none of our own."""
