"""PACE: a mixture model over a vision transformer's patches that explains data set, image and patch at once."""
