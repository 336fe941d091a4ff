"""Counts at many sizes from traces at a few: interpolated exactly, checked by further traces, else traced one by one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from typing import TypeVar

Size = TypeVar("Size")


def counted(
    sizes: Sequence[Size],
    terms: Callable[[Size], Sequence[int]],
    count: Callable[[Size], int],
    like: Callable[[Size], Hashable] = lambda _: None,
) -> dict[Size, int]:
    """What `count` gives at each of the sizes, though it is called for few of them where it is linear in `terms`.

    sizes: the cheapest to count first. A size whose terms are a combination of those of earlier sizes gets the same
    combination of their counts. The first, the middle one and the last of these are counted as well, and the last of
    those that are `like` each other, whose counts might follow a law of their own: where one differs, or a combination
    is not a whole number, `terms` do not describe `count` and every size is counted.
    """
    found, combined = _combined(sizes, terms, count)
    last_of = {like(size): index for index, (size, _) in enumerate(combined)}
    checked = [combined[index] for index in {*last_of.values(), 0, len(combined) // 2}] if combined else []
    actual = {size: count(size) for size, _ in checked}
    fits = all(actual[size] == value for size, value in checked) and all(v.denominator == 1 for _, v in combined)
    if fits:
        found |= {size: int(value) for size, value in combined}
    else:
        found |= {size: actual[size] if size in actual else count(size) for size, _ in combined}
    return {size: found[size] for size in sizes}


def _combined(
    sizes: Sequence[Size], terms: Callable[[Size], Sequence[int]], count: Callable[[Size], int]
) -> tuple[dict[Size, int], list[tuple[Size, Fraction]]]:
    """The sizes with independent terms, counted, and the others with the values that follow, by Gaussian elimination."""
    counts: dict[Size, int] = {}
    combined: list[tuple[Size, Fraction]] = []
    pivots: list[tuple[int, list[Fraction], Fraction]] = []  # column, row with 1 there, what the row counts
    for size in sizes:
        row, value = [Fraction(term) for term in terms(size)], Fraction(0)
        for column, pivot, worth in pivots:
            factor = row[column]
            if factor:
                row = [mine - factor * other for mine, other in zip(row, pivot, strict=True)]
                value += factor * worth
        column = next((index for index, rest in enumerate(row) if rest), -1)
        if column < 0:
            combined.append((size, value))
        else:
            counts[size] = count(size)
            pivots.append((column, [rest / row[column] for rest in row], (counts[size] - value) / row[column]))
    return counts, combined


def level_terms(tokens: int) -> tuple[int, ...]:
    """What the count of a block or a head may be a sum of, at so many patch tokens."""
    return 1, tokens, tokens**2


def reduction_terms(before: int, after: int) -> tuple[int, ...]:
    """What the count of an operator may be a sum of. Some reduce by halves: to each halving belong its tokens and pairs."""
    halved = _halved(before, after)
    pairs = sum((tokens // 2) * (tokens - tokens // 2) for tokens in halved)
    return 1, before, after, before * after, before**2, after**2, len(halved), sum(halved), pairs


def reduction_class(before: int, after: int) -> tuple[int, int, int]:
    """Reductions that take as many halvings, from and to numbers of the same parity, are alike."""
    return len(_halved(before, after)), before % 2, after % 2


def _halved(before: int, after: int) -> list[int]:
    """The numbers of tokens that are more than `after`, on the way down by halves."""
    halved = []
    while before > after:
        halved.append(before)
        before -= before // 2
    return halved
