"""SHA-256 modulo a number, for compiled kernels (FIPS 180-4)."""

from __future__ import annotations

import math

import numba
import numpy as np


def _constants() -> tuple[np.ndarray, np.ndarray]:
    """Fractional bits of the square and cube roots of the first primes (FIPS 180-4, sections 4.2.2 and 5.3.3)."""
    primes = [n for n in range(2, 312) if all(n % d for d in range(2, int(n**0.5) + 1))]
    isqrt_bits = [math.isqrt(p << 64) & 0xFFFFFFFF for p in primes[:8]]
    return np.array(isqrt_bits, np.uint32), np.array([_cube_root(p << 96) & 0xFFFFFFFF for p in primes], np.uint32)


def _cube_root(number: int) -> int:
    low, high = 0, 1 << (number.bit_length() // 3 + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**3 <= number else (low, middle - 1)
    return low


_START, _ROUND = _constants()


@numba.njit(nogil=True, cache=True, inline="always")
def _rotate(x, bits):
    return np.uint32(x >> np.uint32(bits)) | np.uint32(x << np.uint32(32 - bits))


@numba.njit(nogil=True, cache=True)
def sha256_mod(message, length, modulus, schedule):
    """SHA-256 of ``message[:length]`` as a 256-bit integer, modulo `modulus`.

    The padding of the standard is written behind the message, which must have room for 72 more bytes; `schedule` is a
    scratch of 64 words.
    """
    blocks = (length + 9 + 63) // 64
    message[length] = 0x80
    message[length + 1 : blocks * 64 - 8] = 0
    for byte in range(8):
        message[blocks * 64 - 1 - byte] = (length * 8 >> byte * 8) & 0xFF
    state = _START.copy()
    for block in range(blocks):
        for t in range(16):
            at = block * 64 + t * 4
            high = np.uint32(message[at]) << np.uint32(24) | np.uint32(message[at + 1]) << np.uint32(16)
            schedule[t] = high | np.uint32(message[at + 2]) << np.uint32(8) | np.uint32(message[at + 3])
        for t in range(16, 64):
            x, y = schedule[t - 15], schedule[t - 2]
            small0 = _rotate(x, 7) ^ _rotate(x, 18) ^ (x >> np.uint32(3))
            small1 = _rotate(y, 17) ^ _rotate(y, 19) ^ (y >> np.uint32(10))
            schedule[t] = np.uint32(schedule[t - 16] + small0 + schedule[t - 7] + small1)
        a, b, c, d, e, f, g, h = (
            state[0], state[1], state[2], state[3], state[4], state[5], state[6], state[7]
        )  # fmt: skip
        for t in range(64):
            big1 = _rotate(e, 6) ^ _rotate(e, 11) ^ _rotate(e, 25)
            choose = (e & f) ^ (~e & g)
            one = np.uint32(h + big1 + choose + _ROUND[t] + schedule[t])
            big0 = _rotate(a, 2) ^ _rotate(a, 13) ^ _rotate(a, 22)
            majority = (a & b) ^ (a & c) ^ (b & c)
            h, g, f, e = g, f, e, np.uint32(d + one)
            d, c, b, a = c, b, a, np.uint32(one + np.uint32(big0 + majority))
        state[0] += a
        state[1] += b
        state[2] += c
        state[3] += d
        state[4] += e
        state[5] += f
        state[6] += g
        state[7] += h
    remainder = np.uint64(0)
    for word in range(8):
        remainder = (remainder << np.uint64(32) | np.uint64(state[word])) % np.uint64(modulus)
    return remainder
