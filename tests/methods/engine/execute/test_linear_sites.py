"""The column layout of forecasters lives with the method, and follows its weights."""

from __future__ import annotations

import pytest
import torch

from methods.engine.ops.cpu.build import reason_without
from methods.engine.ops.cpu.compiled import CompiledRowOps
from methods.engine.routed import attach, routed
from methods.informed import Informed
from tests.methods.conftest import small_ids, small_model

pytestmark = pytest.mark.skipif(reason_without() is not None, reason="no C compiler")


@torch.no_grad()
def test_maps_are_copied_once_and_after_a_change(monkeypatch):
    model, ids = small_model(), small_ids(2, 24)
    method = attach(model, Informed(sparsity=0.5, rank=16)).eval()
    method.threshold.fill_(float("inf"))
    keys, copied, copy = set(method.state_dict()), [], CompiledRowOps.maps
    monkeypatch.setattr(
        CompiledRowOps, "maps", lambda ops, unit: copied.append(unit) or copy(ops, unit)
    )

    def logits(kernels):
        copied.clear()
        with routed(model, method, "gathered", kernels=kernels):
            return model(input_ids=ids).logits

    first = logits("compiled")
    sites = len(copied)
    assert sites and torch.equal(logits("compiled"), first) and not copied
    weight = next(p for name, p in method.named_parameters() if name.endswith("up.weight"))
    weight.normal_()
    changed = logits("compiled")
    assert len(copied) == 1 and not torch.equal(changed, first)
    torch.testing.assert_close(changed, logits("torch"), atol=1e-3, rtol=1e-3)
    assert set(method.state_dict()) == keys
