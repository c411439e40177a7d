"""RCAL: a classifier from labels that are both wrong in part and long-tailed.

`noise` makes such labels, `contrast` learns representations without any label, `gaussians` recovers the class
distributions in them, `classifier` trains on representations as they are, `trainer` trains encoder and classifier,
`views` changes images at random.

Source: Zhang, Zhao, Yao, Yuan, Huang, "When Noisy Labels Meet Long Tail Dilemmas: A Representation Calibration
Method", ICCV 2023, arXiv 2211.10955. No code of the authors was found, and the paper's equations were not visible in
what was read: marks [R] in docstrings say what was reconstructed.
"""
