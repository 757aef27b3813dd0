from __future__ import annotations

import contextlib
import functools
import itertools
import json
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.errors import StateNotStored
from executor.journal import Journal
from plans.errors import BadStoredData, InvalidInput
from tests.executor.peer_process import ROOT
from tests.executor.running_agent import desired, replica

STATE = desired(3, g0=[replica("a")], g1=[replica("b", max_batch=2)])


def statement(journal: Journal, text: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(journal.path)) as connection, connection:
        connection.execute(text, values)


def test_nothing_was_ever_committed_in_a_new_folder(tmp_path):
    journal = Journal(tmp_path / "deep" / "er")
    assert journal.read() is None
    assert not journal.read_drained()


def test_what_was_written_last_is_read_back(tmp_path):
    Journal(tmp_path).write(desired(2))
    Journal(tmp_path).write(STATE)
    assert Journal(tmp_path).read() == STATE
    assert [path.name for path in tmp_path.iterdir()] == ["journal.sqlite"]


def test_what_is_cleared_is_gone(tmp_path):
    Journal(tmp_path).write(STATE)
    Journal(tmp_path).clear()
    assert Journal(tmp_path).read() is None


def test_drained_and_committed_leave_each_other_alone(tmp_path):
    Journal(tmp_path).write_drained(True)
    assert Journal(tmp_path).read() is None
    Journal(tmp_path).write(STATE)
    assert Journal(tmp_path).read_drained()
    Journal(tmp_path).clear()
    assert Journal(tmp_path).read_drained()
    Journal(tmp_path).write(STATE)
    Journal(tmp_path).write_drained(False)
    assert not Journal(tmp_path).read_drained()
    assert Journal(tmp_path).read() == STATE


def test_it_is_a_database_in_wal_mode_of_version_1(tmp_path):
    journal = Journal(tmp_path)
    journal.write(STATE)
    with contextlib.closing(sqlite3.connect(journal.path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)


@pytest.mark.parametrize(("begin", "before"), [("first", 0), ("next", 1)])
def test_a_kill_at_any_step_leaves_the_old_state_or_the_new(tmp_path, begin, before):
    program = [sys.executable, "-m", "tests.executor.killed_journal", str(tmp_path), begin]
    found = json.loads(
        subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout
    )
    assert len(found) > 10
    assert found == sorted(found)
    assert set(found) == {before, 2}


def interrupted(folder: Path) -> tuple[bytes, bytes]:
    """Return the database and its write-ahead log as they are after a commit, before they are joined."""
    journal = Journal(folder)
    journal.write(desired(2))
    after = Journal(folder / "after")
    after.write(STATE)
    with after._opened() as connection:
        row = connection.execute("SELECT desired, checksum FROM node").fetchone()
    with journal._opened() as connection:
        with connection:
            connection.execute("UPDATE node SET desired = ?, checksum = ?", row)
        return journal.path.read_bytes(), journal.path.with_name("journal.sqlite-wal").read_bytes()


def test_every_cut_of_the_log_gives_the_old_state_or_the_new(tmp_path):
    database, log = interrupted(tmp_path / "made")
    found = []
    for length in (*range(0, len(log), 37), len(log)):
        folder = tmp_path / "cut"
        folder.mkdir()
        (folder / "journal.sqlite").write_bytes(database)
        (folder / "journal.sqlite-wal").write_bytes(log[:length])
        state = Journal(folder).read()
        assert state is not None
        found.append(state.generation)
        shutil.rmtree(folder)
    assert found == sorted(found)
    assert set(found) == {2, 3}
    assert found[-1] == 3


def test_a_log_half_taken_over_gives_the_new_state(tmp_path):
    database, log = interrupted(tmp_path / "made")
    with Journal(tmp_path / "made")._opened() as connection:
        (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    joined = (tmp_path / "made" / "journal.sqlite").read_bytes()
    assert len(joined) == len(database)
    pages = range(0, len(database), page_bytes)
    for taken in itertools.product((False, True), repeat=len(pages)):
        folder = tmp_path / "half"
        folder.mkdir()
        mixed = [(joined if new else database)[at : at + page_bytes] for at, new in zip(pages, taken, strict=True)]
        (folder / "journal.sqlite").write_bytes(b"".join(mixed))
        (folder / "journal.sqlite-wal").write_bytes(log)
        assert Journal(folder).read() == STATE
        shutil.rmtree(folder)


def test_every_cut_of_the_database_is_found(tmp_path):
    journal = Journal(tmp_path)
    journal.write(STATE)
    content = journal.path.read_bytes()
    for length in range(0, len(content), 61):
        journal.path.write_bytes(content[:length])
        with pytest.raises(BadStoredData, match=r"journal\.sqlite"):
            journal.read()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    journal = Journal(tmp_path_factory.mktemp("stored"))
    journal.write(STATE)
    return journal.path.read_bytes()


@given(position=st.integers(0, 100_000), flip=st.integers(1, 255))
def test_a_changed_byte_is_found_or_harmless(stored, tmp_path_factory, position, flip):
    journal = Journal(tmp_path_factory.mktemp("journal"))
    content = bytearray(stored)
    content[position % len(content)] ^= flip
    journal.path.write_bytes(content)
    with contextlib.suppress(BadStoredData):
        assert journal.read() == STATE
        assert not journal.read_drained()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (["PRAGMA user_version = 2"], "version 2 of the journal is not known here, expected 1"),
        (["DROP TABLE node"], "no such table"),
        (["DELETE FROM node"], "its row is damaged"),
        (["UPDATE node SET desired = 'text'"], "its row is damaged"),
        (["UPDATE node SET drained = 7"], "its row is damaged"),
        (["UPDATE node SET drained = 1"], "checksum"),
        (["UPDATE node SET desired = x'00'"], "checksum"),
        (["UPDATE node SET desired = x'00', checksum = 1104745215"], "no desired state"),
    ],
)
def test_a_damaged_journal_says_what_to_do(tmp_path, damage, says):
    journal = Journal(tmp_path)
    journal.write(STATE)
    for text in damage:
        statement(journal, text)
    with pytest.raises(BadStoredData, match=says) as caught:
        journal.read()
    assert "foreplan apply" in str(caught.value) or "Foreplan that wrote it" in str(caught.value)
    with pytest.raises(BadStoredData, match=says):
        journal.write(STATE) if "no desired" not in says else journal.read()


