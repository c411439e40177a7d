"""Read one string field of JSON lines, many bytes at a time.

The kernel accepts what is beyond doubt: a record that `json.loads` takes, with the field once and text in it. Of all
else it says only that there is some; then slower and more patient readers look (`salience.io.lines`).
"""

from __future__ import annotations

import numba
import numpy as np
import pyarrow as pa

from salience.io.words import below, copy_block, equal, lowest_bit

_QUOTE, _ESCAPE, _COMMA, _COLON = 34, 92, 44, 58
_LIST, _LIST_END, _OBJECT, _OBJECT_END = 91, 93, 123, 125
_TRUE, _FALSE, _NULL = (np.frombuffer(word, np.uint8) for word in (b"true", b"false", b"null"))
_NEVER = -1
_DEPTH = 63  # a nesting is remembered by the bits of one word


def json_texts(block: bytes, starts: np.ndarray, stops: np.ndarray, name: str) -> pa.Array | None:
    """The string field `name` of every record, or None if a record is in doubt.

    Parameters
    ----------
    block : bytes
        Valid UTF-8. Record i is ``block[starts[i]:stops[i]]``, begins with {, ends with }, and holds no newline.
    """
    texts, offsets = pa.allocate_buffer(len(block) + 64), np.zeros(len(starts) + 1, np.int32)
    field = np.frombuffer(name.encode("utf-8"), np.uint8)
    if not _read(np.frombuffer(block, np.uint8), starts, stops, field, np.frombuffer(texts, np.uint8), offsets):
        return None
    return pa.StringArray.from_buffers(len(starts), pa.py_buffer(offsets), texts.slice(0, int(offsets[-1])))


@numba.njit(nogil=True, cache=True)
def _read(data, starts, stops, field, texts, offsets):
    """Write the fields one behind the other; gives whether all went well."""
    written = 0
    for record in range(len(starts)):
        at, found = _blanks(data, starts[record] + 1), False
        while True:
            at, is_field = _name(data, at, field, texts, written)
            if at == _NEVER:
                return False
            if is_field:
                if found or data[at] != _QUOTE:
                    return False
                at, written = _string(data, at, texts, written)
                found = True
            else:
                at = _skip(data, at, texts, written)
            if at == _NEVER:
                return False
            at = _blanks(data, at)
            if data[at] != _COMMA:
                break
            at = _blanks(data, at + 1)
        if not found or data[at] != _OBJECT_END or at != stops[record] - 1:
            return False
        offsets[record + 1] = written
    return True


# Nothing below reads farther than one byte behind a record, where a newline stands or the zero byte that ends all
# `bytes`: } is neither blank nor part of a word or number, and no string goes on behind a newline or the data's end.


@numba.njit(nogil=True, cache=True)
def _blanks(data, at):
    """Position of the next byte that is not blank."""
    while data[at] == 32 or data[at] == 9 or data[at] == 13:
        at += 1
    return at


@numba.njit(nogil=True, cache=True)
def _name(data, at, field, texts, written):
    """Read a member's name and colon: position of its value, and whether the name is that of the field."""
    if data[at] != _QUOTE:
        return _NEVER, False
    at, end = _string(data, at, texts, written)
    if at == _NEVER:
        return _NEVER, False
    at = _blanks(data, at)
    if data[at] != _COLON:
        return _NEVER, False
    same = end - written == len(field)
    for place in range(len(field)):
        same = same and texts[written + place] == field[place]
    return _blanks(data, at + 1), same


@numba.njit(nogil=True, cache=True)
def _string(data, at, texts, written):
    """Copy the string whose quote is at `at`, escapes resolved: positions behind it in `data` and in `texts`."""
    at += 1
    while True:
        run = 0
        if at + 64 <= len(data):
            ends = equal(data, at, _QUOTE) | equal(data, at, _ESCAPE) | below(data, at, 32)
            run = lowest_bit(ends)
            copy_block(data, at, texts, written)  # of which `run` bytes count
        elif at == len(data):
            return _NEVER, written
        elif data[at] != _QUOTE and data[at] != _ESCAPE and data[at] >= 32:
            texts[written] = data[at]
            run = 1
        at, written = at + run, written + run
        if run == 64 or at == len(data) or (data[at] != _QUOTE and data[at] != _ESCAPE and data[at] >= 32):
            continue
        if data[at] == _QUOTE:
            return at + 1, written
        if data[at] != _ESCAPE:
            return _NEVER, written
        at, written = _escaped(data, at + 1, texts, written)
        if at == _NEVER:
            return _NEVER, written


