"""How complex the features of a network are, when they are learned, where they flow, and how much they matter."""
