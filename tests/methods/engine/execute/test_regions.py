"""Parallel regions that a decoded token enters, counted at the runtime that opens them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from methods.engine.ops.cpu.build import reason_without
from tests.conftest import ROOT

COUNTER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>
long regions; /* of our loops: some builds of the library share out products of one row */
void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags) {
    void (*real)(void (*)(void *), void *, unsigned, unsigned) = dlsym(RTLD_NEXT, "GOMP_parallel");
    Dl_info from;
    int ours = dladdr((void *)work, &from) && strstr(from.dli_fname, "loops-");
    regions += ours && threads != 1;
    real(work, data, threads, flags);
}
"""
DECODING = """
import ctypes, sys, torch
from methods.engine.cache.growing import preallocated_cache
from methods.engine.routed import attach, routed
from methods.informed import Informed
from runners.base_model.synthetic import random_model
torch.set_num_threads(2)
torch.set_grad_enabled(False)
regions = ctypes.c_long.in_dll(ctypes.CDLL(sys.argv[1]), "regions")
sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 3, "head_dim": 64,
         "num_attention_heads": 9, "num_key_value_heads": 3}
model, _ = random_model(family="llama", sizes=sizes, seed=0)
method = attach(model, Informed(sparsity=0.5, rank=16))
ids = torch.randint(0, 200, (1, 12))
for threshold in (-9.0, 9.0):
    method.threshold.fill_(threshold)
    with routed(model, method, "gathered"):
        cache = preallocated_cache(model)
        model(input_ids=ids[:, :9], past_key_values=cache)
        before = regions.value
        for t in range(9, 12):
            model(input_ids=ids[:, t : t + 1], past_key_values=cache)
        print(before, regions.value - before)
"""


@pytest.mark.skipif(reason_without() is not None, reason="no C compiler")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD")
def test_no_other_thread_is_waited_for(tmp_path):
    """By our loops, whether the token executes all units or none; the prompt shows that the counter
    counts."""
    source, counter = tmp_path / "counter.c", tmp_path / "counter.so"
    source.write_text(COUNTER)
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")))
    command = [compiler, "-shared", "-fPIC", str(source), "-o", str(counter), "-ldl"]
    subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, "-c", DECODING, str(counter)],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(counter), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert [found for _, found in lines] == [0, 0]
    assert all(before > 0 for before, _ in lines)
