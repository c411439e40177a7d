"""The features room: which inputs and columns matter."""
