"""Importance-aware sparse tuning (IST): learn which layers matter while you tune, and update only a few of them.

Each layer i has a score s_i, which says how well the network does without what tuning gave that layer; its
importance is ``I_i = -s_i``. Every few steps some layers are damped in trials without gradient, and layers whose
damping hurts less than the average trial's go up in s. At every step the layers that train are drawn by
``sigmoid(-s)``; all others have no gradient, and whatever lies below the lowest drawn layer needs no backward pass.

`damping` finds the layers of a model and damps what was tuned in them, `tuning` learns and draws, `callback` puts
that under the `Trainer` of transformers, and `ablation` measures what the scores estimate.

Source: Yao, Gao, Li, Zhao, Wang, Wang, Zhu, "Layer-wise Importance Matters: Less Memory for Better Performance in
Parameter-efficient Fine-tuning of Large Language Models", Findings of EMNLP 2024, arXiv 2410.11772.
"""
