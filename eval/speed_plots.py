"""Plots of growth: what was measured as points, what the law says as a line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmadapter.record import replacing

if TYPE_CHECKING:
    from eval.speed_growth import Curve
    from eval.speed_laws import Fit
    from eval.speed_rounds import Case

SIZE = (9, 3.4)  # inches
POINT, LINE = "#1f5fa8", "#c8553d"


def plot(path: Path, curve: Curve, case: Case, fits: dict[str, Fit]) -> None:
    """Draws time and memory of one curve beside each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (quantity, fit) in enumerate(fits.items(), 1):
        axes = figure.add_subplot(1, len(fits), place)
        points = [(int(s.contender), s.value) for s in case.samples if s.quantity == quantity]
        facts = case.facts[quantity]
        axes.plot(facts["sizes"], facts["expected"], color=LINE, label=facts["law"])
        axes.plot(*zip(*points, strict=True), "o", color=POINT, markersize=4, label="measured")
        axes.set(xlabel=curve.name, ylabel=quantity, title=f"r² {fit.r2:.3f}")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
