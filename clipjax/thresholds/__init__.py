"""Thresholds that the parameters set, or the norms of the past.

A rule with a history is a frozen value of three methods: `empty` returns its memory
before the first norm, `threshold` the bound for a norm, and `remember` the memory after
it.  Norms may come in arrays of any shape; each entry has a history of its own.  The
caller sees to it that nothing non-finite is remembered, and no zero, which would pull a
threshold to where no multiple leads back from.

What is remembered of a norm is the rule's `feed`.  `raw`: one spike inflates a mean
and hides the next.  `clipped`: a threshold may never follow a lasting rise, unless the
rule is `Released`.  `Winsorized`, in between, is robust to both.  Numbers may be traced
values or, in `clip_by`, schedules.
"""

from ._averages import Moments, MovingMean, MovingPeak, MovingRatio, MovingSquare
from ._deviation import MovingDeviation, at_limit, at_mean, reciprocal
from ._lowest import Lowest
from ._minimum import RunningMinimum
from ._relative import Relative
from ._released import Release, Released
from ._rules import Feed, History, Norms
from ._tracker import QuantileTracker
from ._windows import WindowedDeviation, WindowedQuantile, Winsorized, clipped, raw

__all__ = [
    "Feed",
    "History",
    "Lowest",
    "Moments",
    "MovingDeviation",
    "MovingMean",
    "MovingPeak",
    "MovingRatio",
    "MovingSquare",
    "Norms",
    "QuantileTracker",
    "Relative",
    "Release",
    "Released",
    "RunningMinimum",
    "WindowedDeviation",
    "WindowedQuantile",
    "Winsorized",
    "at_limit",
    "at_mean",
    "clipped",
    "raw",
    "reciprocal",
]


def __dir__() -> list[str]:
    return __all__
