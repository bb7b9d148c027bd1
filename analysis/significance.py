"""Are two methods different? Paired tests on the same items, from the store.

python analysis/significance.py results_dir=results [out_dir=results/plots]

Every pair of methods at one target sparsity (and each method against the dense model) is compared
on the items that both answered: accuracies by McNemar's exact test, perplexities by a paired
bootstrap over documents. P-values of a task are corrected for the number of pairs (Holm).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import itertools
import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis import frames
from analysis.cli import Paths, run
from analysis.drawing import tables

log = logging.getLogger(__name__)

BOOTSTRAP_SAMPLES = 10_000
DRAWN_AT_ONCE = 500
ORDER = ["measure", "name", "sparsity_target", "a", "b"]
SAME = ["measure", "name", "metric", "item"]


def main(paths: Paths) -> None:
    """Write one table per (model, data, budget): `significance-<setting>.{csv,md}`."""
    items = frames.items(paths.results_dir)
    for name, _, part in frames.by_setting(items):
        for path in save(compare(part), name, paths.out_dir / f"significance-{name}"):
            log.info("wrote %s", path)


def save(compared: pd.DataFrame, _: str, stem: Path) -> list[Path]:
    """Table of one setting, from `compare`."""
    return tables.save(stem, compared, formatted(compared))


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
        key = {"measure": measure, "name": name, "sparsity_target": target}
        for both, pairs in _pairs(wide):
            a, b = (both[[pair[side] for pair in pairs]].to_numpy() for side in (0, 1))
            if measure == "accuracy":
                figures = _accuracy(a, b, exact=part["seed"].nunique() == 1)
            else:
                figures = _perplexity(a, b, weights.loc[both.index].to_numpy())
            rows += [
                key | {"a": first, "b": second, "n": len(both)} | found
                for (first, second), found in zip(pairs, figures, strict=True)
            ]
    table = pd.DataFrame(rows)
    if not table.empty:
        table = table.sort_values(ORDER, ignore_index=True)
        groups = table.groupby(["measure", "name"])["p"]
        table["p_holm"] = groups.transform(lambda p: holm(p.to_numpy()))
    return table


def _pairs(wide: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, list[tuple[str, str]]]]:
    """Pairs of columns that share their answered items, with those items' rows."""
    answered = wide.notna()
    groups: dict[bytes, list[tuple[str, str]]] = {}
    for a, b in itertools.combinations(sorted(wide.columns), 2):
        groups.setdefault((answered[a] & answered[b]).to_numpy().tobytes(), []).append((a, b))
    for mask, pairs in groups.items():
        both = wide[np.frombuffer(mask, dtype=bool)]
        if len(both):
            yield both, pairs


def _accuracy(a: np.ndarray, b: np.ndarray, *, exact: bool) -> Iterator[dict[str, Any]]:
    """Figures of each column of [items, pairs]."""
    low, high, p = intervals(a - b, np.ones(len(a)))
    for i in range(a.shape[1]):
        x, y = a[:, i], b[:, i]
        binary = exact and bool(np.isin(x, (0, 1)).all() and np.isin(y, (0, 1)).all())
        yield {
            "a_value": x.mean(),
            "b_value": y.mean(),
            "difference": (x - y).mean(),
            "low": low[i],
            "high": high[i],
            "test": "mcnemar" if binary else "bootstrap",
            "p": mcnemar(x, y) if binary else p[i],
        }


def _perplexity(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> Iterator[dict[str, Any]]:
    """Figures of each column of [documents, pairs]; values are sums of nats."""
    low, high, p = intervals(a - b, weights)
    total = weights.sum()
    for i in range(a.shape[1]):
        yield {
            "a_value": float(np.exp(a[:, i].sum() / total)),
            "b_value": float(np.exp(b[:, i].sum() / total)),
            "difference": float(np.exp((a[:, i] - b[:, i]).sum() / total)),
            "low": float(np.exp(low[i])),
            "high": float(np.exp(high[i])),
            "test": "bootstrap",
            "p": p[i],
        }


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided exact p-value: are the items that only one of two got right split evenly?

    Args:
        a, b: 0 or 1 for each item.
    """
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    return _binomial(min(only_a, only_b), only_a + only_b)


@lru_cache(maxsize=4096)
def _binomial(fewer: int, both: int) -> float:
    """Two-sided p-value of `fewer` of `both` under an even split."""
    return 1.0 if both == 0 else float(stats.binomtest(fewer, both, 0.5).pvalue)


def _resampled(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means of items drawn with replacement, [samples, columns].

    Every column sees the same draws. How often each item is drawn times the items, a part of the
    samples at once: one product instead of a gather per column.

    Args:
        sums: [items, columns].
        weights: [items].
    """
    n, generator = len(sums), np.random.default_rng(0)
    together = np.column_stack([weights, sums])
    offsets = np.arange(DRAWN_AT_ONCE)[:, None] * n
    means = []
    for _ in range(0, BOOTSTRAP_SAMPLES, DRAWN_AT_ONCE):
        draws = generator.integers(0, n, size=(DRAWN_AT_ONCE, n))
        counts = np.bincount((draws + offsets).ravel(), minlength=DRAWN_AT_ONCE * n)
        drawn = counts.reshape(DRAWN_AT_ONCE, n).astype(float) @ together
        means.append(drawn[:, 1:] / drawn[:, :1])
    return np.concatenate(means)


def intervals(sums: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Low and high ends of the 95 % percentile interval of each column's weighted mean, and the
    two-sided p-value that this mean is zero (the bootstrap of the centred items).

    Args:
        sums: [items, columns]; the mean of a column is its sum over the sum of weights.
        weights: [items].
    """
    means = _resampled(sums, weights)
    observed = sums.sum(axis=0) / weights.sum()
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    # the mean of centred items is the mean less the observed one, draw by draw
    beyond = (np.abs(means - observed) >= np.abs(observed) - 1e-12).sum(axis=0)
    return low, high, (beyond + 1) / (len(means) + 1)


def bootstrap(sums: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of `sums.sum() / weights.sum()` over items."""
    low, high, _ = intervals(sums[:, None], weights)
    return float(low[0]), float(high[0])


def bootstrap_p(sums: np.ndarray, weights: np.ndarray) -> float:
    """Two-sided p-value that the mean is zero: bootstrap of the centred items."""
    return float(intervals(sums[:, None], weights)[2][0])


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
