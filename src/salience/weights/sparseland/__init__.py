"""Sparse networks: before, during and after training, with the accounting that makes them comparable.

A mask M of zeros and ones stands over each weight W of a linear or convolution layer; biases and normalisation stay
dense. The parts combine freely:

`densities` says how many weights each layer keeps, `scoring` which ones matter, `masking` turns both into masks,
`training` holds or moves masks while somebody's own loop trains, `tickets` rewinds, `structured` removes whole
channels, and `accounting` counts entries, operations and bytes.

Source: Liu, Wang, "Ten Lessons We Have Learned in the New 'Sparseland': A Short Handbook for Sparse Neural Network
Researchers", 2023, arXiv 2302.02596, and the papers of the methods that it surveys.
"""
