"""The rows of a step, and how they are cut and dealt to processes: pure functions of its number."""

import functools
import math
from fractions import Fraction

import numpy as np

ORDER_VERSION = 1
"""Names the rule below in `run.json`, which holds for years: numpy froze RandomState's stream."""


def num_positions(
    num_rows: int, num_train_epochs: float, max_steps: int | None, global_batch_size: int
) -> int:
    """Rows drawn over the whole run, repeats counted; a fraction of an epoch is rounded up."""
    if max_steps is not None:
        return max_steps * global_batch_size
    return math.ceil(Fraction(str(num_train_epochs)) * num_rows)


def num_steps(positions: int, global_batch_size: int) -> int:
    """Optimizer steps of the whole run; the last may hold fewer rows than the others."""
    return math.ceil(positions / global_batch_size)


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The order of one epoch. Two are kept, at 8 bytes a row: a step may straddle two epochs."""
    return np.random.RandomState([seed, epoch]).permutation(num_rows)


def draw(
    step: int, num_rows: int, positions: int, global_batch_size: int, seed: int
) -> tuple[int, np.ndarray]:
    """The epoch of a step's first row, and its rows as drawn: positions in the training examples.

    Position p = step * global_batch_size + j is row i of epoch e, where e, i = divmod(p, num_rows):
    each row exactly once an epoch, none dropped, none repeated to fill a batch."""
    first = step * global_batch_size
    last = min(first + global_batch_size, positions)
    epoch_and_index = [divmod(position, num_rows) for position in range(first, last)]
    rows = [permutation(seed, epoch, num_rows)[i] for epoch, i in epoch_and_index]
    return first // num_rows, np.array(rows, dtype=np.int64)


def cut(
    lengths: np.ndarray, micro_batch_tokens: int, num_processes: int, padding_free: bool
) -> list[np.ndarray]:
    """Cut rows, longest first, into micro-batches; micro-batch k is for process k mod n.

    The number of micro-batches is a multiple of n, so that all processes take part in the same
    collectives, and as small as the budget of tokens (see `forward_tokens`) allows. Among such cuts
    the one whose largest micro-batch is smallest is taken: it costs nothing, evens the processes
    and lowers the peak. Where rows are too few, the last micro-batches are empty.

    Shapes: lengths (N,), tokens; returns index arrays into it."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    widths = np.asarray(lengths)[order].tolist()
    if widths and widths[0] > micro_batch_tokens:
        raise ValueError(
            f"a row of {widths[0]} tokens is above micro_batch_tokens {micro_batch_tokens}"
        )
    fewest = len(_fill(widths, micro_batch_tokens, padding_free))
    wanted = num_processes * max(1, math.ceil(fewest / num_processes))
    low, high = (widths[0] if widths else 1), micro_batch_tokens
    while low < high:
        middle = (low + high) // 2
        fits = len(_fill(widths, middle, padding_free)) <= wanted
        low, high = (low, middle) if fits else (middle + 1, high)
    pieces = np.split(order, _fill(widths, high, padding_free)[1:])
    while len(pieces) < min(wanted, len(widths)):  # no process idles while another has two rows
        sizes = [
            (len(piece) > 1) * forward_tokens(lengths[piece], padding_free) for piece in pieces
        ]
        largest = int(np.argmax(sizes))
        pieces[largest : largest + 1] = np.array_split(pieces[largest], 2)
    return pieces + [np.array([], dtype=np.int64)] * (wanted - len(pieces))


def forward_tokens(lengths: np.ndarray, padding_free: bool) -> int:
    """Tokens that one forward of these rows computes: theirs, or each row's padded to the longest.

    A forward without rows is given one token."""
    return max(1, int(lengths.sum() if padding_free else len(lengths) * lengths.max(initial=0)))


def _fill(widths: list[int], budget: int, padding_free: bool) -> list[int]:
    """Where each micro-batch starts if each is filled up to `budget` tokens; `widths` fall."""
    starts: list[int] = []
    used = 0
    for index, width in enumerate(widths):
        used += width if padding_free or not starts else widths[starts[-1]]
        if not starts or used > budget:
            starts.append(index)
            used = width
    return starts
