"""Three checks of a concept explanation: the probe set, how well concepts can be learned, and how many there are."""
