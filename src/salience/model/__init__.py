"""Read, observe, cut, batch, fit and rewrite models."""
