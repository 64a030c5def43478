"""Pictures of a training run, drawn from its log: the losses, the gates, and curves of several runs side by side.

Shapes: L adapted layers, H query heads (1 where a layer has one gate for all), S validations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmadapter.captions import read_text
from mmadapter.record import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Curve = Sequence[tuple[int, float]]

# Told apart by the colour-blind too (Okabe and Ito, "Color Universal Design", 2008); the yellow is left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DOTS_PER_INCH = 120
SMOOTHING = 25  # a running mean is over this fraction of the curve
MAPS = 4  # of the gates, evenly spaced over a run, its end among them
FEW_POINTS = 30  # so many are drawn as points joined by a line


def draw_loss(log: Path, out: Path) -> bool:
    """Draws training loss, its running mean, validation loss and learning rate over the steps.

    Args:
        log: A run's `log.jsonl`; the run is called by the name of its folder. Of a step that stands there twice, as in
            the log of a resumed run, the later line counts.
        out: The PNG to write.

    Returns:
        Whether there was a loss to draw; without one no file is written.

    Raises:
        FileNotFoundError: There is no such log.
        ValueError: A line of it is not a JSON object; the last line may be unfinished.
    """
    lines = _read_log(log)
    train, validation, rate = (_curve(lines, key) for key in ("loss", "val_loss", "lr"))
    if not train and not validation:
        return False
    figure = _figure(8.0, 5.0 if rate else 4.2, _run_name(log))
    if rate:
        top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (5, 1)})
        bottom.fill_between(*_columns(rate), color="0.88", linewidth=0)
        bottom.plot(*_columns(rate), color="0.55", linewidth=1)
        bottom.set_ylim(bottom=0)
        bottom.locator_params(axis="y", nbins=2)
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        bottom.yaxis.get_offset_text().set_size("x-small")
        bottom.set_ylabel("learning\nrate", color="0.4")
    else:
        top = bottom = figure.subplots()
    if train:
        steps, losses = _columns(train)
        if len(losses) < 2 * SMOOTHING:  # too short for a mean that differs
            top.plot(steps, losses, color=COLOURS[0], linewidth=1.4, label="training", **_marker(steps))
        else:
            top.plot(steps, losses, color=COLOURS[0], alpha=0.35, linewidth=0.7, label="training")
            top.plot(steps, _running_mean(losses), color=COLOURS[0], linewidth=1.8, label="training, running mean")
    if validation:
        top.plot(*_columns(validation), color=COLOURS[1], linewidth=1.4, marker="o", markersize=4, label="validation")
    top.set_ylabel("loss")
    top.legend(frameon=False)
    bottom.set_xlabel("step")
    for axes in {top, bottom}:
        _tidy(axes)
    _whole_numbers(bottom)
    _write(figure, out)
    return True


def draw_gates(log: Path, out: Path) -> bool:
    """Draws phi(g) over time: maps of every layer and head at up to `MAPS` steps, and the mean size of each layer's.

    Layers are numbered from the base model's first where the log's first line has `base_layers`, else from the lowest
    adapted one.

    Args:
        log: A run's `log.jsonl`, as for `draw_loss`.
        out: The PNG to write.

    Returns:
        Whether the log holds gates; without them no file is written.

    Raises:
        FileNotFoundError: There is no such log.
        ValueError: A line of it is not a JSON object, or two lines have gates of different shapes.
    """
    lines = _read_log(log)
    by_step = sorted({line["step"]: line["gates"] for line in lines if "gates" in line}.items())
    if not by_step:
        return False
    shapes = {tuple(len(layer) for layer in gates) for _, gates in by_step}
    if len(shapes) > 1 or len(set(*shapes)) != 1:
        raise ValueError(f"{log}: gates must be layers x heads of one shape in all lines; is it the log of one run?")
    steps = [step for step, _ in by_step]
    gates = np.array([gates for _, gates in by_step], dtype=float)  # [S, L, H]
    _, layers, heads = gates.shape
    base_layers = next((line["base_layers"] for line in lines if "base_layers" in line), layers)
    numbers = np.arange(base_layers - layers, base_layers) + 1  # [L]

    mapped = np.unique(np.linspace(0, len(steps) - 1, MAPS + 1).round().astype(int)[1:])  # the last is always there
    wide = min(1.3, 0.35 + 0.1 * heads)  # of one gate a layer a wide map would be stripes
    figure = _figure(5.0 + 2.0 * wide * len(mapped), 4.8, _run_name(log))
    *maps, right = figure.subplots(1, len(mapped) + 1, gridspec_kw={"width_ratios": (*(wide for _ in mapped), 2.5)})
    _draw_maps(figure, maps, [steps[index] for index in mapped], gates[mapped], numbers)
    _draw_sizes(figure, right, steps, np.abs(gates).mean(axis=2), numbers)
    right.set_title("mean |φ(g)| of each layer" if heads > 1 else "|φ(g)| of each layer", fontsize="medium")
    _write(figure, out)
    return True


def _draw_maps(figure: Figure, maps: Sequence[Axes], steps: Sequence[int], gates: np.ndarray, numbers: np.ndarray):
    """A map of layers by heads for each of the steps, all in one scale; gates [S, L, H], numbers of the layers [L]."""
    heads = gates.shape[2]
    limit = np.abs(gates).max() or 1.0  # gates that have not left zero are white, not an empty range
    for axes, step, values in zip(maps, steps, gates, strict=True):
        image = axes.imshow(
            values,
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            aspect="auto",
            origin="lower",  # the topmost layer on top
            extent=(0.5, heads + 0.5, numbers[0] - 0.5, numbers[-1] + 0.5),
            interpolation="nearest",
        )
        axes.set_title(f"step {step}", fontsize="medium")
        _whole_numbers(axes, axis="y")
        axes.tick_params(labelleft=axes is maps[0])
        if heads > 1:
            axes.set_xlabel("head")
            _whole_numbers(axes)
        else:
            axes.set_xlabel("all heads")
            axes.set_xticks([])
    maps[0].set_ylabel("layer")
    figure.colorbar(image, ax=maps[-1], label="φ(g)", aspect=35)


def _draw_sizes(figure: Figure, axes: Axes, steps: Sequence[int], size: np.ndarray, numbers: np.ndarray):
    """The lines of each layer's mean size over the steps; size [S, L], numbers of the layers [L]."""
    from matplotlib.colors import Normalize

    colours = _colour_map("viridis", 0.0, 0.93)  # its last yellows are hard to see on white
    scale = Normalize(numbers[0], numbers[-1])
    for layer, number in enumerate(numbers):
        axes.plot(steps, size[:, layer], color=colours(scale(number)), linewidth=1.2, **_marker(steps))
    if len(numbers) > 1:
        from matplotlib.cm import ScalarMappable

        bar = figure.colorbar(ScalarMappable(scale, colours), ax=axes, label="layer", aspect=35)
        _whole_numbers(bar.ax, axis="y")
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    _whole_numbers(axes)
    _tidy(axes)


