from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

from tests.executor.front_door import agents, door, run, table
from tests.foreplan.workspace import ROOT

SERVICES = "services: [{name: chat, slo: {deadline: 10s}, variants: [{model: v}]}]\n"


def test_a_load_process_that_is_killed_is_told_and_what_the_other_has_is_written(tmp_path: Path) -> None:
    (tmp_path / "services.yaml").write_text(SERVICES)
    pd.DataFrame({"arrival_s": np.arange(100_000) * 0.01, "service": "chat"}).to_csv(tmp_path / "t.csv", index=False)

    async def scenario() -> None:
        async with agents("a") as (agent,), door(tmp_path / "gateway") as front:
            await front.control.set_routes(table(agent, deadline_s=10.0), timeout_s=5)
            flags = ["--trace", "t.csv", "--services", "services.yaml", "--gateway", front.address]
            load = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "foreplan", "load", *flags, "--processes", "2", "--requests", "kept.csv"),
                cwd=tmp_path,
                env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            while len(agent.served) < 10:
                await asyncio.sleep(0)
            first, _ = (one for one in psutil.Process(load.pid).children() if "spawn_main" in str(one.cmdline()))
            first.kill()
            out, told = await load.communicate()
        assert load.returncode == 1, told
        assert b"the 50000 requests of it are missing" in told
        assert b"requests in" in out
        assert 1 <= len(pd.read_csv(tmp_path / "kept.csv")) < 50_000

    run(scenario())
