"""One look for every picture: colour-blind-safe, told apart in grey print, fonts embedded."""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#882255", "#56B4E9", "#332288", "#E69F00"),
    *("#117733", "#000000", "#AA4499", "#B01300", "#4D4DFF", "#134E62", "#999933", "#8C6D31"),
    *("#FF0075", "#7527C4", "#E7969C", "#00A6BA", "#75A000", "#D6616B"),
)
"""Of Okabe and Ito (2008), Tol's muted ones and others, each as far from those before it as can be,
to readers who lack the red or the green cone too; yellow is too faint on white."""
SHADES = (0.0, 0.3, 0.48)
"""Shares of black or white in the colour of a method and of its variants."""
KNOWN = (
    "informed greedy d_llm skipgpt layer_skip router_tuning informed_plus mod flexidepth "
    "static_forecast gateskip replace_me informed_paper linear_patch hero random diffskip oracle "
    "channel_sparse"
).split()
"""Methods that have the colour at their place in every picture, so that a reader of several learns
them; any other name takes a free one."""
PLACES = {name: place for place, name in enumerate(KNOWN)}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d", "8", "H")
REFERENCE = "#555555"
DASHED: dict[str, Any] = {"color": REFERENCE, "linestyle": (0, (4, 2)), "linewidth": 1}
LEGEND: dict[str, Any] = {"loc": "outside upper center", "ncols": 4, "frameon": False}
HOLLOW = {"markerfacecolor": "#ffffff"}
ROLES: dict[str, dict[str, Any]] = {
    "routes each token": {"linestyle": "-"},
    "all tokens alike": {"linestyle": (0, (4, 1.6)), **HOLLOW},
    "by the true error": {"linestyle": (0, (1, 1.4)), **HOLLOW},
    "FLOPs only": {"linestyle": (0, (5, 1.5, 1, 1.5)), "fillstyle": "left"},
}
"""What a method is (`role` of `Store.points`), and what all of its lines look like."""
USUAL = next(iter(ROLES))
Looks = dict[str, dict[str, Any]]
"""Colour, marker and line of each name, as keywords of `Axes.plot`."""
T = TypeVar("T")
COLUMN_WIDTH_IN = 3.4
"""Inches: one column of a two-column paper."""

SETTINGS: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.2,
    "errorbar.capsize": 1.8,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.hashsalt": "routebench",
    "figure.dpi": 100,
    "savefig.dpi": 250,
}


@contextmanager
def paper() -> Iterator[None]:
    """Apply the style inside the block; draws without a display."""
    mpl.use("Agg")
    with mpl.rc_context(SETTINGS):  # type: ignore[arg-type]
        yield


def looks(names: Mapping[str, str] | Iterable[str]) -> Looks:
    """Choose colour, marker and line of each name, no colour twice while there are some left.

    `informed (bypass=skip)` takes a shade of the colour of `informed`. Names without a place of
    their own are looked up by their hash, so that most keep their look from picture to picture.

    Args:
        names: with their roles (`ROLES`), which are told by line and filling; or alone.
    """
    roles = names if isinstance(names, Mapping) else dict.fromkeys(names, USUAL)
    families: dict[str, list[str]] = {}
    for name in sorted(roles, key=lambda name: (base_of(name) not in PLACES, name)):
        families.setdefault(base_of(name), []).append(name)
    kept = {PLACES[base] for base in families if base in PLACES}
    chosen: Looks = {}
    for base, family in families.items():
        for place, name in enumerate(family):
            start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
            if place % len(SHADES) == 0:  # the first, or there are more variants than shades
                own = COLOURS[_place(name if place else base, start, kept)]
            marker = _free(MARKERS, start // 7, [look["marker"] for look in chosen.values()])
            colour = shade(own, place % len(SHADES))
            chosen[name] = {"color": colour, "marker": marker, **ROLES[roles[name]]}
    return {name: chosen[name] for name in sorted(chosen)}


def without(named: Mapping[str, T], *names: str) -> dict[str, T]:
    """Leave out entries."""
    return {name: value for name, value in named.items() if name not in names}


def base_of(name: str) -> str:
    """The method of a line: `informed` of `informed (bypass=skip) [random decisions]`.

    A recipe as published is a variant of its method: `skipgpt` of `skipgpt_published`.
    """
    return name.partition(" ")[0].removesuffix("_published")


def shade(colour: str, step: int) -> str:
    """Mix a colour with white if it is dark, else with black: step 0 is itself."""
    return mix(colour, 1.0 if luminance(colour) < 0.18 else 0.0, SHADES[step])


def mix(colour: str, grey: float, share: float) -> str:
    """Mix a colour with a grey: 0 is black, 1 is white."""
    red, green, blue = (part + (grey - part) * share for part in colors.to_rgb(colour))
    return colors.to_hex((red, green, blue))


def luminance(colour: str) -> float:
    """Relative luminance, 0 to 1 (WCAG 2)."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in colors.to_rgb(colour)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def on_dark(colour: str) -> str:
    """What a colour of a line becomes on a dark page."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*colors.to_rgb(colour))
    # of a hue the light half; of grey, which has none, the mirror image
    lifted = 0.56 + 0.4 * lightness if saturation > 0.05 else 0.92 - 0.5 * lightness
    return colors.to_hex(colorsys.hls_to_rgb(hue, lifted, saturation))


SERIES = frozenset(shade(colour, step) for colour in COLOURS for step in range(len(SHADES)))
"""Every colour that a line may have."""


def _place(name: str, start: int, taken: set[int]) -> int:
    """The colour that is kept for a name, else the first one from `start` on that is free."""
    if name in PLACES:
        return PLACES[name]
    ring = [(start + step) % len(COLOURS) for step in range(len(COLOURS))]
    own = next((place for place in ring if place not in taken), ring[0])
    taken.add(own)
    return own


def _free(choices: tuple[Any, ...], start: int, taken: list[Any]) -> Any:
    """The first choice from `start` on that is used least."""
    ring = [choices[(start + step) % len(choices)] for step in range(len(choices))]
    return min(ring, key=taken.count)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.pdf`; the figure is closed."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for ending in ("png", "pdf"):
        path = stem.parent / f"{stem.name}.{ending}"
        metadata = {"CreationDate": None} if ending == "pdf" else {"Software": None}
        figure.savefig(path, metadata=metadata)
        written.append(path)
    plt.close(figure)
    return written
