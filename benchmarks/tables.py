"""Rows of measurements as tables, for the terminal and for Markdown."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.table import Table as RichTable

Row = dict[str, Any]


class Column(NamedTuple):
    """A column: its heading, and what to write for a row."""

    heading: str
    text: Callable[[Row], str]


class Table(NamedTuple):
    """A table with a sentence on how to read it."""

    title: str
    note: str
    columns: list[Column]
    rows: list[Row]

    def cells(self) -> list[list[str]]:
        return [[column.text(row) for column in self.columns] for row in self.rows]


def rich_table(table: Table) -> RichTable:
    out = RichTable(title=table.title, caption=table.note, title_justify="left", caption_justify="left")
    for i, column in enumerate(table.columns):
        out.add_column(column.heading, justify="left" if i == 0 else "right")
    for cells in table.cells():
        out.add_row(*cells)
    return out


def markdown(table: Table) -> str:
    lines = [[column.heading for column in table.columns], ["---"] + ["---:"] * (len(table.columns) - 1)]
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines + table.cells())
    return f"## {table.title}\n\n{table.note}\n\n{body}\n"


def text(heading: str, key: str) -> Column:
    return Column(heading, lambda row: str(row.get(key, "-")))


def number(heading: str, key: str, form: str = ".3g", scale: float = 1.0) -> Column:
    return Column(heading, lambda row: _format(row.get(key), form, scale))


def _format(value: Any, form: str, scale: float) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return format(value if scale == 1.0 else value * scale, form)


SOLVERS = [
    text("problem", "problem"), number("batch", "batch", "d"), text("solver", "solver"),
    number("forward [ms]", "forward", ".3g", 1e3), number("backward [ms]", "backward", ".3g", 1e3),
    number("both, per sample [ms]", "both_per_sample", ".3g", 1e3),
    number("forward, per sample [ms]", "forward_per_sample", ".3g", 1e3),
    number("iterations, median", "iterations", "g"), number("max", "iterations_max", "d"),
    number("converged", "converged", ".0%"), number("residual, max", "residual", ".0e"),
    number("KKT residual, ours", "kkt_residual", ".0e"), number("cost gap, median", "gap_median", ".0e"),
    number("max", "gap_max", ".0e"),
    number("repetitions", "repetitions", "d"),
]  # fmt: skip
SETUP = [
    text("problem", "problem"), number("batch", "batch", "d"), text("solver", "solver"),
    number("set-up [s]", "setup", ".2g"), number("first solve [s]", "first_forward", ".3g"),
    number("as CPU time [s]", "first_forward_cpu", ".3g"), number("first with gradient [s]", "first_both", ".3g"),
    number("as CPU time [s]", "first_both_cpu", ".3g"), number("memory [MiB]", "memory", ".3g"),
    text("kind of memory", "memory_kind"),
]  # fmt: skip
RATIOS = [
    text("problem", "problem"), number("batch", "batch", "d"), text("sartor", "sartor"), text("peer", "peer"),
    number("forward", "forward", ".3g"), number("forward + backward", "both", ".3g"),
    number("backward", "backward", ".3g"), number("converged, sartor", "converged", ".0%"),
    number("peer", "peer_converged", ".0%"), number("repetitions of the peer", "repetitions", "d"),
]  # fmt: skip
COLD = [
    text("problem", "problem"), number("batch", "batch", "d"), text("solver", "solver"),
    number("forward [ms]", "forward", ".3g", 1e3), number("solves per second", "rate", ".4g"),
    number("iterations, median", "iterations", "g"), number("max", "iterations_max", "d"),
    number("converged", "converged", ".0%"), number("KKT residual, max", "residual", ".0e"),
    number("violation, max", "violation", ".0e"), number("cost gap, median", "gap_median", ".0e"),
    number("max", "gap_max", ".0e"), number("repetitions", "repetitions", "d"),
]  # fmt: skip
REAL_TIME = [
    text("solver", "solver"), number("step [µs]", "step", ".4g", 1e6), number("90 % [µs]", "step_90", ".4g", 1e6),
    number("feedback alone [µs]", "feedback", ".4g", 1e6), number("sartor / acados", "ratio", ".3g"),
    number("|u0 - acados|, max", "to_acados", ".0e"), number("|u0 - optimum|, median", "to_optimum", ".1e"),
    number("max", "to_optimum_max", ".1e"), number("QP solved", "solved", ".0%"),
    number("first call [s]", "first", ".3g"), number("as CPU time [s]", "first_cpu", ".3g"),
]  # fmt: skip
UNROLL = [
    text("solver", "solver"), number("iterations", "iterations", "d"),
    number("implicit: forward [ms]", "forward", ".3g", 1e3), number("backward [ms]", "backward", ".3g", 1e3),
    number("unroll: forward [ms]", "unroll_forward", ".3g", 1e3),
    number("backward [ms]", "unroll_backward", ".3g", 1e3),
    number("gradients differ by", "difference", ".0e"),
]  # fmt: skip
COMPILE = [
    text("solver", "solver"), number("N", "horizon", "d"), number("solve [s]", "first_forward", ".3g"),
    number("as CPU time [s]", "first_forward_cpu", ".3g"), number("with gradient [s]", "first_both", ".3g"),
    number("as CPU time [s]", "first_both_cpu", ".3g"),
]  # fmt: skip
