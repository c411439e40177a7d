"""CRAFT: concepts, their importance, sub-concepts and maps of them (paper 21)."""
