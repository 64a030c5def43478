"""A look inside one answer, as a piece of HTML: the gates, the prompts' share of attention, the scales of the encoder.

The piece stands on any page, light or dark: text takes the page's colour, and what is coloured is either as deep on
white as on black or lets the page shine through. Charts keep their size and stand beside each other where there is
room. Every number is in a table, too, for those who cannot see the charts or want to read them off.
"""

from __future__ import annotations

from html import escape

from mmadapter.inspection import Inside

# Both have a contrast of 3 or more against white and against black.
ADDS, TAKES, BAR = "#d9512c", "#2f7fd6", "#0d9488"
WIDTH = 320  # of a chart, pixels: a phone shows it whole
LABEL = 26  # left of the rows, for the number of the layer
TOP = 16  # above the rows
GAP = 2  # between bars
LAYER_AXIS = '<text x="0" y="9" class="faint">layer</text>'

STYLE = """
.inside { line-height: 1.45; }
.inside p.inside-summary { margin: 0 0 16px; max-width: 46em; }
.inside .inside-charts { display: flex; flex-wrap: wrap; gap: 24px 36px; align-items: flex-start; }
.inside figure { margin: 0; flex: 0 1 320px; min-width: 0; }
.inside figcaption { margin: 0 0 8px; font-size: 13px; min-height: 5.8em; }
.inside figcaption b { display: block; font-size: 15px; font-weight: 600; }
.inside figcaption span { opacity: .8; }
.inside svg { display: block; max-width: 100%; height: auto; overflow: visible; }
.inside svg text { fill: currentColor; font-size: 11px; font-family: inherit; }
.inside svg .faint { opacity: .75; }
.inside svg .cell { stroke: currentColor; stroke-opacity: .13; }
.inside svg .cell:hover, .inside svg .bar:hover { stroke: currentColor; stroke-opacity: 1; }
.inside details { margin-top: 16px; }
.inside summary { cursor: pointer; font-size: 14px; width: fit-content; padding: 6px 0; }
.inside .inside-scroll { overflow: auto; max-height: 360px; margin-top: 8px; width: 0; min-width: 100%; }
.inside .inside-scroll table { border-collapse: collapse; font-size: 12px; font-variant-numeric: tabular-nums; width: auto; margin: 0 0 12px; border: 0; }
.inside .inside-scroll tr { border: 0; background: none; }
.inside .inside-scroll th, .inside .inside-scroll td { padding: 2px 8px; text-align: right; white-space: nowrap; border: 0;
  border-bottom: 1px solid rgb(128 128 128 / .3); background: none; line-height: 1.5; }
.inside .inside-scroll th { font-weight: 600; }
.inside .inside-scroll caption { text-align: left; padding: 4px 0; font-weight: 600; caption-side: top; }
@media (max-width: 760px) { .inside figcaption { min-height: 0; } }
"""  # noqa: E501 - a rule a line


def inside_html(inside: Inside) -> str:
    """Draws what `inspection.look_inside` found.

    Layers and heads are numbered from 1, as in the plots of a training run, with the topmost layer on top. Layers
    without prompts are left out.

    Returns:
        A `<div>` that holds its own style, charts as SVG with texts for screen readers, and tables.
    """
    charts = [_gates(inside), _prompt_share(inside)]
    if inside.scale_share:
        charts.append(_scales(inside.scale_share))
    summary = "".join(f"{sentence} " for sentence in _summary(inside)).strip()
    return (
        f'<div class="inside"><style>{STYLE}</style><p class="inside-summary">{escape(summary)}</p>'
        f'<div class="inside-charts">{"".join(charts)}</div>{_tables(inside)}</div>'
    )


def _summary(inside: Inside) -> list[str]:
    """What the charts show, in sentences."""
    value, layer, head = _strongest(inside)
    shares = inside.prompt_share[inside.first_layer :]
    if inside.strength == 0:
        sentences = ["At strength 0 the adapter changes nothing: these are the base model's own words."]
    elif value == 0:
        sentences = ["Every gate is 0, so the prompts change nothing."]
    else:
        top = max(range(len(shares)), key=shares.__getitem__)
        sentences = [
            f"On average {_percent(sum(shares) / len(shares))} of what attention added to this answer came from the "
            f"adapter's prompts, most in layer {inside.first_layer + top + 1} ({_percent(shares[top])}).",
            f"The strongest gate is that of layer {layer}, head {head} ({_signed(value)}).",
        ]
        if inside.strength != 1:
            sentences.append(f"The gates are shown at strength {inside.strength:g}.")
    if value != 0 and any(inside.scale_share.values()):
        name = max(inside.scale_share, key=inside.scale_share.__getitem__)
        sentences.append(f"The image token leans most on {_scale(name)} ({_percent(inside.scale_share[name])}).")
    return sentences


