"""Perplexity-based importance refinement: drop functional steps of a trace that its answer does not need."""
