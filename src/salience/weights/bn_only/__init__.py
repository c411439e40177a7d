"""Train only a chosen part of a network, above all its normalisation scales and shifts: BN-only training.

Every weight stays at its random value; only gamma and beta of each channel c learn:

    y = gamma_c (x - mu_c) / sqrt(var_c + eps) + beta_c

How far that gets, against as many weights chosen at random in each channel, tells what random features can
express; the gammas that training drives to zero tell which of them it switches off.

`select` chooses and trains, `gammas` initialises and reads the scales, `resnet` is the paper's network.

Source: Frankle, Schwab, Morcos, "Training BatchNorm and Only BatchNorm: On the Expressive Power of Random
Features in CNNs", ICLR 2021, arXiv 2003.00152.
"""