def bands(named: Mapping[str, Sequence[Curve]], out: Path, *, xlabel: str, ylabel: str, title: str) -> None:
    """Draws a line for each name, the mean over its curves (say, seeds), in a band from their least to their greatest.

    Args:
        named: For each name its curves, each of (x, y); means are over the x that all curves of a name have.
        out: The PNG to write.

    Raises:
        ValueError: There is no name, or one whose curves have no x in common.
    """
    if not named:
        raise ValueError("there are no curves to draw; give at least one name with its curves")
    figure = _figure(8.0, 4.8, title)
    axes = figure.subplots()
    ranking = _colour_map("viridis", 0.0, 0.93)
    for index, (name, curves) in enumerate(named.items()):
        values = [dict(curve) for curve in curves]
        x = sorted(set(values[0]).intersection(*values)) if values else []
        if not x:
            raise ValueError(
                f"the {len(values)} curves of {name!r} have no point in common; give ones of the same steps"
            )
        y = np.array([[curve[step] for step in x] for curve in values], dtype=float)  # [curves, points]
        colour = COLOURS[index] if len(named) <= len(COLOURS) else ranking(index / (len(named) - 1))
        axes.plot(x, y.mean(axis=0), color=colour, linewidth=1.6, label=name, **_marker(x))
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.18, linewidth=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False)
    _whole_numbers(axes)
    _tidy(axes)
    _write(figure, out)


def _read_log(path: Path) -> list[dict]:
    """The lines of a log; a last one that a killed process left unfinished is passed over."""
    *whole, rest = read_text(Path(path)).split("\n")
    lines = []
    for number, text in enumerate([*whole, rest], 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number > len(whole):
                break
            raise ValueError(f"{path}, line {number} is not JSON ({error.msg}); give a run's log.jsonl") from None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"{path}, line {number} has no step: {text:.60}; give a run's log.jsonl")
        lines.append(line)
    return lines


def _curve(lines: Sequence[dict], key: str) -> Curve:
    return sorted({line["step"]: line[key] for line in lines if key in line}.items())


def _columns(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a curve."""
    steps, values = zip(*curve, strict=True)
    return np.array(steps), np.array(values, dtype=float)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window around each point.

    At the beginning, where a loss falls steeply, the window reaches as far ahead as there is behind; at the end it
    keeps what lies behind, so that the last value is a mean too.
    """
    index = np.arange(len(values))
    half = np.minimum(len(values) // SMOOTHING // 2, index)
    start, end = index - half, np.minimum(index + half + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[end] - sums[start]) / (end - start)


def _marker(points: Sequence[int]) -> dict:
    """Shows the points themselves where they are few: a line through one point is not to be seen."""
    return {"marker": "o", "markersize": 3} if len(points) <= FEW_POINTS else {}


def _run_name(log: Path) -> str:
    return Path(log).resolve().parent.name


def _figure(width: float, height: float, title: str) -> Figure:
    """A figure of that many inches. It is made without pyplot, which would keep it and might open a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, parse_math=False)  # a folder may be called "1$ a$day"
    return figure


def _colour_map(name: str, start: float, end: float):
    """A part of one of matplotlib's colour maps."""
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(name, matplotlib.colormaps[name](np.linspace(start, end, 256)))


def _whole_numbers(axes: Axes, axis: str = "x") -> None:
    """Ticks at whole numbers only: there is no layer 2.5 and no step 7.5."""
    from matplotlib.ticker import MaxNLocator

    (axes.xaxis if axis == "x" else axes.yaxis).set_major_locator(
        MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True)
    )


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def _write(figure: Figure, out: Path) -> None:
    with replacing(Path(out)) as temporary:
        figure.savefig(temporary, format="png")
