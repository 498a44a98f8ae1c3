"""Kaplan's exponent from Chinchilla's law, computed: no training (Pearce and Song 2024).

Kaplan 2020 counted parameters without embeddings and found N* ~ C^0.73, Chinchilla 2022 counted all and found 0.50.
Take Chinchilla's law for granted, count as Kaplan did, at the sizes Kaplan trained: what exponent comes out?

    python -m experiments.kaplan_from_chinchilla

writes `kaplan_from_chinchilla.json` and `.png` into experiments/results (or the folder given).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transformer_jax.logs import say
from transformer_jax.provenance import provenance
from transformer_jax.scaling.plots import COLORS, INK, log_axis, panels

OMEGA = 47_491.0
"""N_T = N_E + OMEGA N_E^(1/3): 32,000 tokens, width over depth of 39.2 (Pearce and Song 2024, section 3.1)."""
SIZES = np.geomspace(10**2.9, 10**9.2, 20)
"""Kaplan's models, "768 to 1.5 billion non-embedding parameters", as Pearce and Song space them."""
FLOPS, FLOPS_TOTAL = (10**12.95, 10**20.7), (10**13.4, 10**20.7)
"""The budgets at which those are best, by C_E = 6 N_E D and by C_T = 6 N_T D (Pearce and Song 2024)."""


@dataclass(frozen=True)
class Surface:
    """L = E + A/N_T^alpha + B/D^beta."""

    A: float
    B: float
    E: float
    alpha: float
    beta: float

    def loss(self, N_E: np.ndarray, D: np.ndarray) -> np.ndarray:
        """Return the loss of a model that has N_E parameters besides its embeddings."""
        return self.E + self.A / total(N_E) ** self.alpha + self.B / D**self.beta

    def flops_at_best(self, N_E: np.ndarray) -> np.ndarray:
        """Return the budget C_E = 6 N_E D at which N_E is the best size.

        At fixed C_E the loss is stationary in log N_E where alpha A N_T^-alpha s = beta B D^-beta, with s the slope of
        log N_T against log N_E; that gives D, and D gives C_E.
        """
        slope = (N_E + OMEGA / 3 * np.cbrt(N_E)) / total(N_E)
        left = self.alpha * self.A * total(N_E) ** -self.alpha * slope
        return 6 * N_E * (self.beta * self.B / left) ** (1 / self.beta)

    def exponent(self, N_E: np.ndarray) -> np.ndarray:
        """Return the local exponent d log N_E* / d log C_E."""
        step = 1e-4
        above, below = self.flops_at_best(N_E * np.exp(step)), self.flops_at_best(N_E * np.exp(-step))
        return 2 * step / np.log(above / below)


SURFACES = {
    "Besiroglu 2024": Surface(482.01, 2085.43, 1.8172, 0.3478, 0.3658),
    "Hoffmann 2022": Surface(406.4, 410.7, 1.6934, 0.3392, 0.2849),
}
"""Published fits of Chinchilla's runs."""


def total(N_E: np.ndarray) -> np.ndarray:
    """Return all parameters of a model that has N_E besides its embeddings."""
    return N_E + OMEGA * np.cbrt(N_E)


def fitted_exponent(x: np.ndarray, y: np.ndarray) -> float:
    """Return the slope of log y against log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def best_of(surface: Surface, C: np.ndarray, sizes: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Return, at each budget, the count of the best of some models, as an envelope of training curves finds it.

    Args:
        surface: the law.
        C: budgets by 6 x counted parameters x tokens.
        sizes: parameters of the models without embeddings.
        counted: what is counted as their parameters.
    """
    losses = surface.loss(sizes[:, None], C / (6 * counted[:, None]))
    return counted[losses.argmin(0)]


