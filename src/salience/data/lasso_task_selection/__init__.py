"""L1-A-MTRL: how many samples to take from every source task so that they serve one target task (paper 42)."""
