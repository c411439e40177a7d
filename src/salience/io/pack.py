"""Plain data as bytes and back, without pickle: what a ledger keeps of a unit.

    8 bytes: length of the JSON text | JSON text | buffers

The JSON text is the data with every array, byte string and table replaced by the place of its buffer. Objects of
the classes that a caller names go in by their `state()` and come back through `of_state`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

_MARK = "$"  # key of what stands for something that JSON has no form for


def pack(value: Any, kinds: Sequence[type] = ()) -> bytes:
    """Turn plain data into bytes: numbers, strings, bytes, None, arrays, Arrow tables, lists, dicts, and `kinds`.

    Tuples come back as lists.

    Raises
    ------
    TypeError
        Something else is in it.
    """
    buffers: list[Any] = []
    names = {kind: kind.__name__ for kind in kinds}

    def keep(kind: str, buffer: Any, *facts: Any) -> dict[str, Any]:
        buffers.append(buffer)
        return {_MARK: [kind, memoryview(buffer).nbytes, *facts]}

    def plain(item: Any) -> Any:
        if type(item) in names:
            return {_MARK: [names[type(item)]], "state": plain(item.state())}
        if isinstance(item, np.ndarray):
            return keep("array", np.ascontiguousarray(item).reshape(-1).view(np.uint8), item.dtype.str, item.shape)
        if isinstance(item, bytes):
            return keep("bytes", item)
        if isinstance(item, pa.Table):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, item.schema) as stream:
                stream.write_table(item)
            return keep("table", sink.getvalue())
        if isinstance(item, np.generic):
            return item.item()
        if isinstance(item, list | tuple):
            return [plain(part) for part in item]
        if isinstance(item, dict):
            return {name: plain(part) for name, part in item.items()}
        if item is None or isinstance(item, str | int | float):
            return item
        raise TypeError(f"a {type(item).__name__} cannot be packed")

    text = json.dumps(plain(value), ensure_ascii=False).encode("utf-8")
    return b"".join([len(text).to_bytes(8, "little"), text, *buffers])


def unpack(data: bytes, kinds: Sequence[type] = ()) -> Any:
    """What `pack` made of it; arrays are read-only views of `data`."""
    length = int.from_bytes(data[:8], "little")
    position = 8 + length
    named = {kind.__name__: kind for kind in kinds}

    def rich(item: Any) -> Any:
        nonlocal position
        if isinstance(item, list):
            return [rich(part) for part in item]
        if not isinstance(item, dict):
            return item
        if _MARK not in item:
            return {name: rich(part) for name, part in item.items()}
        kind, *facts = item[_MARK]
        if kind in named:
            return named[kind].of_state(rich(item["state"]))  # type: ignore[attr-defined]
        start, position = position, position + facts[0]
        if kind == "array":
            return np.frombuffer(data, np.uint8, facts[0], start).view(facts[1]).reshape(facts[2])
        piece = data[start:position]
        return piece if kind == "bytes" else pa.ipc.open_stream(piece).read_all()

    return rich(json.loads(data[8 : 8 + length]))
