"""`salience reproduce`."""


def reproduce() -> None:
    """Measure a paper's claim on this machine."""
