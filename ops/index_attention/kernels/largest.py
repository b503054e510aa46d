"""The largest values of a row by radix selection: exact, and the lower place among equals."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sortable(values_ptr, row, first, num_values, CHUNK: tl.constexpr):
    """(keys [CHUNK] uint32 in the order of the values, whether each may be chosen)."""
    place = first + tl.arange(0, CHUNK)
    value = tl.load(values_ptr + row * num_values + place, mask=place < num_values, other=0.0)
    there = (place < num_values) & (value != float("-inf"))

    # There is one zero only. Numbers with a sign fall as their bits rise.
    bits = tl.where(value == 0.0, 0.0, value).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000), there


@triton.jit
def largest_kernel(values_ptr, chosen_ptr, num_values, top_k, CHUNK: tl.constexpr):
    """Grid (rows,). values: [rows, num_values] fp32, -inf is never chosen; chosen: [rows, top_k]
    int32 places in rising order, untouched where there are no more.

    Four passes find the smallest key that is chosen, eight bits each, from the counts of the next
    bits among the keys that begin alike; a fifth writes. Counts are integers, and places come from
    prefix sums: nothing hangs on an order.
    """
    row = tl.program_id(0).to(tl.int64)
    bin_of = tl.arange(0, 256)
    need = tl.full([], 0, tl.int32) + top_k
    found = tl.full([], 0, tl.uint32)
    for number in range(4):
        shift = (tl.full([], 24, tl.int32) - 8 * number).to(tl.uint32)
        counts = tl.zeros([256], tl.int32)
        for first in range(0, num_values, CHUNK):
            key, there = _sortable(values_ptr, row, first, num_values, CHUNK)
            alike = there & ((((key ^ found) >> shift) >> 8) == 0)
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=alike)

        # The bits of the last one that is needed; those above it are chosen, whatever follows.
        need = tl.minimum(need, tl.sum(counts, 0))
        at_least = tl.cumsum(counts, 0, reverse=True)
        digit = tl.max(tl.where(at_least >= need, bin_of, 0), 0)
        need -= tl.sum(tl.where(bin_of > digit, counts, 0), 0)
        found = found | (digit.to(tl.uint32) << shift)

    # Of those equal to the smallest one, the first `need` are chosen.
    taken = tl.full([], 0, tl.int32)
    equals = tl.full([], 0, tl.int32)
    for first in range(0, num_values, CHUNK):
        key, there = _sortable(values_ptr, row, first, num_values, CHUNK)
        equal = (there & (key == found)).to(tl.int32)
        among = equals + tl.cumsum(equal, 0)
        take = there & ((key > found) | ((equal > 0) & (among <= need)))
        to = row * top_k + taken + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(chosen_ptr + to, first + tl.arange(0, CHUNK), mask=take)
        taken += tl.sum(take.to(tl.int32), 0)
        equals += tl.sum(equal, 0)
