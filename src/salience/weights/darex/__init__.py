"""DARE and its extremes: keep one percent of what fine-tuning changed, and still have the fine-tuned model.

deltas.py       drop entries of a delta: at random, by importance, by column; deltas of LoRA adapters
rescaling.py    by what to divide the entries that were kept: the bound, its best q, the search
pruner.py       the estimator: choose q on data, prune a model in memory
adamr.py        the optimiser that decays towards the pre-trained weights
diagnosis.py    how large a delta is, and which method is recommended for it
pairing.py      which tensor of a base belongs to which of the fine-tuned model, where their heads differ
directories.py  prune and merge model directories block by block
delta_file.py   pruned deltas as a file of their own

Source: Deng, Zhao, Vakilian, Chen, Li, Thrampoulidis, "DARE the Extreme: Revisiting Delta-Parameter Pruning For
Fine-Tuned Models", ICLR 2025 (arXiv 2410.09344).
"""
