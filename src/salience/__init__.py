"""salience: find out what matters in your data and your model, act on it, and prove that it helped."""

from salience._lazy import exports

__version__ = "0.1.0"
__all__ = ["Scores", "__version__"]

__getattr__, __dir__ = exports(__name__, {"Scores": "scores"})
