"""Layers on several devices, without one: every tensor is moved that has to be."""

from __future__ import annotations

import subprocess
import sys

import pytest

from methods.engine.decoder.families import FAMILIES
from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_numbers_are_those_of_one_device(family):
    command = [sys.executable, "-m", "tests.methods.engine.decoder.two_devices", family]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "halves informed" in done.stdout and "some on the host informed" in done.stdout
