"""Bias loss, which trusts samples by how varied their features are, and the small network made for it.

`variance` measures the features, `weighted` is the loss, `trainer` puts it under a `transformers.Trainer`,
`diversity` ranks and describes a data set by the same number, `skipblock` holds the network.

Source: Abrahamyan, Ziatchin, Chen, Deligiannis, "Bias Loss for Mobile Neural Networks", ICCV 2021, arXiv 2107.11170;
checked against the authors' published code.
"""
