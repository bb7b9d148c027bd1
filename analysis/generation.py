"""What a routed model writes: the same prompts continued by dense and by every method.

python analysis/generation.py results_dir=results [out_dir=results/plots]

Prints the gallery as a Markdown table; the CSV beside it has every seed.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from typing import Any

import numpy as np
import pandas as pd

from analysis.cli import run
from analysis.frames import DENSE, POINT, Store
from analysis.view import View


def rows(store: Store) -> pd.DataFrame:
    """Give the galleries the perplexity ratio of their points, and the dense model's own rows."""
    gallery = store.gallery
    if gallery.empty:
        return gallery
    texts = store.measures[store.measures["measure"] == "perplexity"]
    first = texts.drop_duplicates("fingerprint").set_index("fingerprint")["ratio"]
    gallery = gallery.assign(ratio=gallery["fingerprint"].map(first))
    own: dict[str, Any] = dict.fromkeys(("kept", "prefix", "ratio", "flops_ratio"), 1.0)
    own |= dict.fromkeys(("kept_stderr", "prefix_stderr", "seed"), np.nan)
    own |= {"line": DENSE, "method": DENSE, "variant": "", "role": "", "fingerprint": ""}
    own |= {"sparsity_target": 0.0, "sparsity_realised": 0.0}
    dense = gallery.assign(text=gallery["dense"], **own)
    dense = dense.drop_duplicates(["setting", "prompt"])
    return pd.concat([dense, gallery[gallery["line"] != DENSE]], ignore_index=True)


def table(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate each prompt, dense first; of several seeds the first one's text, the mean share."""
    by = [*POINT, "prompt"]
    means = part.groupby(by, dropna=False)[["kept", "prefix", "ratio"]].transform("mean")
    shown = part.assign(**means).sort_values("seed").drop_duplicates(by)
    order = ["place", "sparsity_target", "kept"]
    shown = shown.sort_values(order, ascending=[True, True, False], kind="stable")
    readable = pd.DataFrame(
        {
            "prompt": shown["prompt"],
            "method": shown["line"],
            "target": shown["sparsity_target"].map("{:.2f}".format),
            "perplexity / dense": shown["ratio"].map("{:.3f}".format),
            "kept": shown["kept"].map("{:.3f}".format),
            "before the first other": shown["prefix"].map("{:.3f}".format),
            "continuation": [" ".join(str(text).split()) for text in shown["text"]],
        }
    )
    return part, readable


VIEW = View(
    "generation",
    "What it writes",
    "Greedy decoding through the KV cache. Kept: share of the tokens of dense's continuations of "
    "test text that the method's model would write in their place, given what dense wrote before "
    "(its standard error is in the CSV, its interval in the trade-off); the next column counts "
    "only those before the first other token, as far as both write the same by themselves. "
    "Continuations are free, and cut at the same number of tokens; of several seeds, the first.",
    "no point has what it generates: run the sweep again with the same words, which adds it",
    rows,
    table,
    "The same prompts, dense first, then by target and share kept",
    printed=True,
)

if __name__ == "__main__":
    run(VIEW, __doc__)
