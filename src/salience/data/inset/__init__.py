"""INSET: learn to pick the best subset of a set, with a utility that sees the subset and the set it came from.

`utility` is F(S; V), `recognition` the amortised start of the mean-field steps, `selector` what all selectors share,
`model` the method, `baselines` what it is compared with, `training` the loop, `examples` makers of training data,
`exact` the distribution by enumeration.

Source: Xie and others, "Enhancing Neural Subset Selection: Integrating Background Information into Set
Representations", ICLR 2024, arXiv 2402.03139, over EquiVSet: Ou and others, "Learning Neural Set Functions Under the
Optimal Subset Oracle", NeurIPS 2022, arXiv 2203.01693, whose published code was read.
"""