@numba.njit(nogil=True, cache=True)
def _escaped(data, at, texts, written):
    """Resolve the escape behind a backslash."""
    letter = data[at] if at < len(data) else 0
    if letter == 117:  # u
        point = _hexadecimal(data, at + 1)
        at += 5
        if 0xD800 <= point < 0xDC00 and at + 6 <= len(data) and data[at] == _ESCAPE and data[at + 1] == 117:
            low = _hexadecimal(data, at + 2)
            if not 0xDC00 <= low < 0xE000:
                return _NEVER, written
            point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00)
            at += 6
        if point < 0 or 0xD800 <= point < 0xE000:  # no number, or a lone surrogate
            return _NEVER, written
        if point < 0x80:
            texts[written] = point
            return at, written + 1
        if point < 0x800:
            texts[written] = 0xC0 | point >> 6
        else:
            if point < 0x10000:
                texts[written] = 0xE0 | point >> 12
            else:
                texts[written] = 0xF0 | point >> 18
                written += 1
                texts[written] = 0x80 | point >> 12 & 0x3F
            written += 1
            texts[written] = 0x80 | point >> 6 & 0x3F
        texts[written + 1] = 0x80 | point & 0x3F
        return at, written + 2
    for escape, character in ((110, 10), (34, 34), (92, 92), (47, 47), (116, 9), (114, 13), (98, 8), (102, 12)):
        if letter == escape:
            texts[written] = character
            return at + 1, written + 1
    return _NEVER, written


@numba.njit(nogil=True, cache=True)
def _hexadecimal(data, at):
    """Value of four hexadecimal digits, or -1."""
    if at + 4 > len(data):
        return -1
    value = np.int64(0)
    for place in range(at, at + 4):
        digit, letter = np.int64(data[place]) - 48, np.int64(data[place] | 32) - 97
        if 0 <= digit < 10:
            value = value * 16 + digit
        elif 0 <= letter < 6:
            value = value * 16 + letter + 10
        else:
            return -1
    return value


@numba.njit(nogil=True, cache=True)
def _skip(data, at, texts, written):
    """Position behind any value; `objects` has a bit for each object or list that it is within."""
    depth, objects = 0, np.uint64(0)
    one, no_field = np.uint64(1), data[:0]
    while True:
        byte = data[at]
        if byte in (_OBJECT, _LIST):
            if depth == _DEPTH:
                return _NEVER
            depth, objects = depth + 1, objects << one | np.uint64(byte == _OBJECT)
            at = _blanks(data, at + 1)
            if data[at] != (_OBJECT_END if byte == _OBJECT else _LIST_END):
                if byte == _OBJECT:
                    at, _ = _name(data, at, no_field, texts, written)
                    if at == _NEVER:
                        return _NEVER
                continue
        elif byte == _QUOTE:
            at, _ = _string(data, at, texts, written)
        else:
            at = _plain(data, at)
        if at == _NEVER:
            return _NEVER
        while depth:  # behind a value, or at the end of an empty object or list
            at = _blanks(data, at)
            if data[at] == _COMMA:
                break
            if data[at] != (_OBJECT_END if objects & one else _LIST_END):
                return _NEVER
            at, depth, objects = at + 1, depth - 1, objects >> one
        if not depth:
            return at
        at = _blanks(data, at + 1)
        if objects & one:
            at, _ = _name(data, at, no_field, texts, written)
            if at == _NEVER:
                return _NEVER


@numba.njit(nogil=True, cache=True)
def _plain(data, at):
    """Position behind true, false, null or a number."""
    for word in (_TRUE, _FALSE, _NULL):
        if data[at] == word[0]:
            for letter in word:
                if data[at] != letter:
                    return _NEVER
                at += 1
            return at
    if data[at] == 45:
        at += 1
    first = at
    at = _digits(data, at)
    if at == first or (data[first] == 48 and at > first + 1):  # no number begins with 0 but 0 itself
        return _NEVER
    if data[at] == 46:
        first, at = at + 1, _digits(data, at + 1)
        if at == first:
            return _NEVER
    if data[at] == 101 or data[at] == 69:
        at += 1
        if data[at] == 43 or data[at] == 45:
            at += 1
        first, at = at, _digits(data, at)
        if at == first:
            return _NEVER
    return at


@numba.njit(nogil=True, cache=True)
def _digits(data, at):
    while 48 <= data[at] <= 57:
        at += 1
    return at
