"""Packing: what shares a row or a micro-batch, and which rank gets it. Units, such as a pair, are never parted."""

import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int, units: Sequence[int] | None = None) -> list[list[int]]:
    """Best-fit-decreasing bin packing: every index of `lengths` in exactly one row of at most `capacity`.

    The longest goes first, each into the fullest row that still has room, else into a new row; equal lengths
    keep their order, so the result is a pure function of the arguments, and the number of rows does not
    depend on the order of `lengths`. Uses at most 11/9 of the optimum rows plus one (Johnson 1973). The
    rooms in use are the set bits of one integer, so a search is a shift and a lowest bit: a million
    conversations take seconds. Indices of equal `units` stay together.
    """
    if units is not None:
        members = unit_members(units)
        rows_of_units = pack([sum(lengths[i] for i in unit) for unit in members], capacity)
        return [[i for unit in row for i in members[unit]] for row in rows_of_units]
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


def deal(
    lengths: Sequence[int],
    capacity: int,
    *,
    ranks: int = 1,
    multiple: int = 1,
    units: Sequence[int] | None = None,
    work: Sequence[float] | None = None,
) -> list[list[list[int]]]:
    """Every rank's micro-batches, each of at most `capacity` tokens: `[rank][micro-batch]`, indices of `lengths`.

    Ranks get about equal work, then each splits its units into few micro-batches of like length: twice the
    largest first to the least filled (LPT, Graham 1969). All ranks get as many, which is a multiple of
    `multiple`; one may be empty when there are fewer units. A pure function of its arguments.

    Args:
        units: of every index; equal ones stay together, in their order. None: each its own.
        work: of every index, in any unit; None: its length.

    Raises ValueError: nothing to deal, or a unit that exceeds the capacity.
    """
    if not lengths:
        raise ValueError("no sequences to split")
    members = unit_members(units) if units is not None else [[i] for i in range(len(lengths))]
    sizes = [sum(lengths[i] for i in unit) for unit in members]
    if max(sizes) > capacity:
        longest = members[sizes.index(max(sizes))]
        what = "a sequence" if len(longest) == 1 else f"a unit of {len(longest)} sequences"
        raise ValueError(f"{what} of {max(sizes)} tokens exceeds the micro-batch budget of {capacity}")
    loads = sizes if work is None else [sum(work[i] for i in unit) for unit in members]
    shares = _least_filled(range(len(members)), loads, ranks)
    count = max(_fewest([sizes[u] for u in share], capacity) for share in shares)
    count = -(-max(1, count) // multiple) * multiple
    while True:
        split = [_least_filled(share, sizes, count) for share in shares]
        if all(sum(sizes[u] for u in group) <= capacity for groups in split for group in groups):
            return [[sorted(i for u in group for i in members[u]) for group in groups] for groups in split]
        count += multiple


def unit_members(units: Sequence[int]) -> list[list[int]]:
    """The indices of each unit, units in the order of their first."""
    members: dict[int, list[int]] = {}
    for index, unit in enumerate(units):
        members.setdefault(unit, []).append(index)
    return list(members.values())


def _fewest(sizes: Sequence[int], capacity: int) -> int:
    """A lower bound of the groups: what fills them, and at most k of those above capacity / (k + 1) share one."""
    large = (-(-sum(size * (k + 1) > capacity for size in sizes) // k) for k in range(1, 9))
    return max(-(-sum(sizes) // capacity), *large)


def _least_filled(items: Sequence[int], loads: Sequence[float], count: int) -> list[list[int]]:
    """`items` in `count` groups of like load, each in the order of the items."""
    groups: list[list[int]] = [[] for _ in range(count)]
    heap: list[tuple[float, int]] = [(0, number) for number in range(count)]
    for item in sorted(items, key=lambda item: -loads[item]):
        filled, number = heapq.heappop(heap)
        groups[number].append(item)
        heapq.heappush(heap, (filled + loads[item], number))
    return [sorted(group) for group in groups]