def results(surface: Surface) -> dict[str, Any]:
    """Return the exponents of one surface."""
    C = np.geomspace(*FLOPS, 500)
    N_E = np.geomspace(1e2, 1e12, 4000)
    along = surface.flops_at_best(N_E)
    C_T = np.geomspace(*FLOPS_TOTAL, 500)
    return {
        "all parameters, any scale": surface.beta / (surface.alpha + surface.beta),
        "non-embedding, local exponent": {
            f"{size:.3g}": float(surface.exponent(np.array([size]))[0])
            for size in (SIZES[0], 1e6, 1e8, SIZES[-1], 1e11)
        },
        "non-embedding, line over Kaplan's range": fitted_exponent(
            C, np.exp(np.interp(np.log(C), np.log(along), np.log(N_E)))
        ),
        "non-embedding, best of 20 models": fitted_exponent(C, best_of(surface, C, SIZES, SIZES)),
        "all parameters, best of the same 20 models": fitted_exponent(C_T, best_of(surface, C_T, SIZES, total(SIZES))),
    }


def main(folder: Path) -> None:
    """Compute, draw, write."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: results(surface) for name, surface in SURFACES.items()}
    published = {
        "Kaplan 2020": 0.73,
        "Pearce and Song 2024, Besiroglu's law": 0.78,
        "Pearce and Song 2024, Hoffmann's": 0.74,
    }
    figures = {"exponents": found, "published": published, "omega": OMEGA, "flops": FLOPS, "provenance": provenance()}
    path = folder / "kaplan_from_chinchilla.json"
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    draw(folder / "kaplan_from_chinchilla.png")
    for name, exponents in found.items():
        for what, value in exponents.items():
            say(f"{name}: {what}: {value if isinstance(value, dict) else round(value, 3)}")
    say(f"wrote {path} and the picture beside it")


def draw(path: Path) -> None:
    """Draw N_E* against C_E, and the local exponent against N_E."""
    figure, grid = panels(2, 5.8, 4.4)
    left, right = grid[0]
    N_E = np.geomspace(1e2, 1e12, 400)
    C = np.geomspace(*FLOPS, 500)
    for (name, surface), color in zip(SURFACES.items(), (COLORS["A3"], COLORS["A1"]), strict=True):
        left.plot(surface.flops_at_best(N_E), N_E, color=color, lw=1.8, label=f"best size, law of {name}")
        left.plot(C, best_of(surface, C, SIZES, SIZES), ".", color=color, markersize=2.5)
        right.plot(N_E, surface.exponent(N_E), color=color, lw=1.8, label=name)
        right.axhline(surface.beta / (surface.alpha + surface.beta), color=color, lw=1, ls=":")
    middle = np.sqrt(FLOPS[0] * FLOPS[1])
    anchor = np.interp(np.log(middle), np.log(SURFACES["Besiroglu 2024"].flops_at_best(N_E)), np.log(N_E))
    left.plot(
        C,
        np.exp(anchor) * (C / middle) ** 0.73,
        color=COLORS["kaplan"],
        lw=1.6,
        ls="--",
        label="slope 0.73 (Kaplan 2020)",
    )
    left.plot([], [], ".", color=INK, label="best of 20 models of Kaplan's range")
    left.set(xlabel=r"$C_E = 6 N_E D$ (FLOPs)", ylabel=r"best non-embedding parameters $N_E$", xlim=(1e11, 1e25))
    right.axhline(0.73, color=COLORS["kaplan"], lw=1.6, ls="--", label="0.73 (Kaplan 2020)")
    right.axvspan(SIZES[0], SIZES[-1], color="#eeeeee", linewidth=0)
    right.text(np.sqrt(SIZES[0] * SIZES[-1]), 0.42, "Kaplan's models", ha="center", color=INK)
    right.plot([], [], ":", color=INK, label="all parameters counted")
    right.set(
        xlabel=r"non-embedding parameters $N_E$", ylabel=r"local exponent of $N_E^* \propto C_E^g$", ylim=(0.4, 1.0)
    )
    for axes in (left, right):
        log_axis(axes, "x")
        axes.legend(frameon=False, fontsize=8.5)
    log_axis(left, "y")
    left.set_ylim(1e2, 1e12)
    figure.savefig(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("results"))
