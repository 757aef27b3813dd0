from __future__ import annotations

import pytest

from tests.executor.fake_runtime import FakeRuntime
from tests.executor.runtime.contract import RuntimeContract


class TestFakeRuntime(RuntimeContract):
    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls) -> FakeRuntime:
        return FakeRuntime()

    @pytest.fixture(scope="class", params=["fake-double", "fake-slow-20"])
    @classmethod
    def variant(cls, request: pytest.FixtureRequest) -> str:
        return str(request.param)
