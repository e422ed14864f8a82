"""What a model is made of: a table of its parameters."""

from __future__ import annotations

import dataclasses
import html
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from .._core import trees

_HEADINGS = ("path", "shape", "dtype", "entries", "non-zeros", "sparsity", "bytes")


class Row(NamedTuple):
    """One leaf."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    entries: int
    nonzeros: int
    bytes: int

    @property
    def sparsity(self) -> float:
        """The share of zeros, 0 for a leaf without entries."""
        return 1 - self.nonzeros / self.entries if self.entries else 0.0


@dataclasses.dataclass(frozen=True)
class Report:
    """A table of parameters; `str` for a terminal, HTML in a notebook."""

    rows: tuple[Row, ...]

    @property
    def total(self) -> Row:
        """All leaves together."""
        return Row(
            "total",
            (),
            "",
            entries=sum(row.entries for row in self.rows),
            nonzeros=sum(row.nonzeros for row in self.rows),
            bytes=sum(row.bytes for row in self.rows),
        )

    def __str__(self) -> str:
        """Lays the table out in columns."""
        table = [_HEADINGS, *map(_cells, self.rows), _cells(self.total)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
        lines = [_line(cells, widths) for cells in table]
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def row(cells, tag):
            return "".join(
                f'<{tag} style="text-align:{"left" if i < 3 else "right"}">'
                f"{html.escape(cell)}</{tag}>"
                for i, cell in enumerate(cells)
            )

        body = "".join(f"<tr>{row(_cells(r), 'td')}</tr>" for r in self.rows)
        return (
            f"<table><thead><tr>{row(_HEADINGS, 'th')}</tr></thead><tbody>{body}"
            f"</tbody><tfoot><tr>{row(_cells(self.total), 'th')}</tr></tfoot></table>"
        )


def report(params: PyTree) -> Report:
    """Returns a table of the parameters of a network: entries, zeros, bytes.

    Use it at the end of a training, not in its loop: zeros are counted on the host.
    Bytes are those of the dense arrays.

    Args:
        params: a Linen tree, an NNX module or state, or any tree of arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.report({"Dense_0": {"kernel": jnp.array([[1.0, 0.0], [0.0, 0.0]])}})
        path            shape  dtype    entries  non-zeros  sparsity  bytes
        ───────────────────────────────────────────────────────────────────
        Dense_0/kernel  2×2    float32        4          1    75.0 %     16
        ───────────────────────────────────────────────────────────────────
        total                                 4          1    75.0 %     16
    """
    leaves = trees.by_path(params).items()
    return Report(tuple(_row(path, leaf) for path, leaf in leaves if _is_array(leaf)))


def _is_array(leaf: object) -> bool:
    # Not a random key, which an NNX module holds beside its parameters.
    return hasattr(leaf, "nbytes") and trees.is_number(leaf)


def _row(path: str, leaf) -> Row:
    array = np.asarray(leaf)
    nonzeros = int(np.count_nonzero(array))
    return Row(path, array.shape, str(array.dtype), array.size, nonzeros, array.nbytes)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.path,
        "×".join(map(str, row.shape)),
        row.dtype,
        f"{row.entries:,}",
        f"{row.nonzeros:,}",
        f"{row.sparsity:.1%}".replace("%", " %"),
        f"{row.bytes:,}",
    )


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    pads = ("<", "<", "<", ">", ">", ">", ">")
    columns = zip(cells, pads, widths, strict=True)
    return "  ".join(f"{cell:{pad}{width}}" for cell, pad, width in columns).rstrip()
