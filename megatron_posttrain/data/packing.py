"""Packing: which conversations share a row."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: every index of `lengths` in exactly one row of at most `capacity`.

    The longest goes first, each into the fullest row that still has room, else into a new row; equal lengths
    keep their order, so the result is a pure function of the arguments, and the number of rows does not
    depend on the order of `lengths`. Uses at most 11/9 of the optimum rows plus one (Johnson 1973). The
    rooms in use are the set bits of one integer, so a search is a shift and a lowest bit: a million
    conversations take seconds.
    """
    if lengths and (min(lengths) < 1 or max(lengths) > capacity):
        raise ValueError(f"lengths must lie between 1 and {capacity}, found {min(lengths)} to {max(lengths)}")
    rows: list[list[int]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set when some row has exactly r tokens of room left
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[i]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(i)
        rows_by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows
