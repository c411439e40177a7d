"""DSL: right coefficients and intervals from a model's labels and a hand-labelled random sample (paper 44)."""
