from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="rewrite tests/golden from what the code makes now")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(rewrite=request.config.getoption("--rewrite-golden", default=False))


class Golden:
    """Compares a text with tests/golden/NAME, or writes it when asked to."""

    def __init__(self, *, rewrite: bool) -> None:
        self._rewrite = rewrite

    def check(self, name: str, text: str) -> None:
        path = Path(__file__).parents[1] / "golden" / name
        if self._rewrite:
            path.write_text(text)
        assert text == path.read_text(), f"{name} changed; if it should, run pytest tests/planner --rewrite-golden"
