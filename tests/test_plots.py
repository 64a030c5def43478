"""The pictures of a run: what stands in them is what stands in the log."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from training import plots
from training.plots import bands, draw_gates, draw_loss

ROOT = Path(__file__).resolve().parents[1]


def write_log(folder: Path, lines: list[dict], end: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return path


def run_log(steps: int = 200, layers: int = 4, heads: int = 3, **start: object) -> list[dict]:
    """A log of losses that fall and gates that open."""
    generator = np.random.default_rng(0)
    final = generator.normal(0, 0.3, (layers, heads))
    lines: list[dict] = [{"event": "start", "step": 0, "config": {"layers": layers}, **start}]
    for step in range(steps + 1):
        if step:
            loss = 2 + np.exp(-step / 20) + generator.normal(0, 0.1)
            lines.append({"step": step, "loss": loss, "lr": 1e-3 * (1 - step / steps), "grad_norm": 1.0})
        if step % (steps // 4) == 0:
            gates = final * step / steps
            lines.append({"step": step, "val_loss": 2.5 + np.exp(-step / 30), "gates": gates.tolist()})
    return lines


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be written, in order."""
    figures = []
    monkeypatch.setattr(plots, "_write", lambda figure, out: figures.append(figure))
    return figures


def lines_of(axes) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def legend_of(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def shown(ticks, limits) -> list:
    """Ticks within the axis: a locator gives one beyond either end."""
    return [tick for tick in ticks if min(limits) <= tick <= max(limits)]


# ---------------------------------------------------------------------------------------------------------------- loss


def test_the_losses_are_those_of_the_log(tmp_path, drawn):
    log = run_log()
    assert draw_loss(write_log(tmp_path / "my_run", log), tmp_path / "loss.png") is True
    top, bottom = drawn[0].axes
    assert drawn[0].get_suptitle() == "my_run"
    assert legend_of(top) == ["training", "training, running mean", "validation"]
    assert (top.get_ylabel(), bottom.get_xlabel()) == ("loss", "step")
    assert bottom.get_ylabel().split() == ["learning", "rate"]
    assert top.get_xlim() == bottom.get_xlim(), "one stands below the other"
    lines = lines_of(top)
    for label, key in (("training", "loss"), ("validation", "val_loss")):
        points = [(line["step"], line[key]) for line in log if key in line]
        assert list(zip(*lines[label], strict=True)) == points
    (rate,) = lines_of(bottom).values()
    assert list(zip(*rate, strict=True)) == [(line["step"], line["lr"]) for line in log if "lr" in line]
    assert next(line for line in top.get_lines() if line.get_label() == "validation").get_marker() == "o"


def test_the_running_mean_is_a_mean_around_each_point(tmp_path, drawn):
    log = run_log(steps=300)
    draw_loss(write_log(tmp_path, log), tmp_path / "loss.png")
    losses = [line["loss"] for line in log if "loss" in line]
    _, mean = lines_of(drawn[0].axes[0])["training, running mean"]
    half = 300 // 25 // 2
    assert mean[0] == losses[0], "where a loss falls steeply a mean of what follows would be below it"
    assert mean[150] == pytest.approx(np.mean(losses[150 - half : 150 + half + 1]))
    assert mean[2] == pytest.approx(np.mean(losses[:5]))
    assert mean[-1] == pytest.approx(np.mean(losses[-half - 1 :]))


def test_a_short_run_shows_its_points(tmp_path, drawn):
    """A line through one point is not to be seen, nor a mean that is the line itself."""
    draw_loss(write_log(tmp_path, run_log(steps=4)), tmp_path / "loss.png")
    top = drawn[0].axes[0]
    assert legend_of(top) == ["training", "validation"]
    assert [line.get_marker() for line in top.get_lines()] == ["o", "o"]
    assert top.get_lines()[0].get_alpha() is None


def test_a_log_of_validations_alone(tmp_path, drawn):
    lines = [{"event": "start", "step": 0}, {"step": 0, "val_loss": 3.0}]
    assert draw_loss(write_log(tmp_path, lines), tmp_path / "loss.png") is True
    (axes,) = drawn[0].axes
    assert legend_of(axes) == ["validation"]
    assert axes.get_xlabel() == "step"


def test_of_a_step_that_stands_twice_the_later_line_counts(tmp_path, drawn):
    lines = [
        {"event": "start", "step": 0},
        *({"step": step, "loss": 1.0} for step in (1, 2, 3)),
        {"step": 2, "val_loss": 1.0, "gates": [[1.0]]},
        {"event": "resume", "step": 1},
        *({"step": step, "loss": 2.0} for step in (2, 3, 4)),
        {"step": 2, "val_loss": 2.0, "gates": [[0.25]]},
        {"step": 1, "val_loss": 5.0, "gates": [[0.5]]},
    ]
    path = write_log(tmp_path, lines)
    draw_loss(path, tmp_path / "loss.png")
    draw_gates(path, tmp_path / "gates.png")
    assert lines_of(drawn[0].axes[0]) == {
        "training": ([1, 2, 3, 4], [1.0, 2.0, 2.0, 2.0]),
        "validation": ([1, 2], [5.0, 2.0]),
    }
    (gates,) = lines_of(drawn[1].axes[2]).values()
    assert gates == ([1, 2], [0.5, 0.25])


# --------------------------------------------------------------------------------------------------------------- gates


def test_the_maps_show_the_gates_over_time_with_the_topmost_layer_on_top(tmp_path, drawn):
    log = run_log(layers=4, heads=3)
    log[-1]["gates"][0][0] = -0.9
    assert draw_gates(write_log(tmp_path / "my_run", log), tmp_path / "gates.png") is True
    *maps, right, colours, layers = drawn[0].axes
    gates = {line["step"]: line["gates"] for line in log if "gates" in line}
    assert [axes.get_title() for axes in maps] == ["step 50", "step 100", "step 150", "step 200"]
    for axes, step in zip(maps, (50, 100, 150, 200), strict=True):
        (image,) = axes.get_images()
        assert np.array_equal(image.get_array(), gates[step])
        assert (image.origin, image.get_extent()) == ("lower", [0.5, 3.5, 0.5, 4.5])
        assert axes.get_ylim() == (0.5, 4.5)
        assert axes.get_xlabel() == "head"
        assert shown(axes.get_xticks(), axes.get_xlim()) == [1, 2, 3]
        assert shown(axes.get_yticks(), axes.get_ylim()) == [1, 2, 3, 4]
        low, high = image.get_clim()
        assert -low == high == 0.9, "zero is in the middle, one scale for all steps"
    assert [axes.get_ylabel() for axes in maps] == ["layer", "", "", ""]
    assert drawn[0].get_suptitle() == "my_run"
    assert (colours.get_ylabel(), layers.get_ylabel()) == ("φ(g)", "layer")
    red, blue = image.cmap(1.0), image.cmap(0.0)
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    assert min(image.cmap(0.5)) > 0.95, "zero is white"
    assert right.get_xlabel() == "step"


@pytest.mark.parametrize(
    ("validations", "mapped"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (6, [1, 2, 4, 5]), (9, [2, 4, 6, 8])]
)
def test_the_maps_are_of_steps_evenly_spaced_with_the_last_among_them(tmp_path, drawn, validations, mapped):
    lines = [{"step": step, "gates": [[0.1 * step, 0.2]]} for step in range(validations)]
    draw_gates(write_log(tmp_path, lines), tmp_path / "gates.png")
    maps = [axes for axes in drawn[0].axes if axes.get_images() and axes.get_xlabel() == "head"]
    assert [axes.get_title() for axes in maps] == [f"step {step}" for step in mapped]


def test_the_lines_are_each_layers_mean_size(tmp_path, drawn):
    """The mean of the signed gates would hide a layer whose heads pull both ways."""
    log = run_log(layers=4, heads=3)
    draw_gates(write_log(tmp_path, log), tmp_path / "gates.png")
    expected = {line["step"]: np.abs(line["gates"]).mean(axis=1) for line in log if "gates" in line}
    lines = drawn[0].axes[4].get_lines()
    assert len(lines) == 4
    for layer, line in enumerate(lines):
        assert list(line.get_xdata()) == list(expected)
        assert list(line.get_ydata()) == pytest.approx([size[layer] for size in expected.values()])
    colours = [line.get_color() for line in lines]
    assert len(set(colours)) == 4
    assert [sum(colour[:3]) for colour in colours] == sorted(sum(colour[:3]) for colour in colours), (
        "from dark to light"
    )
    assert drawn[0].axes[4].get_ylim()[0] == 0


def test_layers_are_numbered_as_the_base_models_where_the_log_says_of_how_many(tmp_path, drawn):
    for start in ({"base_layers": 30}, {}):
        draw_gates(write_log(tmp_path, run_log(layers=4, **start)), tmp_path / "gates.png")
    numbers = [shown(figure.axes[0].get_yticks(), figure.axes[0].get_ylim()) for figure in drawn]
    assert numbers == [[27, 28, 29, 30], [1, 2, 3, 4]]
    assert drawn[0].axes[0].get_images()[0].get_extent()[2:] == [26.5, 30.5]
    assert drawn[0].axes[-1].get_ylim() == (27, 30)


@pytest.mark.parametrize("layers", [1, 5])
def test_one_gate_a_layer(tmp_path, drawn, layers):
    draw_gates(write_log(tmp_path, run_log(layers=layers, heads=1)), tmp_path / "gates.png")
    *maps, right = drawn[0].axes[:5]
    bars = drawn[0].axes[5:]
    for axes in maps:
        assert axes.get_images()[0].get_array().shape == (layers, 1)
        assert axes.get_xlabel() == "all heads"
        assert len(axes.get_xticks()) == 0
    assert right.get_title() == "|φ(g)| of each layer"
    assert len(bars) == (2 if layers > 1 else 1), "a scale of one layer says nothing"


def test_gates_that_have_not_left_zero_are_white(tmp_path, drawn):
    draw_gates(write_log(tmp_path, [{"step": 0, "gates": [[0.0, 0.0], [0.0, 0.0]]}]), tmp_path / "gates.png")
    image = drawn[0].axes[0].get_images()[0]
    assert image.get_clim() == (-1, 1)
    assert drawn[0].axes[1].get_lines()[0].get_marker() == "o"


@pytest.mark.parametrize(
    "gates", [[[[0.1, 0.2]], [[0.1], [0.2]]], [[[0.1, 0.2], [0.3]]], [[[0.1]], [[0.1], [0.2]]], [[]]]
)
def test_gates_of_two_shapes_are_refused(tmp_path, gates):
    path = write_log(tmp_path, [{"step": step, "gates": value} for step, value in enumerate(gates)])
    with pytest.raises(ValueError, match=r"log\.jsonl: gates must be layers x heads of one shape in all lines"):
        draw_gates(path, tmp_path / "gates.png")
    assert not (tmp_path / "gates.png").exists()


# --------------------------------------------------------------------------------------------------------------- bands


def test_a_band_runs_from_the_least_to_the_greatest_seed(tmp_path, drawn):
    named = {
        "30 layers": [[(0, 3.0), (10, 2.0), (20, 0.0)], [(20, 1.0), (0, 5.0), (10, 1.0), (30, 9.0)]],
        "8 layers": [[(0, 4.0), (10, 3.0)]],
    }
    bands(named, tmp_path / "out.png", xlabel="step", ylabel="validation loss", title="layers")
    (axes,) = drawn[0].axes
    assert lines_of(axes) == {"30 layers": ([0, 10, 20], [4.0, 1.5, 0.5]), "8 layers": ([0, 10], [4.0, 3.0])}
    assert legend_of(axes) == ["30 layers", "8 layers"]
    assert (axes.get_xlabel(), axes.get_ylabel(), drawn[0].get_suptitle()) == ("step", "validation loss", "layers")
    corners = {tuple(map(float, corner)) for corner in axes.collections[0].get_paths()[0].vertices}
    assert corners == {(0, 3), (10, 1), (20, 0), (20, 1), (10, 2), (0, 5)}
    for line, band in zip(axes.get_lines(), axes.collections, strict=True):
        assert to_rgb(line.get_color()) == tuple(band.get_facecolor()[0][:3])


@pytest.mark.parametrize("count", [1, 7, 8, 20])
def test_many_names_get_colours_of_their_own(tmp_path, drawn, count):
    named = {str(index): [[(0, index), (1, index)]] for index in range(count)}
    bands(named, tmp_path / "out.png", xlabel="", ylabel="", title="")
    assert len({line.get_color() for line in drawn[0].axes[0].get_lines()}) == count


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({}, "there are no curves to draw"),
        ({"a": []}, "the 0 curves of 'a' have no point in common"),
        ({"a": [[(0, 1.0)], [(1, 1.0)]]}, "the 2 curves of 'a' have no point in common; give ones of the same steps"),
    ],
)
def test_curves_that_cannot_be_drawn(tmp_path, named, message):
    with pytest.raises(ValueError, match=message):
        bands(named, tmp_path / "out.png", xlabel="", ylabel="", title="")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------- files


