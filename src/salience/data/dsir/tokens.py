"""The compiled splitter: lower-case a document and find its tokens, many bytes at a time.

Three passes, each of which the compiler turns into vector instructions or into code without unforeseeable branches:
lower-case and classify bytes; compare the classes of 64 bytes with their neighbours' in one machine word; read off
where tokens begin and stop.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
from jaxtyping import UInt32

from salience.io.words import equal, load_word, lowest_bit

_SPACE, _WORD, _OTHER = 0, 1, 2
_SIGMA, _DOTTED_I = 0x3A3, 0x130
PADDING = 64  # bytes behind a buffer that may be read or written


@functools.cache
def characters() -> UInt32[np.ndarray, " 1114112"]:
    """For every code point: ``lower-case code point * 4 + class of that``; from Python's own str."""
    points = np.concatenate([np.arange(0xD800), np.arange(0xE000, 0x110000)])  # surrogates are no characters
    text = points.astype("<u4").tobytes().decode("utf-32-le").replace("İ", "i")  # U+0130 lowers to two: see split
    lowered = text.lower()
    is_space = np.fromiter(map(str.isspace, lowered), bool, len(lowered))  # \s
    is_word = np.fromiter(map(str.isalnum, lowered), bool, len(lowered))  # \w, but for the underscore
    is_word[ord("_")] = True
    kind = np.where(is_space, _SPACE, np.where(is_word, _WORD, _OTHER)).astype(np.uint32)
    table = np.zeros(0x110000, dtype=np.uint32)
    table[points] = np.frombuffer(lowered.encode("utf-32-le"), np.uint32) * 4 + kind
    return table


# --- lower-case and classes ---------------------------------------------------------------------------------


@numba.njit(nogil=True, cache=True)
def split(data, here, stop, characters, low, kind, starts, stops):
    """Split and lower-case the document ``data[here:stop]``.

    `low` receives its lower-case form and `kind` the class of every byte of that; token t is
    ``low[starts[t]:stops[t]]``. Gives the number of tokens, or -1 where Σ or İ need `str.lower`: the one lowers by its
    context, the other to two characters.
    """
    length = 0
    while here < stop:
        run = _ascii_run(data, here, stop)
        if run < 16:  # between words of another script; vectors would not pay
            for at in range(here, here + run):
                low[length] = characters[data[at]] >> np.uint32(2)
                kind[length] = characters[data[at]] & np.uint32(3)
                length += 1
            here += run
        else:
            _lower_ascii(data[here : here + run], low[length : length + run], kind[length : length + run])
            here += run
            length += run
        while here < stop and data[here] >= 0x80:
            point, width = _decode(data, here)
            if point in (_SIGMA, _DOTTED_I):
                return -1
            here += width
            end = _encode(low, length, characters[point] >> np.uint32(2))
            for at in range(length, end):
                kind[at] = characters[point] & np.uint32(3)
            length = end
    kind[length : length + PADDING] = _SPACE
    return _tokens(kind, length, starts, stops)


@numba.njit(nogil=True, cache=True)
def _ascii_run(data, here, stop):
    """Number of bytes from `here` to the next character outside ASCII."""
    at = here
    while at + 8 <= stop and not load_word(data, at) & np.uint64(0x8080808080808080):
        at += 8
    while at < stop and data[at] < 0x80:
        at += 1
    return at - here


@numba.njit(nogil=True, cache=True)
def _lower_ascii(text, low, kind):
    """The entries of `characters` for ASCII, by arithmetic on bytes: a table look-up would not vectorise."""
    for i in range(len(text)):
        byte = text[i]
        upper = np.uint8(byte - np.uint8(65)) < np.uint8(26)
        lower = np.uint8(byte | np.uint8(np.uint8(upper) << np.uint8(5)))
        letter = np.uint8(lower - np.uint8(97)) < np.uint8(26)
        digit = np.uint8(byte - np.uint8(48)) < np.uint8(10)
        word = letter | digit | (byte == np.uint8(95))
        blank = np.uint8(byte - np.uint8(9)) < np.uint8(5)  # \t \n \v \f \r
        space = (byte == np.uint8(32)) | blank | (np.uint8(byte - np.uint8(28)) < np.uint8(4))
        low[i] = lower
        kind[i] = np.uint8(_OTHER) - np.uint8(word) - np.uint8(2) * np.uint8(space)


@numba.njit(nogil=True, cache=True)
def _decode(data, at):
    """Code point of the UTF-8 sequence of two to four bytes at `at`, and its length."""
    first, second = np.uint32(data[at]), np.uint32(data[at + 1] & 0x3F)
    if first < 0xE0:
        return (first & np.uint32(0x1F)) << np.uint32(6) | second, 2
    third = np.uint32(data[at + 2] & 0x3F)
    if first < 0xF0:
        return (first & np.uint32(0x0F)) << np.uint32(12) | second << np.uint32(6) | third, 3
    fourth = np.uint32(data[at + 3] & 0x3F)
    return (first & np.uint32(7)) << np.uint32(18) | second << np.uint32(12) | third << np.uint32(6) | fourth, 4


@numba.njit(nogil=True, cache=True)
def _encode(low, at, point):
    """Write a code point as UTF-8; gives the position behind it."""
    if point < 0x80:  # the Kelvin sign lowers to an ASCII letter
        low[at] = point
        return at + 1
    if point < 0x800:
        low[at] = 0xC0 | point >> np.uint32(6)
    else:
        if point < 0x10000:
            low[at] = 0xE0 | point >> np.uint32(12)
        else:
            low[at] = 0xF0 | point >> np.uint32(18)
            at += 1
            low[at] = 0x80 | (point >> np.uint32(12) & np.uint32(0x3F))
        at += 1
        low[at] = 0x80 | (point >> np.uint32(6) & np.uint32(0x3F))
    low[at + 1] = 0x80 | (point & np.uint32(0x3F))
    return at + 2


# --- tokens -------------------------------------------------------------------------------------------------


@numba.njit(nogil=True, cache=True)
def _tokens(kind, length, starts, stops):
    """Runs of equal class: a token begins (stops) where its class is another before (behind)."""
    begun, stopped = 0, 0
    word_before, other_before = np.uint64(0), np.uint64(0)  # whether the byte before this block is of the class
    one, last = np.uint64(1), np.uint64(63)
    for at in range(0, length + 1, 64):
        word, other = equal(kind, at, np.uint8(_WORD)), equal(kind, at, np.uint8(_OTHER))
        word_shifted, other_shifted = word << one | word_before, other << one | other_before
        word_before, other_before = word >> last, other >> last
        begun = _append(starts, begun, at, (word & ~word_shifted) | (other & ~other_shifted))
        stopped = _append(stops, stopped, at, (word_shifted & ~word) | (other_shifted & ~other))
    return begun


@numba.njit(nogil=True, cache=True)
def _append(positions, count, at, word):
    """Append the positions of the bits that are set.

    Sixteen slots are always written, as few blocks have more: a loop that ends at the last bit would be foreseen
    wrongly once per block, which costs more.
    """
    more = count
    for slot in range(16):
        positions[count + slot] = at + lowest_bit(word)
        more += word != 0
        word &= word - np.uint64(1)
    while word:
        positions[more] = at + lowest_bit(word)
        more += 1
        word &= word - np.uint64(1)
    return more
