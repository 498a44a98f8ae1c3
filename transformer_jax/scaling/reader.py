"""Reading the columns of a table, with an account of every row that falls out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NoReturn

import numpy as np

from transformer_jax.errors import UserError, closest
from transformer_jax.scaling.files import Columns, number
from transformer_jax.scaling.groups import SAME
from transformer_jax.scaling.runs import DONE, Points, Run

_GUESS = 12.5  # nats: a uniform guess among 268,000 tokens
_SEEDS = 0.05  # share of the loss by which runs of the same N and D differ at most


def _no_column(columns: Columns, what: str, default: str) -> NoReturn:
    raise UserError(
        f"{columns.path} has no column '{default}': name the one that holds {what}.{closest(default, columns.cells)} "
        f"It has: {', '.join(columns.cells)}."
    )


class RowReader:
    """Reads columns and keeps account of the rows that fall out."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.keep = np.ones(len(columns.lines), bool)
        self.selected = self.keep
        self.reason = [""] * len(columns.lines)
        self.reasons: dict[str, list[int]] = {}
        for name, fine in (("status", DONE), ("excluded", ("false", "no", "0"))):
            column = columns.name("", name, "")
            for row, cell in enumerate(columns.cells[column] if column else []):
                text = str(cell).strip().lower()
                if text not in ("", "none", "nan", *fine):
                    self._exclude([row], f"{name}: {cell}")

    def _exclude(self, rows: Iterable[Any], reason: str) -> None:
        for row in rows:
            if self.keep[row]:
                self.keep[row] = False
                self.reason[row] = reason
                self.reasons.setdefault(reason, []).append(self.columns.lines[row])

    def select(self, where: tuple[str, ...]) -> None:
        """Keep the rows of `--where`."""
        for condition in where:
            name, equals, value = condition.rpartition("=")
            if not equals:
                raise UserError(f"--where '{condition}': write COLUMN=VALUE.")
            cells = self.columns.cells[self.columns.name(name, "", "--where") or ""]
            same = np.array([str(cell) == value or number(cell) == number(value) for cell in cells])
            if not same.any():
                have = list(dict.fromkeys(map(str, cells)))
                some = ", ".join(have[:8]) + (", ..." if len(have) > 8 else "")
                raise UserError(
                    f"--where '{condition}' keeps no row of {self.columns.path}.{closest(value, have)} "
                    f"'{name}' has: {some}."
                )
            self._exclude(np.flatnonzero(~same), f"not {condition} (--where)")
        self.selected = self.keep.copy()

    def find(self, asked: str, default: str, flag: str) -> tuple[str, np.ndarray] | None:
        """Find a column, or a product of columns and numbers, "Params (M)*1e6"; "log(ppl)" is a logarithm.

        Returns:
            The first column of it, and the values; None if nothing was asked for and there is no default column.
        """
        if not asked or asked in self.columns.cells:
            column = self.columns.name(asked, default, flag)
            return None if column is None else (column, np.array(self.columns.numbers(column)))
        first, values = "", np.ones(len(self.columns.lines))
        for part in re.split(r"\s*\*\s*", asked.strip()):
            logarithm = re.fullmatch(r"log\((.+)\)", part) if part not in self.columns.cells else None
            name = logarithm[1] if logarithm else part
            if name not in self.columns.cells and not math.isnan(number(name)):
                factor = np.full(len(values), number(name))
            else:
                column = self.columns.name(name, default, flag)
                assert column is not None
                first, factor = first or column, np.array(self.columns.numbers(column))
            with np.errstate(all="ignore"):
                values = values * (np.log(factor) if logarithm else factor)
        if not first:
            raise UserError(f"{flag} '{asked}': name a column; write COLUMN, COLUMN*1e6, COLUMN*COLUMN or log(COLUMN).")
        return first, values

    def optional(self, asked: str, default: str, flag: str, notes: list[str]) -> np.ndarray | None:
        """Read a column of positive numbers; a row without one is excluded."""
        found = self.find(asked, default, flag)
        if found is None:
            return None
        column, values = found
        notes.append(f"{default.upper() if len(default) == 1 else default} is '{asked or column}'")
        good = np.isfinite(values) & (values > 0)
        if not good[self.keep].any() and self.keep.any():
            row = int(np.flatnonzero(self.keep)[0])
            raise UserError(
                f"{self.columns.path}: column '{column}' holds no positive number (line {self.columns.lines[row]}: "
                f"'{self.columns.cells[column][row]}'); name another with {flag}."
            )
        self._exclude(np.flatnonzero(~good), f"'{asked or column}' is no positive finite number")
        return np.where(good, values, np.nan)

    def positive(self, asked: str, default: str, flag: str, notes: list[str]) -> np.ndarray:
        """Read a column that must be there."""
        values = self.optional(asked, default, flag, notes)
        if values is None:
            _no_column(self.columns, f"{'the loss' if default == 'loss' else 'the parameters'} ({flag})", default)
        return values

    def third_of(
        self, N: np.ndarray | None, D: np.ndarray | None, C: np.ndarray | None, factor: float, notes: list[str]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Derive the one of parameters, tokens and FLOPs that no column holds, or check that the three agree."""
        if N is not None and D is not None and C is not None:
            self.consistent(C / (6 * N * D), factor)
            return N, D, C
        if N is not None and D is not None:
            notes.append("C = 6ND, since no column holds the FLOPs")
            return N, D, 6 * N * D
        if N is not None and C is not None:
            notes.append("D = C / (6N), since no column holds the tokens")
            return N, C / (6 * N), C
        if D is not None and C is not None:
            notes.append("N = C / (6D), since no column holds the parameters")
            return C / (6 * D), D, C
        if N is None:
            _no_column(self.columns, "the parameters (--n)", "n")
        _no_column(self.columns, "the training tokens (--d) or the training FLOPs (--c)", "d")

    def mixed(self, points: Points, notes: list[str]) -> None:
        """Note losses that look like perplexities, and runs of the same N and D that differ by more than seeds."""
        typical = float(np.median(points.loss[self.keep])) if self.keep.any() else 0.0
        if typical > _GUESS:
            notes.append(f"a loss of {typical:.3g} looks like a perplexity: --loss 'log(COLUMN)' takes its logarithm")
        lowest: dict[tuple[float, float], float] = {}
        strange = 0
        for row in np.flatnonzero(self.keep):
            key, loss = (float(points.N[row]), float(points.D[row])), float(points.loss[row])
            other = lowest.setdefault(key, loss)
            strange += abs(math.log(loss / other)) > _SEEDS
        if strange:
            notes.append(
                f"{strange} rows have the N and D of an earlier one and a loss more than {_SEEDS:.0%} away: if the "
                "table mixes data sets or losses, --where selects one"
            )

    def consistent(self, ratio: np.ndarray, factor: float) -> None:
        """Exclude rows whose C is not 6ND."""
        if factor <= 1:
            raise UserError(f"--flops-factor must be above 1, got {factor:g}.")
        known = np.flatnonzero(self.keep)
        off = np.abs(np.log(ratio)) > np.log(factor)  # false for a NaN, which is excluded already
        if len(known) and off[known].all():
            raise UserError(
                f"{self.columns.path}: C is {np.median(ratio[known]):.3g} times 6ND (median), by more than the factor "
                f"{factor:g} in every row: mend a unit (--d 'COLUMN*1e9'), or raise --flops-factor."
            )
        self._exclude(np.flatnonzero(off), f"C differs from 6ND by more than a factor of {factor:g} (--flops-factor)")

    def runs(self, asked: str, notes: list[str]) -> tuple[list[str], np.ndarray]:
        """Return the names of the runs, and each row's; without a column, every row is a run and has no name."""
        column = self.columns.name(asked, "run", "--run")
        if column is None:
            return [], np.arange(len(self.columns.lines))
        cells = [str(cell) for cell in self.columns.cells[column]]
        index = {name: i for i, name in enumerate(dict.fromkeys(cells))}
        notes.append(f"rows with the same '{column}' are one run")
        return list(index), np.array([index[cell] for cell in cells])

    def duplicates(self, points: Points, named: bool) -> None:
        """Exclude rows that repeat an earlier one."""
        seen: dict[tuple[float, ...], float] = {}
        for row in np.flatnonzero(self.keep):
            N, D, loss = (float(values[row]) for values in (points.N, points.D, points.loss))
            key = (float(points.run[row]), N, D) if named else (N, D, loss)
            if key in seen:
                again = seen[key] == loss
                self._exclude(
                    [row], f"{'duplicate of' if again else 'same run and D but another loss than'} an earlier row"
                )
            seen.setdefault(key, loss)

    def one_size_each(self, points: Points, names: list[str]) -> None:
        """Refuse a column of run names that holds runs of several sizes."""
        first: dict[int, float] = {}
        for row in np.flatnonzero(self.keep) if names else ():
            run, N = int(points.run[row]), float(points.N[row])
            if abs(math.log(N / first.setdefault(run, N))) > SAME:
                raise UserError(
                    f"{self.columns.path}:{self.columns.lines[row]}: run '{names[run]}' has several sizes "
                    f"({first[run]:.4g} and {N:.4g}); --run must name a column that tells runs apart."
                )

    def unfinished(self, points: Points) -> None:
        """Exclude runs that end without a loss: an earlier loss of theirs must not pass for the last one."""
        known = np.flatnonzero(np.isfinite(points.D) & self.selected)
        last = known[points.take(known).last_of_each()]
        lost = points.run[last[np.isnan(points.loss[last])]]
        self._exclude(np.flatnonzero(np.isin(points.run, lost)), "its run ends without a finite loss")

    def drop_highest(self, points: Points, count: int) -> None:
        """Exclude whole runs by `--drop-highest-loss`."""
        if count < 0:
            raise UserError(f"--drop-highest-loss must be 0 or more, got {count}.")
        kept = np.flatnonzero(self.keep)
        last = kept[points.take(kept).last_of_each()]
        highest = points.run[last[np.argsort(-points.loss[last], kind="stable")[:count]]]
        reason = f"among the {count} highest losses (--drop-highest-loss)"
        self._exclude(kept[np.isin(points.run[kept], highest)], reason)

    def rows(self, points: Points, names: list[str]) -> list[Run]:
        """Return every row with its reason; fields of a runs table that the file has are kept."""
        known = {item.name for item in fields(Run)} - {"run", "n", "d", "c", "loss", "excluded"}
        extra = {name: cells for name, cells in self.columns.cells.items() if name in known}
        return [
            Run(
                run=names[points.run[row]] if names else f"line {line}",
                n=float(points.N[row]),
                d=float(points.D[row]),
                c=float(points.C[row]),
                loss=float(points.loss[row]),
                excluded=self.reason[row] or None,
                **{name: cells[row] for name, cells in extra.items()},
            )
            for row, line in enumerate(self.columns.lines)
        ]
