"""What tests of searches share."""

import pytest

from moeplan.planner import relief
from tests.planner import brute


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloads count in the shares that brute force looks at."""
    monkeypatch.setattr(relief, "SHARES", len(brute.SHARES) - 1)