@pytest.mark.parametrize("content", [b"", b"rubbish", b"SQLite format 3\0 and no more"])
def test_what_is_no_database_is_refused(tmp_path, content):
    journal = Journal(tmp_path)
    journal.path.write_bytes(content)
    with pytest.raises(BadStoredData, match=r"move the files journal\.sqlite"):
        journal.read()


def test_a_journal_that_cannot_be_read_is_bad_data(tmp_path):
    journal = Journal(tmp_path)
    journal.path.mkdir()
    with pytest.raises(BadStoredData, match="cannot be read"):
        journal.read()


def test_the_file_that_an_older_foreplan_kept_is_refused_until_it_is_moved_away(tmp_path):
    journal = Journal(tmp_path)
    old = tmp_path / "committed.foreplan"
    old.write_bytes(b"FOREPLAN-AGENT-JOURNAL 1\n")
    for call in (journal.read, journal.read_drained, lambda: journal.write(STATE)):
        with pytest.raises(BadStoredData, match=r"committed\.foreplan: this is the journal of an older Foreplan"):
            call()
    old.unlink()
    journal.write(STATE)
    assert journal.read() == STATE


def test_a_log_left_by_a_database_moved_away_is_not_taken_over(tmp_path):
    journal = Journal(tmp_path / "new")
    _, log = interrupted(tmp_path / "made")
    (tmp_path / "new" / "journal.sqlite-wal").write_bytes(log)
    journal.write(desired(7))
    assert journal.read() == desired(7)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match=r"--state-dir: found .*state.*expected a folder .*; name a folder"):
        Journal(tmp_path / "file" / "state")


@contextlib.contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    """Set a resource limit of this process inside the block."""
    limits = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, limits)


def full_disk() -> AbstractContextManager[None]:
    """Let no file grow past 512 bytes inside the block."""
    return limited(resource.RLIMIT_FSIZE, 512)


def no_open_files(_: Path) -> AbstractContextManager[None]:
    """Let this process open no file inside the block."""
    return limited(resource.RLIMIT_NOFILE, 0)


@contextlib.contextmanager
def no_log(path: Path) -> Iterator[None]:
    """Let no write-ahead log be made inside the block, as without a free inode."""
    log = path.with_name(f"{path.name}-wal")
    log.mkdir()
    yield
    log.rmdir()


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a read transaction inside the block, as a backup does."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT * FROM node").fetchall()
        yield


@pytest.mark.parametrize("kept_out", [no_open_files, no_log, held])
def test_what_keeps_a_whole_journal_from_being_opened_is_not_called_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_out: Callable[[Path], AbstractContextManager[None]]
) -> None:
    journal = Journal(tmp_path)
    journal.write(STATE)
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, timeout=0))
    with kept_out(journal.path):
        with pytest.raises(BadStoredData, match=r"cannot be read: .*; the journal itself may be whole: .* start again"):
            journal.read()
        with pytest.raises(
            StateNotStored, match=r"cannot be written: .*; the journal itself may be whole: .* try again"
        ):
            journal.write(desired(4))
    assert journal.read() == STATE


def test_damage_that_a_message_of_sqlite_quotes_is_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(STATE)
    journal.path.write_bytes(journal.path.read_bytes().replace(b"drained INTEGER", b"\xffrained INTEGER"))
    for call in (journal.read, journal.clear):
        with pytest.raises(BadStoredData, match=r"cannot be read: .*; move the files journal\.sqlite"):
            call()


@pytest.mark.parametrize("call", ["write", "clear", "drain"])
def test_what_the_disk_refuses_is_named_and_leaves_what_was_stored(tmp_path, call):
    journal = Journal(tmp_path)
    journal.write(STATE)
    calls = {
        "write": lambda: journal.write(desired(4)),
        "clear": journal.clear,
        "drain": lambda: journal.write_drained(True),
    }
    with full_disk():
        with pytest.raises(StateNotStored, match=r"journal\.sqlite cannot be written: disk I/O error"):
            calls[call]()
        assert journal.read() == STATE
    assert journal.read() == STATE
    assert not journal.read_drained()


def test_a_full_disk_at_the_first_commit_leaves_nothing_half_made(tmp_path):
    journal = Journal(tmp_path)
    with full_disk(), pytest.raises(StateNotStored, match="cannot be written"):
        journal.write(STATE)
    assert journal.read() is None
    journal.write(STATE)
    assert journal.read() == STATE


def test_a_folder_that_is_gone_is_named_when_it_is_written(tmp_path):
    journal = Journal(tmp_path / "state")
    (tmp_path / "state").rmdir()
    with pytest.raises(StateNotStored, match="cannot be written: unable to open database file"):
        journal.write(STATE)
