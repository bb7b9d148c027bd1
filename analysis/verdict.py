"""Does routing tokens pay: quality against measured speed, and who loses least at a speed-up.

python analysis/verdict.py results_dir=results [out_dir=results/plots]

Reads points that timed themselves (`runners/sweep.py speed=sweep`). For each speed-up of `TARGETS`
the table has the method that loses least of those that route each token, and of those that treat
all tokens alike, their control. A method stands there with the least perplexity of
- its measured points that are at least as fast, and
- the value between its two neighbouring points that are slower and faster, along the line of the
  log perplexity over the log speed-up (all else is linear in the log speed-up);
never with a value beyond its points.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis import tradeoff
from analysis.cli import run
from analysis.drawing import tables
from analysis.drawing.style import Looks
from analysis.frames import DENSE, HOW, MARGIN, MEASURE, POINT, RATIO, Store, joined
from analysis.pareto import undominated, with_dense
from analysis.tradeoff import heights, measure_panels
from analysis.view import STAR, Panel, View

TARGETS = (1.1, 1.25, 1.5, 2.0)
PHASES = ("prefill", "decode")
SPEEDS = {phase: f"measured {phase} speed-up over dense" for phase in PHASES}
FLOPS = {"flops_ratio": "FLOPs (routed / dense)"}
SPEED_TICKS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
CASE = ["tokens", "batch", *HOW[2:]]
"""How a case was timed, beside its decisions; a picture is of one case a phase."""
NO_CONTENDER = ("by the true error", "FLOPs only")
USED = ["peak", "dense_peak", "kv", "dense_kv"]
"""Bytes: peak memory of a phase, and keys and values after decoding."""
ALONG = ["sparsity_target", "sparsity_realised", "flops_ratio", "training_s", *USED]
MIB = 1024**2


def rows(store: Store) -> pd.DataFrame:
    """Give the measures of settings with timed points their speed-ups, and mark the fronts.

    Adds, by phase, the speed-up (geometric mean over seeds) under the phase's name, `<phase>_case`
    (how it was timed), `<phase>_<used>` of `USED`, and by cost `front_<cost>`; the dense model is
    a point of each measure.
    """
    timed = store.speed
    if timed.empty or store.averaged.empty:
        return pd.DataFrame()
    timed = timed[(timed["decisions"] != "random") & (timed["trained"] != "False")]
    measured = store.averaged
    found = with_dense(measured[measured["measure"] != MARGIN])
    for phase in PHASES:
        own = _timed(timed[timed["phase"] == phase], phase)
        found = found.merge(own, on=POINT, how="left")
        found.loc[found["line"] == DENSE, phase] = 1.0
    counts = found[found["line"] != DENSE].groupby("setting")[list(PHASES)].count().sum(axis=1)
    found = found[found["setting"].isin(counts[counts > 0].index)].reset_index(drop=True)
    for cost in (*SPEEDS, *FLOPS):
        found[f"front_{cost}"] = _front(found, cost)
    return found


def _timed(speed: pd.DataFrame, phase: str) -> pd.DataFrame:
    """The speed-up of each point, in the case that most points of its setting were timed in."""
    parts = []
    for _, part in speed.groupby("setting"):
        counts = part.groupby(CASE)["fingerprint"].nunique()
        case: Any = counts.idxmax()
        own = part.set_index(CASE).sort_index().loc[[case]].reset_index()
        logs = own.assign(speedup=np.log(own["speedup"]))
        means = logs.groupby(POINT, dropna=False)[["speedup", *USED]].mean().reset_index()
        means["speedup"] = np.exp(means["speedup"])
        means["case"] = _said(dict(zip(CASE, case, strict=True)))
        parts.append(means.rename(columns={c: f"{phase}_{c}" for c in (*USED, "case")}))
    names = [*POINT, "speedup", *(f"{phase}_{c}" for c in (*USED, "case"))]
    whole = pd.concat(parts) if parts else pd.DataFrame(columns=names)
    return whole.rename(columns={"speedup": phase})


def _said(case: dict[Any, Any]) -> str:
    """How a case was timed, in words."""
    how = [case["device"], case["dtype"]]
    if case["threads"]:
        how += [f"{case['threads']} thread" + "s" * (case["threads"] != "1")]
    how += ["CUDA graphs" if case["graphs"] == "True" else ""]
    if case["neighbours"] != "0":
        how += [f"{case['neighbours']} busy neighbours"]
    return ", ".join([f"batch {case['batch']}", f"{case['tokens']} tokens", *filter(None, how)])


def _front(found: pd.DataFrame, cost: str) -> pd.Series:
    """Whether no contender is at least as fast (or cheap) and at least as good as a point."""
    front = pd.Series(data=False, index=found.index)
    contends = found[cost].notna() & ~found["role"].isin(NO_CONTENDER)
    for (_, measure, _), same in found[contends].groupby(["setting", "measure", "shown"]):
        loss = same["value"] if measure == "perplexity" else -same["value"]
        front[same.index] = undominated(same[cost] if cost in FLOPS else -same[cost], loss)
    return front


def panels(part: pd.DataFrame) -> list[Panel]:
    """Draw each measure over both speed-ups, then each over FLOPs."""
    said = "{measure} over {cost}"
    return [
        *measure_panels(part, SPEEDS, draw, said),
        *measure_panels(part, FLOPS, draw, said),
    ]


def draw(chosen: pd.DataFrame, cost: str, panel: Axes, looks: Looks) -> None:
    """Draw the lines of the methods, and the front over all of them as steps behind."""
    tradeoff.draw(chosen, cost, panel, looks)
    front = heights(chosen[chosen[f"front_{cost}"]]).sort_values(cost)
    steps: Any = "steps-post" if cost in FLOPS else "steps-pre"
    panel.plot(front[cost], front["y"], drawstyle=steps, **FRONT, label="front")
    panel.plot([1.0], heights(chosen[chosen["line"] == DENSE])["y"], **DENSE_STAR)
    if cost in SPEEDS:
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(FixedLocator(SPEED_TICKS))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


FRONT: dict[str, Any] = {"color": "#dddddd", "linewidth": 4, "zorder": 1}
DENSE_STAR: dict[str, Any] = {**STAR}


def standings(part: pd.DataFrame) -> pd.DataFrame:
    """Tabulate every contender at each speed-up, the one that loses least first.

    Returns:
        `MEASURE`, `phase`, `at_least`, `place` (1 loses least; missing where no method is as
        fast), `method`, `role`, `how`, `speedup`, `RATIO`, those of `ALONG`, each task's accuracy
        and the share of continuations kept in a column of its name, `fingerprints`.
    """
    tasks = part[part["measure"] != "perplexity"].pivot_table(
        index=POINT, columns="shown", values="value", dropna=False
    )
    listed: list[dict[str, Any]] = []
    contends = ~part["role"].isin(NO_CONTENDER) & (part["line"] != DENSE)
    texts = part[contends & (part["measure"] == "perplexity")].merge(
        tasks.reset_index(), on=POINT, how="left"
    )
    for key, text in texts.groupby(MEASURE):
        named = dict(zip(MEASURE, key, strict=True))
        for phase in PHASES:
            own = text.dropna(subset=[phase]).assign(
                **{used: text.get(f"{phase}_{used}", np.nan) for used in USED}
            )
            own["kv"], own["dense_kv"] = text["decode_kv"], text["decode_dense_kv"]
            for target in TARGETS:
                at = {**named, "phase": phase, "at_least": target}
                found = [
                    best
                    for line, points in own.groupby("line")
                    if (best := _at(points, phase, target, list(tasks.columns)))
                ]
                found.sort(key=lambda row: row["ratio"])
                found = [{"place": place, **row} for place, row in enumerate(found, 1)]
                listed += [at | row for row in found or [{}]]
    return pd.DataFrame(listed)


def _at(points: pd.DataFrame, phase: str, target: float, tasks: list[str]) -> dict[str, Any] | None:
    """Where one method stands at a speed-up; None where it is never as fast."""
    ordered = points.sort_values(phase)
    fast = ordered[ordered[phase] >= target]
    if fast.empty:
        return None
    first = fast.iloc[0]
    best = fast.sort_values("ratio", kind="stable").iloc[0]
    found = {name: best[name] for name in (*RATIO, *ALONG, *tasks)}
    found |= {"how": "measured", "speedup": best[phase], "fingerprints": best["fingerprints"]}
    slower = ordered[ordered[phase] < target]
    if len(slower):
        last = slower.iloc[-1]
        ends = np.log([last[phase], first[phase]])
        share = (np.log(target) - ends[0]) / (ends[1] - ends[0])
        between = {n: last[n] + share * (first[n] - last[n]) for n in (*ALONG, *tasks)}
        between |= {n: last[n] ** (1 - share) * first[n] ** share for n in RATIO}
        if between["ratio"] < found["ratio"]:
            pair = f"between {last['sparsity_target']:g} and {first['sparsity_target']:g}"
            prints = joined(pd.Series([last["fingerprints"], first["fingerprints"]]))
            found = between | {"how": pair, "speedup": target, "fingerprints": prints}
    return {"method": first["line"], "role": first["role"], **found}


def table(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate the standings; for a reader, the first of each role at each speed-up."""
    every = standings(part)
    if "method" not in every:
        every = every.reindex(columns=[*MEASURE, "phase", "at_least", "place", "method", "role"])
    first = every.drop_duplicates([*MEASURE, "phase", "at_least", "role"])
    tasks = sorted(part.loc[part["measure"] != "perplexity", "shown"].unique())
    counts = every.groupby([*MEASURE, "phase", "at_least"])["place"].transform("max")
    readable = [
        _readable(row, counts[place], tasks)
        for place, row in zip(first.index, first.to_dict("records"), strict=True)
    ]
    table = pd.DataFrame(readable).fillna("")
    texts = part.loc[part["measure"] == "perplexity", "name"].nunique()
    return every, table if texts > 1 else table.drop(columns="on")


