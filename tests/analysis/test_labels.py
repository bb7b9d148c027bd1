"""Labels at the ends of lines: none overlaps, each is at its line, and what lies above is said."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from analysis import groups
from analysis.drawing import style
from analysis.drawing.labels import ABOVE, highest, label_ends, short, spread

UNIT = st.floats(0, 1)


@given(st.lists(st.tuples(UNIT, st.floats(0.01, 0.1)), min_size=1, max_size=12))
def test_places_are_apart_in_order_and_below_the_top(items):
    wanted = sorted((place for place, _ in items), reverse=True)
    sizes = [size for _, size in items]
    found = spread(wanted, sizes)
    assert found[0] <= 1 + 1e-9
    for i in range(len(found) - 1):
        assert found[i] - found[i + 1] >= (sizes[i] + sizes[i + 1]) / 2 - 1e-9
    if all(wanted[i] - wanted[i + 1] >= 0.1 for i in range(len(found) - 1)) and sum(sizes) < 0.3:
        assert found[-1] == pytest.approx(wanted[-1]) or wanted[0] > 0.9


@given(st.lists(st.tuples(UNIT, st.floats(0.01, 0.2)), max_size=8), st.floats(0.01, 0.2))
def test_the_highest_free_place_overlaps_nothing(taken, size):
    place, _ = highest(taken, size)
    assert place <= 1
    assert all(abs(place - y) >= (own + size) / 2 - 1e-6 for y, own in taken)


@pytest.mark.parametrize(
    ("value", "said"), [(1.234, "1.23"), (223.4, "223"), (57187.0, "5.7e4"), (1.4e6, "1.4e6")]
)
def test_values_are_short(value, said):
    assert short(value) == said


@pytest.mark.parametrize("falling", [False, True])
def test_every_line_is_named_once_and_no_two_names_overlap(falling):
    """In an axis that falls too; what leaves at the top says its values, and where."""
    names = [f"method_{i}" for i in range(8)]
    looks = style.looks(names)
    with style.paper():
        figure, panel = plt.subplots(figsize=(3.4, 2.4), layout="constrained")
        for i, name in enumerate(names):
            x = [0.3, 0.5, 0.7]
            y = [1.1 + i / 50, 2 + i / 50, 3 + i / 50 if i < 6 else 10.0 ** (i - 4)]
            panel.errorbar(x if not falling else [1 - v for v in x], y, label=name, **looks[name])
        panel.set_yscale("log")
        panel.set_ylim(0.95, 10)
        if falling:
            panel.invert_xaxis()
        label_ends(figure, looks)
        figure.draw_without_rendering()
        boxes = {text.get_text(): text.get_window_extent() for text in panel.texts}
        plt.close(figure)
    assert {text for text in boxes if ABOVE not in text} == set(names[:6])
    assert {text for text in boxes if ABOVE in text} == {
        f"{ABOVE} method_6 100",
        f"{ABOVE} method_7 1.0e3",
    }
    assert min(box.x0 for box in boxes.values()) >= panel.get_window_extent().x1
    tops = sorted((box.y0 + box.y1) / 2 for box in boxes.values())
    gaps = [b - a for a, b in itertools.pairwise(tops)]
    assert min(gaps) >= 6.5 * figure.dpi / 72
    arrows = [line for line in panel.lines if line.get_marker() == "^" and not line.get_clip_on()]
    assert len(arrows) == 2


def test_a_published_recipe_is_a_line_of_its_own():
    assert groups.label("skipgpt_published") == "skipgpt (as published)"
    assert groups.label("skipgpt_published", "seed") == "skipgpt (as published, seed)"
    assert groups.label("skipgpt", "", "") == "skipgpt"