def _gates(inside: Inside) -> str:
    """Heat map of phi(g), layers x heads, with its legend."""
    gates = inside.gates
    L, H = len(gates), len(gates[0])
    value, layer, head = _strongest(inside)
    most = abs(value)
    row, cell = _row_height(L), min(30.0, (WIDTH - LABEL) / H)
    every = _label_step(H, cell, 20)
    marks = [LAYER_AXIS]
    for index, heads in enumerate(gates):
        y = TOP + (L - 1 - index) * row
        number = inside.first_layer + index + 1
        marks.append(_layer_label(number, L, inside.first_layer, y, row))
        for column, gate in enumerate(heads):
            depth = _depth(gate / most) if most else 0.0
            marks.append(
                f'<rect class="cell" x="{LABEL + column * cell:.4g}" y="{y:.4g}" width="{cell:.4g}" height="{row:.4g}" '
                f'fill="{ADDS if gate > 0 else TAKES}" fill-opacity="{depth:.3f}">'
                f"<title>layer {number}, head {column + 1}: {_signed(gate, 3)}</title></rect>"
            )
    bottom = TOP + L * row
    for number in range(1, H + 1):
        if number == 1 or number % every == 0:
            x = LABEL + (number - 0.5) * cell
            marks.append(f'<text x="{x:.4g}" y="{bottom + 14:.4g}" text-anchor="middle" class="faint">{number}</text>')
    marks.append(f'<text x="{LABEL}" y="{bottom + 30:.4g}" class="faint">head</text>')
    if most:
        marks.append(_legend(most, bottom + 21))
    label = f"Heat map of the gates of {L} layers and {H} heads, from {_signed(-most)} to {_signed(most)}"
    label += f"; the strongest is {_signed(value)} in layer {layer}, head {head}." if most else "; all of them are 0."
    width = max(LABEL + H * cell, WIDTH)
    return _figure(
        "Gates",
        "How far each head of each layer lets the prompts in: red adds what they say, blue takes it away, "
        "no colour is closed.",
        _svg(width, bottom + 36, label, marks),
    )


def _legend(most: float, y: float) -> str:
    """The colours from -most to +most, at the right."""
    steps, width, right = 21, 6, WIDTH - 34
    left = right - steps * width
    marks = [f'<text x="{left - 4}" y="{y + 9:.4g}" text-anchor="end" class="faint">{_signed(-most)}</text>']
    for step in range(steps):
        part = 2 * step / (steps - 1) - 1
        marks.append(
            f'<rect x="{left + step * width}" y="{y:.4g}" width="{width}" height="11" '
            f'fill="{ADDS if part > 0 else TAKES}" fill-opacity="{_depth(part):.3f}"/>'
        )
    marks.append(
        f'<rect x="{left}" y="{y:.4g}" width="{steps * width}" height="11" fill="none" stroke="currentColor" '
        'stroke-opacity=".3"/>'
    )
    marks.append(f'<text x="{right + 4}" y="{y + 9:.4g}" class="faint">{_signed(most)}</text>')
    return "".join(marks)


def _prompt_share(inside: Inside) -> str:
    """A bar for each adapted layer, on the rows of the heat map."""
    shares = inside.prompt_share[inside.first_layer :]
    L, row = len(shares), _row_height(len(shares))
    end = next(end for end in (0.04, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0) if max(shares) <= end)  # of the axis
    room = WIDTH - LABEL - 40  # the number stands behind the bar
    numbered = row >= 12
    bottom = TOP + L * row
    marks = [LAYER_AXIS]
    for tick in (0.0, end / 2, end):
        x = LABEL + room * tick / end
        top = bottom - 4 if numbered and tick else TOP  # a line would cross the numbers
        marks.append(
            f'<line x1="{x:.4g}" x2="{x:.4g}" y1="{top:.4g}" y2="{bottom:.4g}" stroke="currentColor" '
            f'stroke-opacity=".35"/><text x="{x:.4g}" y="{bottom + 14:.4g}" text-anchor="middle" class="faint">'
            f"{tick:.0%}</text>"
        )
    for index, share in enumerate(shares):
        y = TOP + (L - 1 - index) * row
        number = inside.first_layer + index + 1
        length = room * share / end
        marks.append(_layer_label(number, L, inside.first_layer, y, row))
        marks.append(
            f'<rect class="bar" x="{LABEL}" y="{y + GAP / 2:.4g}" width="{length:.4g}" height="{row - GAP:.4g}" '
            f'fill="{BAR}"><title>layer {number}: {_percent(share)}</title></rect>'
        )
        if numbered:
            marks.append(f'<text x="{LABEL + length + 4:.4g}" y="{y + row / 2 + 4:.4g}">{_percent(share)}</text>')
    top = max(range(L), key=shares.__getitem__)
    label = (
        f"Bars of the prompts' share in {L} layers, {_percent(min(shares))} to {_percent(max(shares))}, "
        f"most in layer {inside.first_layer + top + 1}."
    )
    return _figure(
        "Attention to the prompts",
        "Of what attention adds while this answer is written, the part that comes from the adapter's prompts, "
        "by layer.",
        _svg(WIDTH, bottom + 36, label, marks),
    )