def _readable(row: dict[Any, Any], of: float, tasks: list[str]) -> dict[str, str]:
    """A row of the table; without a method where none is as fast."""
    at = {"speed-up of": row["phase"], "at least": f"{row['at_least']:g}", "on": row["name"]}
    if pd.isna(row["place"]):
        return at | {"method": "none is as fast"}
    shown = {
        "place": f"{row['place']:.0f} of {of:.0f}",
        "method": row["method"],
        "of those": row["role"],
        "sparsity": f"{row['sparsity_target']:.2f}",
        "how": row["how"],
        "speed-up": f"{row['speedup']:.2f}",
        "perplexity / dense": tables.interval(tuple(row[name] for name in RATIO), ".3f"),
        **{task: "" if pd.isna(row[task]) else f"{row[task]:.3f}" for task in tasks},
        "FLOPs": f"{row['flops_ratio']:.3f}",
        "training s": f"{row['training_s']:.0f}",
    }
    for name, said in (("kv", "KV"), ("peak", "peak")):
        ratio, value = row[name] / row[f"dense_{name}"], row[name] / MIB
        shown[f"{said} MiB (/ dense)"] = "" if pd.isna(ratio) else f"{value:,.1f} ({ratio:.2f})"
    return at | shown


def remark(part: pd.DataFrame) -> str:
    """Say how the points were timed, and which methods were not."""
    said = []
    for phase in PHASES:
        cases = part[f"{phase}_case"].dropna().unique()
        said += [f"{phase.capitalize()}: {cases[0]}." if len(cases) else f"No {phase} was timed."]
    lines = part[part["line"] != DENSE].groupby("line")[list(PHASES)].count()
    without = [str(line) for line in lines.index[lines.sum(axis=1) == 0]]
    if without:
        said.append(f"Not timed so (speed=sweep times them): {', '.join(without)}.")
    return " ".join(said)


VIEW = View(
    "verdict",
    "Does it pay?",
    "Perplexity and accuracy against measured speed-up, and against FLOPs. Grey steps: the front "
    "over all methods; nothing that is at least as fast loses less. In the table, a measured "
    "point is at least as fast; what stands between two sparsities lies on the line of log "
    "perplexity over log speed-up between two neighbouring points of the method; nothing is "
    "extrapolated. Intervals: 95 %, paired with the dense model's documents.",
    "no point was timed: run runners/sweep.py with speed=sweep",
    rows,
    table,
    "Who loses least at a speed-up: the first that routes each token, and the first control",
    panels,
    more={DENSE: STAR, "front": FRONT},
    share=(False, False),
    height_in=2.2,
    remark=remark,
    printed=True,
)

if __name__ == "__main__":
    run(VIEW, __doc__)
