"""Dataset distillation by non-critical region refinement (NRR-DD).

`activation` tells the critical pixels of an image, `discovery` takes the patches to start from, `refinement` rewrites
the pixels that are not critical, `views` mixes the images that a student sees, `labels` holds what the teacher says of
these (two distances, or soft labels), `distilled` is the result on disk, `distilling` runs all of it.

Source: Tran, Le, Le, Do, Phung, "Enhancing Dataset Distillation via Non-Critical Region Refinement", CVPR 2025, arXiv
2503.18267. Its published code could not be obtained; what it builds on, RDED (Sun et al., CVPR 2024), was read in full.
"""
