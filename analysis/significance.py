"""Are two methods different? Paired tests on the same items, from the store.

python analysis/significance.py results_dir=results [out_dir=results/plots]

Every pair of methods at one target sparsity (and each method against the dense model) is compared
on the items that both answered: accuracies by McNemar's exact test, perplexities by a paired
bootstrap over documents. P-values of a task are corrected for the number of pairs (Holm).
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis import frames, tables
from analysis.cli import Paths, run

log = logging.getLogger(__name__)

BOOTSTRAP_SAMPLES = 10_000
SAME = ["measure", "name", "metric", "item"]


def main(paths: Paths) -> None:
    """Write one table per (model, data, budget): `significance-<setting>.{csv,md}`."""
    items = frames.items(paths.results_dir)
    for name, _, part in frames.by_setting(items):
        compared = compare(part)
        stem = f"significance-{name}"
        for ending, text in (
            ("csv", compared.to_csv(index=False)),
            ("md", tables.markdown(formatted(compared))),
        ):
            log.info("wrote %s", tables.write(paths.out_dir / f"{stem}.{ending}", text))


def compare(items: pd.DataFrame) -> pd.DataFrame:
    """One row per task or text, target and pair of methods.

    Values of several seeds are averaged per item before they are compared; a McNemar test then
    needs one seed, so that accuracies over several seeds are compared by bootstrap.

    Columns: `measure`, `name`, `sparsity_target`, `a`, `b`, `n`, `a_value`, `b_value`,
    `difference` (a minus b; of perplexities the ratio a / b), `low`, `high` (95 %), `test`, `p`,
    `p_holm`.
    """
    rows: list[dict[str, Any]] = []
    routed = items[items.method != "dense"]
    for (measure, name, target), part in routed.groupby(["measure", "name", "sparsity_target"]):
        wide = part.pivot_table(index=SAME, columns="line", values="value", aggfunc="mean")
        wide["dense"] = part.groupby(SAME)["dense"].first()
        weights = part.groupby(SAME)["weight"].first()
        seeds = part["seed"].nunique()
        for a, b in itertools.combinations(sorted(wide.columns), 2):
            both = wide[[a, b]].dropna()
            if both.empty:
                continue
            figures = (
                _accuracy(both[a].to_numpy(), both[b].to_numpy(), exact=seeds == 1)
                if measure == "accuracy"
                else _perplexity(both[a], both[b], weights.loc[both.index])
            )
            key = {"measure": measure, "name": name, "sparsity_target": target}
            rows.append(key | {"a": a, "b": b, "n": len(both)} | figures)
    table = pd.DataFrame(rows)
    if not table.empty:
        groups = table.groupby(["measure", "name"])["p"]
        table["p_holm"] = groups.transform(lambda p: holm(p.to_numpy()))
    return table


def _accuracy(a: np.ndarray, b: np.ndarray, *, exact: bool) -> dict[str, Any]:
    difference = a - b
    low, high = bootstrap(difference, np.ones_like(difference))
    binary = exact and bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    return {
        "a_value": a.mean(),
        "b_value": b.mean(),
        "difference": difference.mean(),
        "low": low,
        "high": high,
        "test": "mcnemar" if binary else "bootstrap",
        "p": mcnemar(a, b) if binary else bootstrap_p(difference, np.ones_like(difference)),
    }


def _perplexity(a: pd.Series, b: pd.Series, weights: pd.Series) -> dict[str, Any]:
    difference, weight = (a - b).to_numpy(), weights.to_numpy()
    low, high = bootstrap(difference, weight)
    total = weight.sum()
    return {
        "a_value": float(np.exp(a.sum() / total)),
        "b_value": float(np.exp(b.sum() / total)),
        "difference": float(np.exp(difference.sum() / total)),
        "low": float(np.exp(low)),
        "high": float(np.exp(high)),
        "test": "bootstrap",
        "p": bootstrap_p(difference, weight),
    }


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided exact p-value: are the items that only one of two got right split evenly?

    Args:
        a, b: 0 or 1 for each item.
    """
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def _resampled(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means of items drawn with replacement, [samples]; a part of the samples at once."""
    generator = np.random.default_rng(0)
    means = []
    for _ in range(0, BOOTSTRAP_SAMPLES, 500):
        draws = generator.integers(0, len(sums), size=(500, len(sums)))
        means.append(sums[draws].sum(axis=1) / weights[draws].sum(axis=1))
    return np.concatenate(means)


def bootstrap(sums: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of `sums.sum() / weights.sum()` over items."""
    low, high = np.percentile(_resampled(sums, weights), [2.5, 97.5])
    return float(low), float(high)


def bootstrap_p(sums: np.ndarray, weights: np.ndarray) -> float:
    """Two-sided p-value that the mean is zero: bootstrap of the centred items."""
    observed = abs(sums.sum() / weights.sum())
    centred = sums - weights * (sums.sum() / weights.sum())
    beyond = np.abs(_resampled(centred, weights)) >= observed - 1e-12
    return float((beyond.sum() + 1) / (len(beyond) + 1))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction, in the order given."""
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)
    raised = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    out = np.empty_like(raised)
    out[order] = raised
    return out


def formatted(table: pd.DataFrame) -> pd.DataFrame:
    """The table for a reader; differences that hold after correction carry a star."""
    rows = []
    listed: Any = table.itertuples()
    for row in listed:
        star = " *" if row.p_holm < 0.05 else ""
        interval = f"[{row.low:.3f}, {row.high:.3f}]"
        rows.append(
            {
                "on": row.name,
                "measure": row.measure,
                "target": f"{row.sparsity_target:.2f}",
                "a": row.a,
                "b": row.b,
                "items": row.n,
                "a value": f"{row.a_value:.3f}",
                "b value": f"{row.b_value:.3f}",
                "a - b (perplexity: a / b)": f"{row.difference:.3f} {interval}",
                "test": row.test,
                "p": f"{row.p:.2g}",
                "p (Holm)": f"{row.p_holm:.2g}{star}",
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    run(main, __doc__)
