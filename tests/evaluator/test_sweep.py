"""Many runs: order, resumption, damage, and Ray."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from evaluator.sweep import Job, code_digest, run_jobs
from plans.errors import InvalidInput


def square(number):
    return {"square": number * number, "process": os.getpid()}


def fails(number):
    raise ValueError(f"no {number}")


def stays(number):
    threading.Event().wait()


def jobs(numbers, work=square):
    return [Job(key=f"job-{number}", work=work, arguments=(number,)) for number in numbers]


def squares(results):
    return [result["square"] for result in results.values()]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs(workers):
    assert squares(run_jobs(jobs([3, 1, 2]), workers=workers)) == [9, 1, 4]


def test_several_workers_are_other_processes():
    found = run_jobs(jobs([1, 2]), workers=2)
    assert os.getpid() not in {result["process"] for result in found.values()}


def test_what_was_kept_is_not_run_again(tmp_path):
    run_jobs(jobs([1, 2]), kept=tmp_path)
    (tmp_path / "job-1.json").write_text(json.dumps({"square": -1}))
    seen = []
    assert squares(run_jobs(jobs([1, 2, 3]), kept=tmp_path, done=seen.append)) == [-1, 4, 9]
    assert sorted(seen) == ["job-1", "job-2", "job-3"]


def test_what_ended_before_a_failure_is_kept(tmp_path):
    with pytest.raises(ValueError, match="no 7"):
        run_jobs([*jobs([2]), *jobs([7], fails)], kept=tmp_path)
    assert json.loads((tmp_path / "job-2.json").read_text())["square"] == 4


def test_an_interrupt_ends_the_processes_at_once_and_without_a_word_from_them():
    script = """if True:
        import sys
        from evaluator.sweep import run_jobs
        from tests.evaluator.test_sweep import jobs, stays
        try:
            run_jobs([*jobs([1]), *jobs([2, 3], stays)], workers=2, done=lambda key: print(key, flush=True))
        except KeyboardInterrupt:
            sys.exit(130)
    """
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "job-1\n"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "")


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_result_is_named(tmp_path, text):
    (tmp_path / "job-1.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"job-1\.json"):
        run_jobs(jobs([1]), kept=tmp_path)


def test_another_source_or_table_of_a_package_is_another_digest(tmp_path, monkeypatch):
    package = tmp_path / "simulated"
    package.mkdir()
    for name in ("__init__.py", "rules.py", "types.yaml", "notes.txt"):
        (package / name).write_text("1")
    monkeypatch.syspath_prepend(str(tmp_path))

    def digest():
        code_digest.cache_clear()
        return code_digest("simulated")

    seen = [digest()]
    assert digest() == seen[0]
    assert code_digest() != seen[0]
    for name, changes in (("rules.py", True), ("types.yaml", True), ("notes.txt", False)):
        (package / name).write_text("2")
        seen.append(digest())
        assert (seen[-1] != seen[-2]) == changes


def test_the_digest_of_no_package_is_a_mistake():
    with pytest.raises(ValueError, match="no package nowhere_at_all"):
        code_digest("nowhere_at_all")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray's own threads and sockets
def test_a_local_ray_gives_the_same_results(tmp_path):
    pytest.importorskip("ray", reason="the ray extra is not installed")
    assert squares(run_jobs(jobs([3, 1, 2]), engine="ray", workers=2, kept=tmp_path)) == [9, 1, 4]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_told_before_anything_runs(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="expected a folder"):
        run_jobs(jobs([1], fails), kept=tmp_path / name)
