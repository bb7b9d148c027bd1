"""Routes a model whose layers are on two pretended GPUs; ends with an error if a number differs.

python -m tests.methods.engine.decoder.two_devices <family>

In a process of its own: a device that torch has been told of is there for good.
"""

from __future__ import annotations

import sys

import torch
from accelerate import dispatch_model
from torch import Tensor
from transformers import PreTrainedModel

from methods.base import Method
from methods.engine.cache.growing import preallocated_cache
from methods.engine.decoder.placement import layer_devices, spread
from methods.engine.routed import routed
from methods.engine.routing import routing_of
from runners.errors import UserError
from runners.evaluation.perplexity import Window, window_nlls
from runners.point import build_method
from runners.point_config import PointConfig
from tests.methods.conftest import METHODS, method_config, small_ids, small_model
from tests.methods.engine.pretend import Pretend, pretended

LAYERS = 4
ENDS = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
FIRST, SECOND = "pretend:0", "pretend:1"
HALVES = {f"model.layers.{i}": SECOND if i >= 2 else FIRST for i in range(LAYERS)}
MAPS = {
    "halves": {**HALVES, **dict(zip(ENDS, (FIRST, FIRST, SECOND, SECOND), strict=True))},
    "some on the host": {
        **HALVES,
        **dict(zip(ENDS, (SECOND, SECOND, FIRST, FIRST), strict=True)),
        "model.layers.1": "cpu",
        "model.layers.3": "cpu",
    },
}
SHARED = "hero"
"""Its layers share a module, which can be on one device only."""


def outputs(model: PreTrainedModel, method: Method, mode: str, device: str) -> list[Tensor]:
    """Logits of padded rows and of decoding, sparsity, and what a perplexity sums up."""
    ids, mask = small_ids(2, 12).to(device), torch.ones(2, 12, dtype=torch.long)
    mask[1, :3] = 0
    windows = [Window(i, 0, (5, 6, 7, 8 + i), (6, 7, 8 + i, 9)) for i in range(2)]
    torch.manual_seed(1)
    with routed(model, method, mode):
        found = [model(input_ids=ids, attention_mask=mask.to(device)).logits]
        cache = preallocated_cache(model)
        for start, end in ((0, 5), (5, 8), *((at, at + 1) for at in range(8, 12))):
            found.append(model(input_ids=ids[:1, start:end], past_key_values=cache).logits)
        found.append(torch.tensor(window_nlls(model, windows)))
        found.append(torch.tensor(routing_of(model).counters.read().sparsity()))
    return [out.held if isinstance(out, Pretend) else out for out in found]


def halfway(scores: Tensor) -> float:
    """Between the two middle scores: at one of them, rounding alone would decide."""
    ordered = scores.flatten().unique()
    middle = len(ordered) // 2
    return float(ordered[middle - 1 : middle + 1].mean())


def compare(family: str, places: dict[str, str], name: str) -> float:
    """Largest difference of the gathered path; the masked one must have none."""
    whole, parted = (small_model(family, layers=LAYERS) for _ in range(2))
    skip = parted._skip_keys_device_placement
    parted = dispatch_model(parted, places, main_device=FIRST, skip_keys=skip)
    assert spread(parted) and len(set(layer_devices(parted))) == 2
    config = PointConfig.parse(method_config(name, "sparsity=0.4"))
    methods = [build_method(config, model) for model in (whole, parted)]
    scores: list[Tensor] = []
    with routed(whole, methods[0]):
        routing_of(whole).observer = lambda _, decision, __: scores.append(decision.scores_BT)
        whole(input_ids=small_ids(2, 12))
    for method in methods:
        method.threshold.fill_(halfway(torch.stack(scores)) if scores else 0.0)
    worst = {}
    for mode in ("masked", "gathered"):
        expected = outputs(whole, methods[0], mode, "cpu")
        found = outputs(parted, methods[1], mode, FIRST)
        pairs = zip(expected, found, strict=True)
        worst[mode] = max(float((a - b).abs().max()) for a, b in pairs)
    assert worst["masked"] == 0.0 and worst["gathered"] < 1e-4, (name, worst)
    return worst["gathered"]


def main(family: str) -> None:
    """Every method's config on every map."""
    with torch.no_grad(), pretended():
        for label, places in MAPS.items():
            for name in METHODS:
                try:
                    print(label, name, compare(family, places, name))
                    assert name != SHARED
                except UserError as error:
                    assert name == SHARED and "layers share history" in str(error), error


if __name__ == "__main__":
    main(sys.argv[1])
