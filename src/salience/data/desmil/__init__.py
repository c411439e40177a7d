"""Sample weights that make a recommender's several interests independent, and the recommender trained with them.

`dependence` measures how far vectors depend on each other, `weighting` learns one weight per sample from it,
`extractors` are the multi-interest networks, `recommender` trains them, `sequences` splits and measures.

Source: Liu, Luo, Zeng, Liu, Chang, Kong, Chen, "Improving Multi-Interest Network with Stable Learning", arXiv
2207.07910. Its equations could not be read: the method joins the published code of its two foundations, ComiRec (Cen et
al., KDD 2020) and stable learning (Zhang et al., CVPR 2021).
"""
