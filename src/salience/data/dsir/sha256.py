"""SHA-256 modulo a number, for compiled kernels (FIPS 180-4).

The compression of a block exists twice: in portable arithmetic, and in the SHA instructions of x86 processors that have
them, which take a fifth of the time.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.registry import cpu_target

from salience.io.words import intrinsic, pointer


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
def compress_portable(state, message, at):
    """Take the block of 64 bytes at `at` into the eight words of `state`."""
    schedule = np.empty(64, np.uint32)
    for t in range(16):
        word = np.uint32(0)
        for byte in range(4):
            word = np.uint32(word << np.uint32(8)) | np.uint32(message[at + 4 * t + byte])
        schedule[t] = word
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


@intrinsic
def compress_x86(_, state, message, at):
    """The same in SHA instructions, which do two rounds each on the words (f, e, b, a) and (h, g, d, c)."""

    def generate(context, builder, signature, arguments):
        number, four = ir.IntType(64), ir.VectorType(ir.IntType(32), 4)

        def constant(values):
            return ir.Constant(four, [int(value) for value in values])

        def call(name, *operands):
            function = ir.FunctionType(four, [four] * len(operands))
            return builder.call(builder.module.declare_intrinsic(name, fnty=function), operands)

        def shuffle(x, y, *lanes):
            return builder.shuffle_vector(x, y, constant(lanes))

        def place(argument, at):
            return pointer(context, builder, signature.args[argument], four, arguments[argument], at)

        places = [place(0, ir.Constant(number, at)) for at in (0, 4)]
        abcd, efgh = (builder.load(place, align=4) for place in places)
        feba, hgdc = shuffle(abcd, efgh, 5, 4, 1, 0), shuffle(abcd, efgh, 7, 6, 3, 2)
        first, second, schedule = feba, hgdc, []
        for group in range(16):
            if group < 4:
                at = builder.add(arguments[2], ir.Constant(number, 16 * group))
                schedule.append(call("llvm.bswap.v4i32", builder.load(place(1, at), align=1)))
            else:
                w16, w12, w8, w4 = schedule[-4:]
                small = call("llvm.x86.sha256msg1", w16, w12)
                schedule.append(call("llvm.x86.sha256msg2", builder.add(small, shuffle(w8, w4, 1, 2, 3, 4)), w4))
            rounds = builder.add(schedule[-1], constant(_ROUND[4 * group : 4 * group + 4]))
            second = call("llvm.x86.sha256rnds2", second, first, rounds)
            first = call("llvm.x86.sha256rnds2", first, second, shuffle(rounds, rounds, 2, 3, 0, 0))
        first, second = builder.add(first, feba), builder.add(second, hgdc)
        builder.store(shuffle(first, second, 3, 2, 7, 6), places[0], align=4)
        builder.store(shuffle(first, second, 1, 0, 5, 4), places[1], align=4)
        return context.get_dummy_value()

    return types.void(state, message, types.int64), generate


def has_sha_instructions() -> bool:
    """Whether Numba compiles for an x86 processor with SHA instructions."""
    target, _, features = cpu_target.target_context.codegen().magic_tuple()
    return target.startswith("x86_64") and "+sha" in features.split(",")


_compress = compress_x86 if has_sha_instructions() else compress_portable


@numba.njit(nogil=True, cache=True)
def sha256_mod(message, length, modulus):
    """SHA-256 of ``message[:length]`` as a 256-bit integer, modulo `modulus`.

    The padding of the standard is written behind the message, which must have room for 72 more bytes.
    """
    size = (length + 9 + 63) // 64 * 64
    message[length] = 0x80
    for at in range(length + 1, size - 8):
        message[at] = 0
    for byte in range(8):
        message[size - 1 - byte] = (length * 8 >> byte * 8) & 0xFF
    state = _START.copy()
    for at in range(0, size, 64):
        _compress(state, message, at)
    remainder = np.uint64(0)
    for word in range(8):
        remainder = (remainder << np.uint64(32) | np.uint64(state[word])) % np.uint64(modulus)
    return remainder
