"""The representations room: what a network's representation space holds."""
