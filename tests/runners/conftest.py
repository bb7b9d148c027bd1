"""What the tests of runs under faults share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.runners.nursery import Nursery


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Starts runs quickly."""
    running = Nursery(tmp_path_factory.mktemp("nursery"))
    yield running
    running.close()
