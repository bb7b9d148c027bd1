"""Are two methods different? Paired tests on the same items, from the store.

python analysis/significance.py results_dir=results [out_dir=results/plots]

Every pair of methods at one target sparsity (and each method against the dense model) is compared
on the items that both answered. With three seeds or more of each method the test says whether the
recipes differ: its error has a part of the seeds and a part of the items. With fewer it says no
more than whether these trained models differ. P-values of a task are corrected for the number of
pairs (Holm).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from typing import Any, cast

import numpy as np
import pandas as pd
from scipy import stats

from analysis.cli import run
from analysis.frames import DENSE, GENERATION, MEASURE, joined
from analysis.intervals import (
    Interval,
    accuracy_difference,
    perplexity_ratio,
    ratio_of_sums,
)
from analysis.view import View

SEEDS_NEEDED = 3
"""With two, a spread that happens to be small passes for none in 7 % of equal pairs."""


def compare(items: pd.DataFrame) -> pd.DataFrame:
    """Test each pair of methods on each task or text at each target.

    Returns:
        `MEASURE`, `sparsity_target`, `a`, `b`, `n`, `a_seeds`, `b_seeds`, `a_value`, `b_value`,
        `difference` (a minus b; of perplexities the ratio a / b), `low`, `high` (95 %), `test`,
        `p`, `p_holm` (missing where a method has fewer than `SEEDS_NEEDED` seeds), `fingerprints`.
    """
    groups = items[items["line"] != DENSE].groupby([*MEASURE, "sparsity_target"])
    table = pd.concat([_pairs(part).assign(**_named(key)) for key, part in groups])
    table = table[table["n"] > 0].reset_index(drop=True)
    tested = table[table.pop("enough")]
    table["p_holm"] = tested.groupby(MEASURE)["p"].transform(lambda p: holm(p.to_numpy()))
    return table[[*MEASURE, "sparsity_target", *table.columns.drop([*MEASURE, "sparsity_target"])]]


def _named(key: Any) -> dict[str, Any]:
    return dict(zip([*MEASURE, "sparsity_target"], key, strict=True))


def _pairs(part: pd.DataFrame) -> pd.DataFrame:
    """The pairs on one task or text at one target, the dense model among them."""
    wide: Any = part.pivot_table(index="item", columns=["line", "seed"], values="value")
    beside = part.groupby("item")[["dense", "weight"]].first()
    values = {line: wide[line].to_numpy() for line in wide.columns.unique("line")}
    values[DENSE] = beside[["dense"]].to_numpy()
    lines = sorted(values)
    seeds = np.array([values[line].shape[1] for line in lines])
    room = [((0, 0), (0, seeds.max() - own)) for own in seeds]
    padded = [
        np.pad(values[n], width, constant_values=np.nan)
        for n, width in zip(lines, room, strict=True)
    ]
    whole = np.stack(padded)  # [lines, items, seeds]
    i, j = np.triu_indices(len(lines), 1)
    known = (seeds >= SEEDS_NEEDED) | (np.array(lines) == DENSE)
    enough, weights = known[i] & known[j], beside["weight"].to_numpy()
    n, x, y, difference, half, p = paired(whole[i], whole[j], weights, seeds=enough)
    measure = part["measure"].iloc[0]
    nats = measure == "perplexity"
    shown = np.exp if nats else np.asarray
    low, high = shown(difference - half), shown(difference + half)
    test = np.where(enough, "t over seeds and items", "t over items").astype(object)
    if nats:
        test[~enough] = "bootstrap over documents"
    elif np.isin(whole[~np.isnan(whole)], (0, 1)).all():
        test[~enough & (seeds[i] == 1) & (seeds[j] == 1)] = "mcnemar"
    for place in np.flatnonzero(~enough & (n > 0)):
        found = _of_these_models(measure, whole[i[place]], whole[j[place]], weights)
        low[place], high[place], p[place] = found.low, found.high, found.p
    prints = part.groupby("line")["fingerprint"].agg(joined).reindex(lines, fill_value="")
    return pd.DataFrame(
        {
            "a": np.array(lines)[i],
            "b": np.array(lines)[j],
            "n": n,
            "a_seeds": seeds[i],
            "b_seeds": seeds[j],
            "a_value": shown(x),
            "b_value": shown(y),
            "difference": shown(difference),
            "low": low,
            "high": high,
            "test": test,
            "p": p,
            "fingerprints": [
                joined(prints[[lines[k] for k in pair]]) for pair in zip(i, j, strict=True)
            ],
            "enough": enough,
        }
    )


def _of_these_models(measure: str, a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> Interval:
    """Compare what two models said of the items that both have [items, seeds], seeds averaged."""
    both = ~np.isnan(a).all(axis=1) & ~np.isnan(b).all(axis=1)
    own, other = np.nanmean(a[both], axis=1), np.nanmean(b[both], axis=1)
    if measure == "perplexity":
        return perplexity_ratio(own, other, weights[both])
    if measure == GENERATION:
        return ratio_of_sums(own - other, weights[both])
    return accuracy_difference(own, other)


def paired(
    a: np.ndarray, b: np.ndarray, weights: np.ndarray, *, seeds: Any = True
) -> tuple[np.ndarray, ...]:
    """Compare two weighted means over the items that both have.

    Seeds and items are random effects: the variance is that of the seeds' means plus that of the
    items' differences, which counts their interaction twice (never too little). The quantile, as
    the p-value, is the mean of Student's with the degrees of freedom of either part, weighted by
    the parts (Cochran and Cox 1957, section 4.14). Satterthwaite's single number of degrees finds
    a difference between equal recipes in 7.5 % of cases with three seeds against the dense model.

    Args:
        a, b: [..., items, seeds], sums over an item; NaN for an item that a seed does not have.
            One seed has no spread, as the dense model.
        weights: [..., items]; a mean is the sum of the values over that of the weights.
        seeds: bool [...], False leaves the spread of seeds out: whether these very models differ.

    Returns:
        number of items, mean of a, mean of b, their difference, half its 95 % interval, and the
        two-sided p-value of none; [...] each.
    """
    has = [~np.isnan(side) for side in (a, b)]
    both = has[0].any(axis=-1) & has[1].any(axis=-1)
    w, items = weights * both, both.sum(axis=-1)
    total, of_one, means = w.sum(axis=-1), np.maximum(1, items - 1.0), []
    of_seeds, square = np.zeros_like(total), np.zeros_like(total)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 of what is not there
        for side, own in zip((a, b), has, strict=True):
            means.append(np.where(both, np.nansum(side, axis=-1) / own.sum(axis=-1), 0.0))
            sizes = (w[..., None] * own).sum(axis=-2)
            by_seed = np.where(own & both[..., None], side, 0.0).sum(axis=-2) / sizes
            count = (sizes > 0).sum(axis=-1)
            centred = by_seed - (np.nansum(by_seed, axis=-1) / count)[..., None]
            variance = np.nansum(centred**2, axis=-1) / (count - 1) / count
            of_seeds += seeds * np.nan_to_num(variance)
            square += np.nan_to_num(seeds * variance**2 / (count - 1))
        mean_a, mean_b = (side.sum(axis=-1) / total for side in means)
        difference = mean_a - mean_b
        residual = means[0] - means[1] - difference[..., None] * w
        of_items = items / of_one * (residual**2).sum(axis=-1) / total**2
        variance = of_items + of_seeds
        t = np.where(difference == 0, 0.0, np.abs(difference) / np.sqrt(variance))
        share = np.where(variance > 0, of_items / variance, 0.5)
        degrees = np.where(square > 0, of_seeds**2 / square, 1.0)
    p = share * 2 * stats.t.sf(t, of_one) + (1 - share) * 2 * stats.t.sf(t, degrees)
    quantile = share * stats.t.ppf(0.975, of_one) + (1 - share) * stats.t.ppf(0.975, degrees)
    return items, mean_a, mean_b, difference, quantile * np.sqrt(variance), p


def items_needed(difference: float, disagree: float, power: float = 0.8) -> int:
    """Count the items on which McNemar's exact test at 5 % sees a difference with this chance.

    Not by the normal approximation (Connor 1987), whose numbers have a chance of 0.76 to 0.80
    where 0.8 is asked: the exact test is conservative where few items are answered differently.

    Args:
        difference: of the two accuracies.
        disagree: share of the items that exactly one of the two gets right, at least that.
        power: chance to reject.
    """
    few, many = 1, 2
    while mcnemar_power(many, difference, disagree) < power:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        enough = mcnemar_power(middle, difference, disagree) >= power
        few, many = (few, middle) if enough else (middle, many)
    return many


def mcnemar_power(items: int, difference: float, disagree: float) -> float:
    """Compute the chance that `mcnemar` gives at most 0.05, over what two such models answer."""
    spread = 8 * (items * disagree * (1 - disagree)) ** 0.5 + 1
    mean = items * disagree
    both = np.arange(max(0, int(mean - spread)), min(items, int(mean + spread)) + 1)
    least = stats.binom.ppf(0.025, both, 0.5)
    least -= stats.binom.cdf(least, both, 0.5) > 0.025  # rejects at and below
    share = (disagree + difference) / (2 * disagree)
    rejects = stats.binom.cdf(least, both, share) + stats.binom.cdf(least, both, 1 - share)
    return float((stats.binom.pmf(both, items, disagree) * rejects).sum())


def holm(p: np.ndarray) -> np.ndarray:
    """Correct p-values step down, in the order given."""
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)
    raised = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    out = np.empty_like(raised)
    out[order] = raised
    return out


def table(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate the pairs of one setting; differences that hold after correction carry a star."""
    compared = compare(part)
    listed = cast("Any", compared.itertuples())
    readable = [
        {
            "on": row.shown,
            "target": f"{row.sparsity_target:.2f}",
            "a": row.a,
            "b": row.b,
            "items": row.n,
            "seeds": f"{row.a_seeds}, {row.b_seeds}",
            "a value": f"{row.a_value:.3f}",
            "b value": f"{row.b_value:.3f}",
            "a - b (perplexity: a / b)": f"{row.difference:.3f} [{row.low:.3f}, {row.high:.3f}]",
            "test": row.test,
            "p": f"{row.p:.2g}",
            "p (Holm)": "too few seeds"
            if pd.isna(row.p_holm)
            else f"{row.p_holm:.2g}{' *' if row.p_holm < 0.05 else ''}",
        }
        for row in listed
    ]
    return compared, pd.DataFrame(readable)


VIEW = View(
    "significance",
    "Significance",
    "Pairs of methods on the items that both answered; * holds at 0.05 after Holm's correction "
    f"over the pairs of a task. With fewer than {SEEDS_NEEDED} seeds of a method, p is of these "
    "trained models alone, and nothing is said of the recipes.",
    "no point here has its items saved: run it again with force=true",
    lambda store: store.items,
    table,
    "Too few seeds: perplexities by the bootstrap, accuracies of one seed by McNemar's exact test; "
    "all others by a t test",
)

if __name__ == "__main__":
    run(VIEW, __doc__)