def test_pictures_are_written_whole_and_nothing_else_is(tmp_path):
    """Folders are called anything: matplotlib would take what stands between two dollars for a formula."""
    log = write_log(tmp_path / r"1$ a \bad $run", run_log(), end='{"step": 201, "lo')
    named = {"a": [[(0, 1.0), (1, 2.0)]]}
    assert draw_loss(log, tmp_path / "loss.png")
    assert draw_gates(log, tmp_path / "gates.png")
    bands(named, tmp_path / "bands.png", xlabel="step", ylabel="loss", title="$ \\bad $")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["bands.png", "gates.png", "loss.png"]
    for name, size in {"loss": (960, 600), "gates": (1224, 576), "bands": (960, 576)}.items():
        with Image.open(tmp_path / f"{name}.png") as image:
            assert (image.format, image.size) == ("PNG", size)
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50, "an empty picture has one colour"


def test_a_log_with_nothing_to_draw_leaves_no_picture(tmp_path):
    log = write_log(tmp_path, [{"event": "start", "step": 0}, {"step": 1, "lr": 0.1}])
    assert draw_gates(log, tmp_path / "gates.png") is False
    assert draw_loss(log, tmp_path / "loss.png") is False
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_neither_pyplot_nor_a_window_is_needed(tmp_path):
    """pyplot keeps every figure and picks a backend that may want a display; the import alone loads no matplotlib."""
    log = write_log(tmp_path, run_log())
    code = (
        "import sys, pathlib; import training.plots as plots; assert 'matplotlib' not in sys.modules\n"
        "log, out = map(pathlib.Path, sys.argv[1:]); assert plots.draw_loss(log, out) and plots.draw_gates(log, out)\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(log), str(tmp_path / "out.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1, "loss": 2}\nhello\n{"step": 2}\n', "line 2 is not JSON"),
        ('{"step": 1, "loss": 2}\nhello\n', "line 2 is not JSON"),
        ('{"loss": 2}\n', "line 1 has no step"),
        ("[1]\n", "line 1 has no step"),
        ('{"step": "1"}\n', "line 1 has no step"),
    ],
)
@pytest.mark.parametrize("draw", [draw_loss, draw_gates])
def test_a_file_that_is_no_log(tmp_path, draw, text, message):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=rf"log\.jsonl, {message}.*; give a run's log\.jsonl"):
        draw(tmp_path / "log.jsonl", tmp_path / "out.png")


def test_a_missing_log(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*log\.jsonl"):
        draw_loss(tmp_path / "log.jsonl", tmp_path / "out.png")


def test_a_log_without_line_end_is_read_to_its_end(tmp_path, drawn):
    log = write_log(tmp_path, [{"step": 1, "loss": 1.0}], end='\n{"step": 2, "loss": 2.0}')
    draw_loss(log, tmp_path / "out.png")
    assert lines_of(drawn[0].axes[0])["training"] == ([1, 2], [1.0, 2.0])
