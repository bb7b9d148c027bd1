"""Which implementation runs, and that none of it needs Triton to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from methods.engine.ops import choose
from methods.engine.ops.choose import use_triton

ROOT = Path(__file__).resolve().parents[4]


class Cuda:
    """What the choice looks at of a tensor."""

    is_cuda = True


@pytest.fixture(autouse=True)
def _compiler(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: object())


def test_auto_takes_triton_on_cuda_only(monkeypatch):
    assert use_triton("auto", Cuda()) and not use_triton("auto", torch.zeros(1))
    assert not use_triton("torch", Cuda())
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: None)
    assert not use_triton("auto", Cuda())
    with pytest.raises(ValueError, match="the package triton"):
        use_triton("triton", Cuda())


def test_triton_off_cuda_needs_the_interpreter(monkeypatch):
    with pytest.raises(ValueError, match="CUDA"):
        use_triton("triton", torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton("triton", torch.zeros(1)) and not use_triton("auto", torch.zeros(1))


def test_unknown_setting():
    with pytest.raises(ValueError, match="auto, compiled, triton, torch"):
        use_triton("cuda", torch.zeros(1))


def test_imports_and_runs_without_triton():
    code = (
        "import sys, pkgutil, importlib, torch\n"
        "sys.modules['triton'] = None\n"
        "import methods.engine.ops.triton as k\n"
        "for found in pkgutil.iter_modules(k.__path__, 'methods.engine.ops.triton.'):\n"
        "    importlib.import_module(found.name)\n"
        "mask = torch.ones(2, 3, dtype=torch.bool)\n"
        "partition = importlib.import_module('methods.engine.ops.triton.route').partition\n"
        "print(partition(mask, mask).executed.item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "6"


def test_public_modules_do_not_load_triton():
    """The compiler is loaded with the first kernel, not with the engine."""
    names = "types route linear_rows attend_rows".split()
    code = "import sys\n" + "".join(f"import methods.engine.ops.triton.{name}\n" for name in names)
    code += "assert not any('kernel' in m.rsplit('.', 1)[-1] and m.endswith('_kernel')"
    code += " for m in sys.modules)\nassert 'methods.engine.ops.triton.jit' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
