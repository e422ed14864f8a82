"""Thresholds that follow the parameters, or the norms of the past.

| the threshold is ...                              | use                              |
| ------------------------------------------------- | -------------------------------- |
| a share of the parameters' norm                   | `Relative`                       |
| a quantile of recent norms                        | `WindowedQuantile`,              |
|                                                   | `QuantileTracker`                |
| above their median by their own spread            | `WindowedSpread`                 |
| a multiple of their mean or root mean square      | `MovingMean`, `MovingSquare`     |
| their mean, this norm among them                  | `MovingPeak`, `MovingRatio`      |
| their mean plus some standard deviations          | `MovingDeviation`,               |
|                                                   | `WindowedDeviation`              |
| a multiple of the least norm so far               | `RunningMinimum`                 |
| the lowest of several rules                       | `Lowest`                         |
| a rule that rises after many clipped steps        | `Released`                       |

Pass one to `clipjax.Bound`.  A rule with a history is a frozen value with three
methods: `empty` returns its memory before the first norm, `threshold` the bound for a
norm, and `remember` the memory after it.  Norms may be arrays of any shape; each entry
has a history of its own.  The caller passes no norm that is zero or not finite.

The `feed` of a rule says which norm it remembers.  With `raw`, the incoming one, a
spike inflates a mean and hides the next spike.  With `clipped`, the outgoing one, a
threshold may never follow a lasting rise, unless the rule is `Released`.  `Winsorized`,
the incoming one up to a multiple of the threshold, stands both.  Numbers may be traced
values or, in `clipjax.clip_by`, schedules.
"""

from ._averages import Moments, MovingMean, MovingPeak, MovingRatio, MovingSquare
from ._deviation import MovingDeviation, at_limit, at_mean, reciprocal
from ._lowest import Lowest
from ._minimum import RunningMinimum
from ._relative import Relative
from ._released import Release, Released
from ._rules import Feed, History, Norms
from ._tracker import QuantileTracker
from ._windows import (
    WindowedDeviation,
    WindowedQuantile,
    WindowedSpread,
    Winsorized,
    clipped,
    raw,
)

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
    "WindowedSpread",
    "Winsorized",
    "at_limit",
    "at_mean",
    "clipped",
    "raw",
    "reciprocal",
]


def __dir__() -> list[str]:
    return __all__
