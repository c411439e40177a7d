"""The weights room: which layers, weights and deltas matter."""

from salience._lazy import exports

_WHERE: dict[str, str] = {}
__all__ = list(_WHERE)
__getattr__, __dir__ = exports(__name__, _WHERE)
