"""What one look says: ok, failed with its remedy, or unchecked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    status: Literal["ok", "failed", "unchecked"]
    detail: str
    mend: str = ""


def ok(name: str, detail: str) -> Check:
    """Return a check that passed."""
    return Check(name, "ok", detail)


def failed(name: str, detail: str, mend: str) -> Check:
    """Return a check that did not."""
    return Check(name, "failed", detail, mend)


def unchecked(name: str, why: str) -> Check:
    """Return a check that could not be made; it is never taken for passed."""
    return Check(name, "unchecked", why)
