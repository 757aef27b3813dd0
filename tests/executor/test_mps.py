from __future__ import annotations

import os

import pytest

from executor.mps import mps_is_running

PID_FILE = "nvidia-cuda-mps-control.pid"


def test_no_daemon_no_mps(tmp_path):
    assert not mps_is_running(tmp_path / "nowhere")


def test_a_daemon_that_lives_is_noticed_where_cuda_looks_for_it(tmp_path, monkeypatch):
    (tmp_path / PID_FILE).write_text(f"{os.getpid()}\n")
    assert mps_is_running(tmp_path)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert mps_is_running()


@pytest.mark.parametrize("content", ["", "none", "99999999"])
def test_what_a_dead_daemon_left_behind_is_none(tmp_path, content):
    (tmp_path / PID_FILE).write_text(content)
    assert not mps_is_running(tmp_path)
