"""Colours and line styles of figures: lines differ with every colour blindness, and in dashes and markers too."""

from typing import Any

# Okabe and Ito's palette (Color Universal Design, 2008), ordered so that colours with the same dashes are far apart.
BLACK, ORANGE, BLUE, GREEN = "#000000", "#E69F00", "#0072B2", "#009E73"
SKY, VERMILION, YELLOW, PURPLE = "#56B4E9", "#D55E00", "#F0E442", "#CC79A7"
PALETTE = (BLACK, BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE, YELLOW)
DASHES, MARKERS, GREY = ("-", "--", "-.", ":"), "os^DvPX*", "0.7"


def line_styles(count: int) -> list[dict[str, Any]]:
    """Arguments of `Axes.plot` for `count` lines of a panel: eight have a colour each, the rest are grey."""
    coloured = [
        {"color": colour, "linestyle": DASHES[i % len(DASHES)], "marker": MARKERS[i], "markersize": 4.5, "zorder": 2.5}
        for i, colour in enumerate(PALETTE)
    ]
    grey = {"color": GREY, "linestyle": "-", "marker": "", "zorder": 1.5}
    return [*coloured[:count], *[grey] * (count - len(coloured))]
