"""Pictures of a training run, and of sides compared."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from .train import History

_BLUE, _ORANGE, _RED, _GRAY = "tab:blue", "tab:orange", "tab:red", "silver"
_SIDES = {"optax": _ORANGE, "clipjax": _BLUE}  # the same in every picture
_OTHERS = ("tab:green", "tab:red", "tab:purple", "tab:brown", "tab:gray")

Panels = Mapping[str, Mapping[str, Sequence[float] | np.ndarray]]


def training(
    history: History, *, title: str = "", dense_loss: np.ndarray | None = None
) -> Figure:
    """Draws loss, gradient norm with its threshold, and sparsity against the steps.

    Args:
        history: arrays with one entry for each step, as `train.joined` returns them;
            `loss` and `norm` are needed, `threshold` and `sparsity` are drawn if given.
        title: the title of the picture.
        dense_loss: the loss of the same network without pruning, for comparison.
    """
    figure = Figure(figsize=(8, 8), layout="constrained")
    loss, norm, sparsity = figure.subplots(3, sharex=True)
    loss.set_title(title, parse_math=False)  # a $ may be in the name of a folder
    if dense_loss is not None:
        _curve(loss, dense_loss, label="dense", color=_ORANGE)
    _curve(loss, history["loss"], label="sparse" if "sparsity" in history else "dense")
    loss.set_ylabel("loss")
    _norms(norm, history)
    _sparsities(sparsity, history)
    sparsity.set_xlabel("step")
    for axes in (loss, norm):
        _plain_log(axes)
    for axes in (loss, norm, sparsity):
        axes.set_xlim(0, len(history["loss"]))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize=9)
    return figure


def lines(
    panels: Panels,
    x: Sequence[float],
    *,
    title: str,
    labels: tuple[str, str],
    logs: str,
) -> Figure:
    """Draws curves against the same numbers, in panels beside each other.

    Later curves are thinner, so that one that is covered can still be seen.  An
    infinite value becomes a triangle at the top.

    Args:
        panels: from the title of each panel to its curves, by their names.
        x: the numbers to draw the curves against.
        title: the title of the picture.
        labels: the labels of the two axes.
        logs: which axes are logarithmic: "x", "y", or "%" for a y with plain numbers.
    """
    figure = Figure(figsize=(max(9, 3.6 * len(panels)), 4.2), layout="constrained")
    figure.suptitle(title)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, curves) in zip(row, panels.items(), strict=True):
        axes.set(title=name, xlabel=labels[0])
        if "x" in logs:
            axes.set_xscale("log")
        if "y" in logs:
            axes.set_yscale("log")
        if "%" in logs:
            _plain_log(axes)
        for i, (side, values) in enumerate(curves.items()):
            _line(axes, np.asarray(x), np.asarray(values), side, order=i)
        axes.grid(alpha=0.3)
    row[0].set_ylabel(labels[1])
    handles, names = row[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False)
    return figure


def bars(
    groups: Mapping[str, Mapping[str, float]], *, title: str, label: str, unit: str
) -> Figure:
    """Draws bars to the right, grouped, with their numbers beside them.

    Args:
        groups: from the name of each group to its numbers, by the names of the sides.
        title: the title of the picture.
        label: the label of the axis.
        unit: the format of a number, such as "{:.2f}".
    """
    sides = list(next(iter(groups.values())))
    places, height = np.arange(len(groups)), 0.8 / len(sides)
    figure = Figure(figsize=(8, 1.4 + 0.28 * len(groups) * len(sides)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for i, side in enumerate(sides):
        values = [group[side] for group in groups.values()]
        color = _SIDES.get(side, _OTHERS[i % len(_OTHERS)])
        drawn = axes.barh(places + i * height, values, height * 0.9, color=color)
        drawn.set_label(side)
        axes.bar_label(drawn, [unit.format(v) for v in values], padding=3, fontsize=9)
    axes.set_yticks(places + 0.4 - height / 2, groups)
    axes.invert_yaxis()
    axes.set(title=title, xlabel=label)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def png(figure: Figure) -> bytes:
    """The picture as a file.

    Args:
        figure: the picture.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _norms(axes: Axes, history: History) -> None:
    norm = history["norm"]
    axes.plot(_steps(norm), norm, color=_BLUE, linewidth=0.9, label="before the clip")
    axes.set_ylabel("gradient norm")
    seen = norm[np.isfinite(norm) & (norm > 0)]
    if seen.size:  # what a threshold does before it knows any norm is of no interest
        axes.set_ylim(seen.min() / 1.5, seen.max() * 1.5)
    if "clipped_norm" in history:
        cut = np.flatnonzero(history["clipped_norm"] < norm)
        dots = {"marker": ".", "linestyle": "", "markersize": 3, "color": _ORANGE}
        axes.plot(cut + 1, norm[cut], label=f"clipped ({cut.size:,} steps)", **dots)
    if "threshold" in history:
        bound = history["threshold"]
        bound = np.where(np.isfinite(bound), bound, np.nan)  # gaps, not cliffs
        axes.plot(_steps(bound), bound, color=_RED, linewidth=1.5, label="threshold")


def _sparsities(axes: Axes, history: History) -> None:
    if "sparsity" in history:
        whole = history["sparsity"]
        axes.plot(_steps(whole), whole, color=_GRAY, linewidth=5, label="together")
    leaves = [name for name in history if name.startswith("sparsity/")]
    for name in leaves[:8] if len(leaves) > 1 else []:  # more lines would say nothing
        label = name.removeprefix("sparsity/")
        axes.plot(_steps(history[name]), history[name], linewidth=1.2, label=label)
    axes.set(ylabel="sparsity", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _curve(axes: Axes, values: np.ndarray, *, label: str, color: str = _BLUE) -> None:
    """The values in a pale line, and their running mean in a strong one."""
    width = max(len(values) // 100, 1)
    mean = np.convolve(values, np.ones(width) / width, mode="valid")
    middle = np.arange(len(mean)) + (width + 1) / 2
    axes.plot(_steps(values), values, color=color, alpha=0.3, linewidth=0.8)
    label = label if width == 1 else f"{label} (mean of {width} steps)"
    axes.plot(middle, mean, color=color, label=label)


def _line(
    axes: Axes, x: np.ndarray, values: np.ndarray, side: str, *, order: int
) -> None:
    color = _SIDES.get(side, _OTHERS[order % len(_OTHERS)])
    shown = np.where(np.isfinite(values), values, np.nan)
    mark = "o" if len(x) < 30 and np.ptp(values) > 0 else ""
    width = max(4.5 - 1.5 * order, 1.5)
    axes.plot(x, shown, color=color, marker=mark, linewidth=width, label=side)
    for place in x[np.isinf(values)]:
        top = axes.get_xaxis_transform()
        axes.plot(place, 0.97, "^", color=color, markersize=10, transform=top)
        offset = {"xytext": (-8, -4), "textcoords": "offset points", "ha": "right"}
        axes.annotate("infinite", (place, 0.97), xycoords=top, color=color, **offset)


def _plain_log(axes: Axes) -> None:
    """A logarithmic axis whose numbers read 0.2 and not 2 × 10⁻¹."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _steps(values: np.ndarray) -> np.ndarray:
    return np.arange(1, len(values) + 1)
