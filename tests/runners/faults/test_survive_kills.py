"""SIGKILL at random moments: nothing is lost, and the numbers are those of an undisturbed run."""

from __future__ import annotations

import os

import pytest

from tests.conftest import Commands
from tests.runners.survival import RECIPE, Killer, leftovers, outcome


def budget(steps: int) -> tuple[str, ...]:
    sizes = "batch_size:2,seq_len:32,accumulate:2"
    return tuple(
        f"budget.{stage}={{steps:{steps},{sizes}}}" for stage in ("forecasters", "routers", "lora")
    )


@pytest.mark.slow
def test_three_kills(tmp_path):
    words = (*RECIPE, *budget(60), "sparsity=0.4", "checkpoint_seconds=0.1")
    calm = Commands(tmp_path, tmp_path / "calm", tmp_path / "calm-cache")
    assert calm.run("sweep", *words).code == 0
    shaken = Commands(tmp_path, tmp_path / "shaken", tmp_path / "shaken-cache")
    killer = Killer(shaken, words, mean_s=1.0, seed=1)
    killer.run(3)
    assert killer.kills >= 2, killer.places
    assert outcome(shaken) == outcome(calm)
    assert leftovers(shaken.cache) == []


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    """As many rounds from nothing as fifty kills take; the last process of each is left alone."""
    wanted = int(os.environ.get("ROUTEBENCH_KILLS", "50"))
    words = (*RECIPE, *budget(150), "sparsity=0.3,0.5", "checkpoint_seconds=0.1")
    words += ("eval.tasks=[agreement]", "-m")
    calm = Commands(tmp_path, tmp_path / "calm", tmp_path / "calm-cache")
    assert calm.run("sweep", *words).code == 0
    expected = outcome(calm)
    assert len(expected) == 2
    kills, rounds = 0, 0
    while kills < wanted:
        folder = tmp_path / f"round{rounds}"
        shaken = Commands(tmp_path, folder / "results", folder / "cache")
        killer = Killer(shaken, words, seed=rounds, mean_s=6.0)
        killer.run(wanted - kills)
        print(f"round {rounds}: {killer.kills} kills {dict(killer.places)}", flush=True)
        assert outcome(shaken) == expected
        assert leftovers(shaken.cache) == []
        kills, rounds = kills + killer.kills, rounds + 1
