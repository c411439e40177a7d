"""The data room: which training samples, steps and tasks matter."""

from salience._lazy import exports

_WHERE: dict[str, str] = {}
__all__ = list(_WHERE)
__getattr__, __dir__ = exports(__name__, _WHERE)
