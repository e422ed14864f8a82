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

from ._deviation import (
    MovingDeviation as MovingDeviation,
    at_limit as at_limit,
    at_mean as at_mean,
    reciprocal as reciprocal,
)
from ._feeds import Winsorized as Winsorized, clipped as clipped, raw as raw
from ._history import Feed as Feed, History as History, Norms as Norms
from ._lowest import Lowest as Lowest
from ._mean import MovingMean as MovingMean
from ._minimum import RunningMinimum as RunningMinimum
from ._moments import Moments as Moments
from ._peak import MovingPeak as MovingPeak
from ._ratio import MovingRatio as MovingRatio
from ._relative import Relative as Relative
from ._released import Release as Release, Released as Released
from ._schedules import at_step as at_step
from ._square import MovingSquare as MovingSquare
from ._tracker import QuantileTracker as QuantileTracker
from ._windowed import (
    WindowedDeviation as WindowedDeviation,
    WindowedQuantile as WindowedQuantile,
)