def _scales(shares: dict[str, float]) -> str:
    """A bar for each scale of the encoder, its name above it."""
    height, room = 36, WIDTH - 40
    marks = []
    for index, (name, share) in enumerate(shares.items()):
        y = index * height
        length = room * share
        marks.append(
            f'<text x="0" y="{y + 12}">{escape(_scale(name))}</text>'
            f'<rect x="0" y="{y + 17}" width="{room}" height="12" fill="currentColor" fill-opacity=".1"/>'
            f'<rect class="bar" x="0" y="{y + 17}" width="{length:.4g}" height="12" fill="{BAR}">'
            f"<title>{escape(_scale(name))}: {_percent(share)}</title></rect>"
            f'<text x="{room + 6}" y="{y + 27}">{_percent(share)}</text>'
        )
    listed = ", ".join(f"{_scale(name)} {_percent(share)}" for name, share in shares.items())
    return _figure(
        "What the image token leans on",
        "How much the token changes when one scale of the image encoder is left out. Low blocks see edges and "
        "colours, high ones things.",
        _svg(WIDTH, len(shares) * height, f"Bars of the scales' shares: {listed}.", marks),
    )


def _tables(inside: Inside) -> str:
    """Every number, closed at first."""
    heads = "".join(f'<th scope="col">head {head + 1}</th>' for head in range(len(inside.gates[0])))
    rows = []
    for index in reversed(range(len(inside.gates))):
        layer = inside.first_layer + index
        cells = "".join(f"<td>{_signed(gate, 3)}</td>" for gate in inside.gates[index])
        share = _percent(inside.prompt_share[layer])
        rows.append(f'<tr><th scope="row">{layer + 1}</th><td>{share}</td>{cells}</tr>')
    tables = (
        '<table><caption>Prompts\' share and gates by layer</caption><thead><tr><th scope="col">layer</th>'
        f'<th scope="col">prompts</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )
    if inside.scale_share:
        scales = "".join(
            f'<tr><th scope="row">{escape(_scale(name))}</th><td>{_percent(share)}</td></tr>'
            for name, share in inside.scale_share.items()
        )
        tables += f"<table><caption>Scales of the encoder</caption><tbody>{scales}</tbody></table>"
    return (
        "<details><summary>All numbers as tables</summary>"
        '<div class="inside-scroll" tabindex="0" role="region" aria-label="All numbers as tables">'
        f"{tables}</div></details>"
    )


def _figure(title: str, explanation: str, svg: str) -> str:
    return f"<figure><figcaption><b>{title}</b><span>{explanation}</span></figcaption>{svg}</figure>"


def _svg(width: float, height: float, label: str, marks: list[str]) -> str:
    return (
        f'<svg role="img" aria-label="{escape(label)}" width="{width:.4g}" height="{height:.4g}" '
        f'viewBox="0 0 {width:.4g} {height:.4g}">{"".join(marks)}</svg>'
    )


def _row_height(layers: int) -> float:
    return min(22.0, max(6.0, 420 / layers))


def _label_step(count: int, size: float, needed: float) -> int:
    """Labels stand at every so many rows or columns, so that they do not touch."""
    return next((step for step in (1, 2, 5, 10, 20) if step * size >= needed), count)


def _layer_label(number: int, layers: int, first: int, y: float, row: float) -> str:
    """The number of a layer, left of its row; where rows are low, of some layers."""
    step = _label_step(layers, row, 13)
    if step > 1 and number % step and number != first + layers:
        return ""
    return f'<text x="{LABEL - 6}" y="{y + row / 2 + 4:.4g}" text-anchor="end" class="faint">{number}</text>'


def _strongest(inside: Inside) -> tuple[float, int, int]:
    """The gate farthest from 0, its layer and its head, from 1."""
    found = [
        (gate, inside.first_layer + index + 1, head + 1)
        for index, heads in enumerate(inside.gates)
        for head, gate in enumerate(heads)
    ]
    return max(found, key=lambda one: abs(one[0]))


def _percent(share: float) -> str:
    """Whole percent, below ten with a digit more."""
    return f"{share:.0%}" if share >= 0.0995 or share == 0 else f"{share:.1%}"


def _signed(value: float, digits: int = 2) -> str:
    """With its sign, and a minus as wide as the plus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _depth(part: float) -> float:
    """How deep a gate is coloured, from its part of the strongest one; small ones are raised, to be seen at all."""
    return abs(part) ** 0.75


def _scale(name: str) -> str:
    """`4/2x3` is block 4, by 2 × 3 cells (`VisionConfig.scales`)."""
    place, _, grid = name.partition("/")
    said = "the encoder's own output" if place == "final" else f"block {place}"
    return f"{said}, {grid.replace('x', ' × ')} cells" if grid else said
