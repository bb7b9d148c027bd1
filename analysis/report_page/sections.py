"""The sections of one setting (model, data, budget), each from the module that also writes files.

Every section takes its rows, a prefix for the page's ids and the looks of the lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from analysis import frames, kv, layers, pareto, significance, speedup, tradeoff, training_time
from analysis.drawing import style
from analysis.report_page.inline_svg import inline, swatches
from analysis.report_page.parts import Picture, Section, table
from analysis.tradeoff import Looks

PANEL_IN = (style.COLUMN_WIDTH_IN, 2.4)
FRONT = {"color": style.REFERENCE, "linewidth": 1}
DASHED = {"color": style.REFERENCE, "linestyle": (0, (4, 2)), "linewidth": 1}


def picture(draw: Callable[[Axes], object], caption: str, prefix: str) -> Picture:
    """One panel of its own, so that panels can stand side by side or, on a phone, in a column."""
    figure, panel = plt.subplots(figsize=PANEL_IN, layout="constrained")
    draw(panel)
    panel.set_title("")
    return Picture(inline(figure, prefix=prefix, label=caption), caption)


def measure_pictures(
    rows: pd.DataFrame,
    costs: Mapping[str, str],
    looks: Looks,
    draw_panel: tradeoff.DrawPanel,
    caption: str,
    slug: str,
) -> list[Picture]:
    """A panel of each measure over each cost, as `tradeoff.measure_grid` has them.

    Args:
        caption: with `{measure}` and `{cost}`.
        slug: of the first picture, without its number.
    """
    pictures: list[Picture] = []
    for measure, name in tradeoff.measures_of(rows):
        chosen = rows[(rows["measure"] == measure) & (rows["name"] == name)]
        for cost, label in costs.items():

            def draw(
                panel: Axes,
                chosen: pd.DataFrame = chosen,
                cost: str = cost,
                label: str = label,
                named: tuple[str, str] = (measure, name),
            ) -> None:
                draw_panel(panel, chosen, cost, looks)
                tradeoff.scale(panel, *named)
                panel.set_xlabel(label)

            text = caption.format(measure=f"{name} {measure}", cost=label)
            pictures.append(picture(draw, text, f"{slug}{len(pictures)}"))
    return pictures


def tradeoff_section(part: pd.DataFrame, prefix: str, looks: Looks, stem: str) -> Section:
    """Each measure over each cost."""

    def draw(panel: Axes, chosen: pd.DataFrame, cost: str, looks: Looks) -> None:
        tradeoff.draw_panel(panel, chosen, cost, looks)
        if cost == "flops_ratio":
            panel.invert_xaxis()

    rows, slug = frames.with_lines(part), f"{prefix}-tradeoff"
    return Section(
        slug,
        "Quality against cost",
        "Bars: 95 % bootstrap interval of a perplexity, one standard error of an accuracy; with "
        "several seeds, mean and standard deviation over seeds. Shaded: 95 % over items.",
        swatches(looks, prefix=f"{prefix}-tl", extra=[("dense", DASHED)]),
        measure_pictures(rows, tradeoff.AXES, looks, draw, "{measure} over {cost}", slug),
        [table(tradeoff.summary(part), "Every method and target", stem)],
    )


def pareto_section(part: pd.DataFrame, prefix: str, looks: Looks, stem: str) -> Section:
    """The points that no other point beats."""
    rows, slug = pareto.contenders(part), f"{prefix}-pareto"
    caption = "Front of {measure} over {cost}"
    present = {
        line: pareto.look(line, looks) | {"linestyle": ""} for line in sorted(set(rows["line"]))
    }
    shown = pareto.formatted(pareto.front_table(rows))
    return Section(
        slug,
        "Pareto front",
        "Full: no other point has at most this cost and at least this quality. Faint: some other "
        "point has. Upper bounds do not take part.",
        swatches(present, prefix=f"{prefix}-pl", extra=[("front", FRONT)]),
        measure_pictures(rows, pareto.COSTS, looks, pareto.draw_panel, caption, slug),
        [table(shown, "Points on a front, cheapest first", stem)],
    )


def training_section(part: pd.DataFrame, prefix: str, stem: str) -> Section:
    """What the recipes cost."""
    return Section(
        f"{prefix}-training",
        "Training time",
        "A stage that several points share is counted once; x slowest: a method's total over "
        "the largest total.",
        tables=[
            table(
                training_time.formatted(training_time.cost_table(part)),
                "Cost of each method and stage",
                stem,
            )
        ]
        if len(part)
        else [],
        missing="" if len(part) else "no method here has a training stage",
    )


def speed_section(part: pd.DataFrame, prefix: str, looks: Looks, stem: str) -> Section:
    """Measured speed-ups and their bounds."""
    section = Section(
        f"{prefix}-speed",
        "Speed",
        missing="nothing was timed: python runners/speed.py method=<name> sparsity=<target>",
    )
    if part.empty:
        return section
    rows = frames.with_lines(part)
    pictures: list[Picture] = []
    for case in speedup.cases(rows):

        def draw(panel: Axes, case: speedup.Case = case) -> None:
            speedup.draw_panel(panel, rows, case, looks)
            panel.set_xlabel("realised sparsity")
            panel.set_ylabel("speed-up over dense")

        caption = f"{case[0]}, batch {case[2]}, {case[1]} tokens"
        pictures.append(picture(draw, caption, f"{prefix}-speed{len(pictures)}"))
    timed = {line: looks[line] | {"linestyle": "-"} for line in sorted(set(rows.line))}
    devices = ", ".join(sorted({str(device) for device in part["device"]}))
    return Section(
        f"{prefix}-speed",
        "Speed",
        f"Measured on {devices}, dense and routed in turn in one process; bars: 20th to 80th "
        "percentile. Dashed: the bound, of FLOPs for prefill and of bytes read for decode.",
        swatches(timed, prefix=f"{prefix}-sl", extra=[("bound", DASHED)]),
        pictures,
        [table(speedup.summary(part), "Every timed case", stem)],
    )


def kv_section(part: pd.DataFrame, prefix: str, looks: Looks, stem: str) -> Section | None:
    """Perplexity over the bytes of the KV cache; None where every method keeps all of it."""
    part = kv.routed_perplexities(part)
    if part.empty or (part["kv_bytes_ratio"] == 1.0).all():
        return None
    rows = kv.averaged(part)

    def draw(panel: Axes) -> None:
        kv.draw_panel(panel, rows, looks)

    return Section(
        f"{prefix}-kv",
        "KV cache",
        "",
        swatches(looks, prefix=f"{prefix}-kl", extra=[("dense", DASHED)]),
        [picture(draw, "Perplexity over kept KV bytes", f"{prefix}-kv0")],
        [table(kv.formatted(rows), "KV bytes of each method and policy", stem)],
    )


def layers_section(part: pd.DataFrame, prefix: str, looks: Looks, stem: str) -> Section:
    """Sparsity over depth."""
    if part.empty:
        return Section(f"{prefix}-layers", "Sparsity by layer", missing="no method here routes")
    averaged = layers.over_seeds(part)
    pictures: list[Picture] = []
    for target in layers.drawn_targets(averaged):
        for kind in layers.KINDS:

            def draw(panel: Axes, target: float = target, kind: str = kind) -> None:
                layers.draw_panel(panel, averaged, target, kind, looks)
                panel.set_xlabel("layer")
                panel.set_ylabel("sparsity")

            caption = f"{kind}, target {target:g}"
            pictures.append(picture(draw, caption, f"{prefix}-layers{len(pictures)}"))
    present = {line: looks[line] for line in sorted(set(averaged.line))}
    return Section(
        f"{prefix}-layers",
        "Sparsity by layer",
        "Share of tokens that bypass each unit; dotted: the target of the whole model.",
        swatches(present, prefix=f"{prefix}-ll"),
        pictures,
        [
            table(
                layers.summary(averaged), "Mean of each kind, least and most bypassed layers", stem
            )
        ],
    )


def significance_section(compared: pd.DataFrame, prefix: str, stem: str) -> Section:
    """Paired tests between the methods."""
    if compared.empty:
        return Section(
            f"{prefix}-significance",
            "Significance",
            missing="no point here has its items saved: run it again with force=true",
        )
    return Section(
        f"{prefix}-significance",
        "Significance",
        "Pairs of methods on the items that both answered; * holds at 0.05 after Holm's "
        "correction over the pairs of a task.",
        tables=[
            table(
                significance.formatted(compared),
                "Accuracies by McNemar's exact test, perplexities by paired bootstrap",
                stem,
            )
        ],
    )
