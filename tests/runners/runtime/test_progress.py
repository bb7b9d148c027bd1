"""The line of a run: written into a log that is silent, redrawn in a terminal."""

from __future__ import annotations

import io
import logging
import time
from types import SimpleNamespace

import pytest

from runners.runtime import progress as module
from runners.runtime.progress import CLEAR, Bar, Console, line, note, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stream(request, monkeypatch):
    """What `sys.stdout` gets; a log, or a terminal of 60 columns."""
    found = request.param()
    monkeypatch.setattr(module, "sys", SimpleNamespace(stdout=found))
    monkeypatch.setattr(module, "REDRAWN_S", 0.01)
    monkeypatch.setenv("COLUMNS", "60")
    return found


log_file = pytest.mark.parametrize("stream", [io.StringIO], indirect=True)
terminal = pytest.mark.parametrize("stream", [Terminal], indirect=True)


@log_file
def test_a_log_gets_a_line_of_every_open_part_where_it_was_silent(stream, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(module, "EVERY_S", 0.02)
    with Bar(desc="informed"), Bar(desc="routers", total=8, initial=2) as bar:
        bar.update()
        note("loss 0.5")
        while not caplog.messages:  # a step that takes longer: nobody asks a bar to draw itself
            time.sleep(0.01)
    assert caplog.messages[0].startswith("informed: routers 3 of 8, loss 0.5, ")
    assert caplog.messages[0].endswith(" left")
    assert stream.getvalue() == "", "no bar in a log"


@log_file
def test_what_an_exception_left_open_is_closed(stream):
    with pytest.raises(ZeroDivisionError), Bar(desc="point"):
        kept = Bar(desc="stage", total=3)
        for _ in progress(range(3), "pass"):
            assert line().startswith("point: stage 0 of 3")
            raise ZeroDivisionError
    assert line() == "" and kept.total == 3


@terminal
def test_a_terminal_shows_one_line_and_empties_it(stream):
    with Bar(desc="point"), Bar(desc="calibrate"):
        for number in range(2):
            for _ in progress(range(2), "calibration"):
                time.sleep(0.12)  # tqdm draws ten times a second at most
            note(f"realised 0.{number}")
    drawn = stream.getvalue().split(CLEAR)
    assert drawn[-1] == "" and "\n" not in stream.getvalue()
    texts = [text for text in drawn if text]
    assert texts[0].startswith("point, 00:00")
    assert any(t.startswith("point: calibrate, realised 0.0: calibration ") for t in texts)
    assert "" not in drawn[1:-1], "emptied between two passes: it flickers"


@terminal
def test_outer_parts_give_way_in_a_narrow_terminal(stream):
    with Bar(desc="a point with a long name " * 2), Bar(desc="routers", total=30):
        assert line(60) == "routers 0 of 30, ? left"
        assert len(line()) > 60


@terminal
def test_a_log_line_stands_above_the_line(stream):
    handler = Console(stream)
    with Bar(desc="point", total=2):
        handler.emit(logging.makeLogRecord({"msg": "a warning"}))
    assert "a warning\n" in stream.getvalue()
    above, below = stream.getvalue().split("a warning\n")
    assert above.endswith(CLEAR) and below.startswith(f"{CLEAR}point 0 of 2")


def test_lm_evals_own_bars_are_parts_of_the_line():
    pytest.importorskip("lm_eval")
    from lm_eval.api import model, task
    from lm_eval.models import huggingface

    import runners.evaluation.harness  # noqa: F401

    assert {m.tqdm for m in (model, task, huggingface)} == {Bar}
