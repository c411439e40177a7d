"""Iterative feature merging: how many different features a layer has, and a network of that many.

Two channels of a hidden width that compute the same thing can be merged without a change of the output, if what
reads them is added up. Merging the closest pairs first, one at a time, without data and without training, shrinks
a network to its distinct features; the widths that are left are the *feature complexity* of its layers.

`merging` is the algorithm, `complexity` the widths over a grid of thresholds, `equivalence` the report on whether two
networks have functionally equivalent features.

Source: Chen, Zhou, Yan, "Going Beyond Neural Network Feature Similarity: The Network Feature Complexity and Its
Interpretation Using Category Theory", ICLR 2024, arXiv 2310.06756.
"""
