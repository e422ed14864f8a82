"""The tables and the plot of what `methods.py` has trained."""

import argparse
import itertools
import json
import math
import pathlib
import statistics

from matplotlib import pyplot as plt, ticker

from .methods import N_OF_M, SPARSITIES, gradual, others, swept, targeted


def tables(results):
    """Returns a table for each network as Markdown."""
    parts = []
    for work, row in results.items():
        what = "loss" if work == "transformer" else "error, %"
        runs = row["dense"]["0.0"]
        heads = " | ".join(f"{100 * s:g} %" for s in SPARSITIES)
        lines = [
            f"### {work}: held-out {what} (dense: {_mean(runs):.2f})\n",
            f"| method | {heads} | time, of dense | seeds |",
            "| ------ |" + " ---: |" * (len(SPARSITIES) + 2),
        ]
        names = [name for name in [*targeted(), *swept()] if row.get(name)]
        lines += [_line(name, row[name], _mean(runs, "seconds")) for name in names]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(name, cells, dense):
    is_aimed = name in targeted() and name != N_OF_M
    cell = _reached if is_aimed else _between
    scores = " | ".join(cell(sparsity, cells) for sparsity in SPARSITIES)
    every = [run for runs in cells.values() for run in runs if "seconds" in run]
    ratios = [run["seconds"] / run.get("dense", dense) for run in every]
    ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
    seeds = min(map(len, cells.values()))
    return f"| {name} | {scores} | {ratio} | {seeds} |"


def _reached(sparsity, cells):
    """Returns the mean score of a cell, and the zeros if they are not those asked."""
    runs = cells.get(str(sparsity))
    if not runs:
        return ""
    zeros = _mean(runs, "zeros")
    is_off = abs(zeros - sparsity) > 0.005
    return f"{_mean(runs):.2f}" + (f" ({100 * zeros:.1f} %)" if is_off else "")


def _between(sparsity, cells):
    """Returns a score interpolated between neighbors that are not too far apart."""
    for (share, score), (next_share, next_score) in itertools.pairwise(_points(cells)):
        if not share <= sparsity <= next_share:
            continue
        whole = math.log(1 - share) - math.log(1 - next_share)
        if whole > 2.5 or next_score > 3 * score:
            return ""
        part = math.log(1 - share) - math.log(1 - sparsity)
        middle = score + (next_score - score) * (part / whole if whole else 0)
        return f"~{middle:.2f}"
    return ""


def _points(cells):
    """Returns mean sparsities, below one and rising, with their mean scores."""
    cells = [runs for runs in cells.values() if runs]
    points = sorted((_mean(runs, "zeros"), _mean(runs)) for runs in cells)
    return [point for point in points if point[0] < 0.9995]


def _mean(runs, what="score"):
    return statistics.mean(run[what] for run in runs)


def plot(results, path):
    """Draws score against sparsity for each network, one line a method.

    Above what prunes a dense network while it trains, in the middle what is sparse from
    the start or pruned at once, below what takes a strength.
    """
    groups = gradual(), others(), swept()
    size = (5 * len(results) + 3, 5 * len(groups))
    figure, axes = plt.subplots(
        len(groups), len(results), figsize=size, sharey="col", squeeze=False
    )
    for own, line in zip(groups, axes, strict=True):
        for part, (work, row) in zip(line, results.items(), strict=True):
            _draw(part, work, row, list(own))
        line[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def _draw(part, work, row, names):
    dense = _mean(row["dense"]["0.0"])
    part.axhline(dense, color="black", linewidth=1, label="dense")
    highest = 4 if work == "transformer" else 60  # beyond that a network is dead
    for i, name in enumerate(names):
        points = [
            (1 / (1 - share), score)
            for share, score in _points(row.get(name, {}))
            if 0.74 < share < 0.987 and score < highest
        ]
        part.plot(
            [inverse for inverse, _ in points],
            [score for _, score in points],
            color=plt.get_cmap("tab20").colors[i],
            marker="os^vD"[i % 5],
            label=name,
        )
    part.set_title(work)
    part.set_xscale("log")
    part.set_xlim(3.7, 80)
    part.set_xticks([1 / (1 - s) for s in SPARSITIES])
    part.set_xticklabels([f"{100 * s:g}" for s in SPARSITIES])
    part.minorticks_off()
    part.set_xlabel("zeros in the kernels, %")
    part.set_yscale("log")
    part.set_ylabel("held-out loss" if work == "transformer" else "held-out error, %")
    part.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    part.yaxis.set_minor_formatter(ticker.StrMethodFormatter("{x:g}"))


def main():
    """Prints the tables and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=pathlib.Path, help="a JSON file")
    parser.add_argument("plot", type=pathlib.Path, help="a PNG file")
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    print(tables(results))
    plot(results, options.plot)


if __name__ == "__main__":
    main()
