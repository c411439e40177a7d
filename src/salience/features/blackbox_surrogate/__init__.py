"""Columns that a black box on a wide table uses, and a small tree that explains its decisions (paper 38)."""
