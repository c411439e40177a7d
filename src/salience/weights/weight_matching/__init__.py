"""Line up the hidden units of networks that were trained apart, merge them, and see why the merge works.

spec.py        which axes of which tensors carry one permutation: inferred by running the model
matching.py    find the permutations: from weights, from activations, with a straight-through estimator
merging.py     interpolation, loss barrier, merging of two and more, batch normalisation afterwards
alignment.py   which singular directions got aligned, how far apart the weights are, the second-order prediction

Source: Ito, Yamada, Kumagai, "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching", ICLR 2025
(arXiv 2402.04051); the search is that of Ainsworth, Hayase, Srinivasa, "Git Re-Basin" (arXiv 2209.04836).
"""
