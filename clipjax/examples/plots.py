"""Pictures of a training run."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from .train import History

_BLUE, _ORANGE, _RED, _GRAY = "tab:blue", "tab:orange", "tab:red", "silver"


def training(history: History, *, title: str = "") -> Figure:
    """Draws loss, gradient norm with its threshold, and sparsity against the steps.

    Args:
        history: arrays with one entry for each step, as `train.joined` gives them;
            `loss` and `norm` must be there, `threshold` and `sparsity` may be.
        title: what to write above.
    """
    figure = Figure(figsize=(8, 8), layout="constrained")
    loss, norm, sparsity = figure.subplots(3, sharex=True)
    loss.set_title(title)
    _curve(loss, history["loss"], label="loss")
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


def png(figure: Figure) -> bytes:
    """The picture as a file.

    Args:
        figure: what `training` drew.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _norms(axes: Axes, history: History) -> None:
    norm = history["norm"]
    _curve(axes, norm, label="gradient norm")
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
        axes.plot(_steps(bound), bound, color=_RED, linewidth=1.2, label="threshold")


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


def _curve(axes: Axes, values: np.ndarray, *, label: str) -> None:
    """The values in a pale line, and their running mean in a strong one."""
    width = max(len(values) // 100, 1)
    mean = np.convolve(values, np.ones(width) / width, mode="valid")
    middle = np.arange(len(mean)) + (width + 1) / 2
    axes.plot(_steps(values), values, color=_BLUE, alpha=0.3, linewidth=0.8)
    label = label if width == 1 else f"{label} (mean of {width} steps)"
    axes.plot(middle, mean, color=_BLUE, label=label)
    axes.set_ylabel(label.partition(" (")[0])


def _plain_log(axes: Axes) -> None:
    """A logarithmic axis whose numbers read 0.2 and not 2 × 10⁻¹."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _steps(values: np.ndarray) -> np.ndarray:
    return np.arange(1, len(values) + 1)
