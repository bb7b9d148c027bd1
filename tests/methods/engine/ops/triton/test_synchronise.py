"""No operation waits for the device: nothing on the host depends on a value there."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.methods.engine.ops.triton.launches import LLAMA_8B, SMOLLM2, launch_all, meta

pytest.importorskip("triton")
from tests.methods.engine.ops.triton.compiler import launching

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.item,
    aten.is_nonzero,
    aten.equal,
    aten._unique2,
    aten.repeat_interleave,
}


class NoWait(TorchDispatchMode):
    """Fails on operators whose result the host needs, and on copies between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if hasattr(a, "dim")]
        assert func.overloadpacket not in WAITING, func
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_)
        assert not (by_mask and any(t.dtype == torch.bool for t in tensors[1:])), func
        out = func(*args, **(kwargs or {}))
        moved = [*tensors, *(t for t in torch.utils._pytree.tree_leaves(out) if hasattr(t, "dim"))]
        assert len({t.device for t in moved}) <= 1, f"{func} moves data between devices"
        return out


@pytest.mark.parametrize("tokens", [1, 12, 512])
@pytest.mark.parametrize("model", [LLAMA_8B, SMOLLM2], ids=["8b", "135m"])
def test_operations_never_wait(model, tokens):
    with launching() as kernels, NoWait():
        launch_all(model._replace(tokens=tokens), torch.bfloat16)
    assert len(kernels) > 12


@pytest.mark.parametrize(
    "wait",
    [
        lambda mask: mask.nonzero(),
        lambda mask: mask[mask],
        lambda mask: mask.sum().item(),
        lambda mask: mask.to("cpu"),
        lambda mask: torch.zeros(2).to("meta"),
    ],
)
def test_waiting_is_noticed(wait):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoWait():
        wait(meta(4, dtype=torch.bool))
    cpu = torch.ones(4, dtype=torch.bool)
    with pytest.raises(AssertionError), NoWait():
        cpu[cpu] if wait(cpu) is not None else None
