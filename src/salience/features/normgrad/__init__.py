"""Saliency from any layer: extract a spatial contribution, aggregate its channels, fuse layers.

Source: Rebuffi, Fong, Ji and Vedaldi, "There and Back Again: Revisiting Backpropagation Saliency Methods",
CVPR 2020 (arXiv 2004.02866).
"""
