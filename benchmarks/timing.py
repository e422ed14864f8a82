"""Times two or more functions against each other, fairly on a busy machine.

The sides take turns, so that whatever else the machine does falls on all of them; what
is reported is the median of each, and the median of their ratios round by round.
"""

import statistics
import time
from collections.abc import Callable, Mapping

import jax


def interleaved(
    sides: Mapping[str, Callable[[], object]], *, rounds: int = 15
) -> dict[str, list[float]]:
    """Returns for each side the milliseconds of every round."""
    for run in sides.values():  # compile, and touch the memory
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            jax.block_until_ready(sides[name]())
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratio(times: Mapping[str, list[float]], name: str, to: str) -> float:
    """Returns the median over the rounds of one side's time over another's."""
    pairs = zip(times[name], times[to], strict=True)
    return statistics.median(a / b for a, b in pairs)
