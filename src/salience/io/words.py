"""What NumPy has no word for: unaligned loads and bit operations, as LLVM instructions within compiled kernels."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic as numba_intrinsic
from numba.np.arrayobj import make_array

intrinsic: Any = numba_intrinsic  # its own type has the first, hidden argument of what it decorates


def pointer(context: Any, builder: Any, kind: Any, target: ir.Type, array: Any, at: Any) -> Any:
    """LLVM value: address of element `at` of an array of Numba type `kind`, as that of a `target`."""
    data = make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), target.as_pointer())


@intrinsic
def load_word(_, array, at):
    """Bytes at .. at + 7 as one little-endian word."""

    def generate(context, builder, signature, arguments):
        place = pointer(context, builder, signature.args[0], ir.IntType(64), *arguments)
        return builder.load(place, align=1)

    return types.uint64(array, types.int64), generate


def _compare(operation: str) -> Any:
    """A word whose bit i tells how byte at + i compares with a value: 64 comparisons in a few instructions."""

    def declare(_, array, at, value):
        def generate(context, builder, signature, arguments):
            vector, zeros = ir.VectorType(ir.IntType(8), 64), ir.Constant(ir.VectorType(ir.IntType(32), 64), None)
            block = builder.load(pointer(context, builder, signature.args[0], vector, *arguments[:2]), align=1)
            one = builder.insert_element(
                ir.Constant(vector, ir.Undefined), arguments[2], ir.Constant(ir.IntType(32), 0)
            )
            found = builder.icmp_unsigned(operation, block, builder.shuffle_vector(one, one, zeros))
            return builder.bitcast(found, ir.IntType(64))

        return types.uint64(array, types.int64, types.uint8), generate

    return intrinsic(declare)


equal, below = _compare("=="), _compare("<")


@intrinsic
def copy_block(_, array, at, target, to):
    """Copy 64 bytes."""

    def generate(context, builder, signature, arguments):
        vector = ir.VectorType(ir.IntType(8), 64)
        block = builder.load(pointer(context, builder, signature.args[0], vector, *arguments[:2]), align=1)
        builder.store(block, pointer(context, builder, signature.args[2], vector, *arguments[2:]), align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, target, types.int64), generate


@intrinsic
def lowest_bit(_, word):
    """Number of the lowest bit of a word that is set; 64 if none is."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@intrinsic
def load_shared(_, array, at):
    """Element of an array of words that other threads write meanwhile: old or new, never half of each."""

    def generate(context, builder, signature, arguments):
        place = pointer(context, builder, signature.args[0], ir.IntType(64), *arguments)
        return builder.load_atomic(place, "monotonic", 8)

    return types.uint64(array, types.int64), generate


@intrinsic
def store_shared(_, array, at, word):
    """Write an element that `load_shared` reads."""

    def generate(context, builder, signature, arguments):
        place = pointer(context, builder, signature.args[0], ir.IntType(64), *arguments[:2])
        builder.store_atomic(arguments[2], place, "monotonic", 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.uint64), generate
