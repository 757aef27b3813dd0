from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.errors import StateNotStored
from executor.journal import Journal
from plans.errors import BadStoredData, InvalidInput
from tests.executor.running_agent import desired, replica

STATE = desired(3, g0=[replica("a")], g1=[replica("b", max_batch=2)])


def test_nothing_was_ever_committed_in_a_new_folder(tmp_path):
    assert Journal(tmp_path / "deep" / "er").read() is None


def test_what_was_written_last_is_read_back(tmp_path):
    Journal(tmp_path).write(desired(2))
    Journal(tmp_path).write(STATE)
    assert Journal(tmp_path).read() == STATE
    assert [path.name for path in tmp_path.iterdir()] == ["committed.foreplan"]


def test_every_cut_is_found(tmp_path):
    journal = Journal(tmp_path)
    journal.write(STATE)
    content = journal.path.read_bytes()
    for length in range(len(content)):
        journal.path.write_bytes(content[:length])
        with pytest.raises(BadStoredData, match=r"committed\.foreplan"):
            journal.read()


@given(position=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_every_changed_byte_is_found(tmp_path_factory, position, flip):
    journal = Journal(tmp_path_factory.mktemp("journal"))
    journal.write(STATE)
    content = bytearray(journal.path.read_bytes())
    content[position % len(content)] ^= flip
    journal.path.write_bytes(content)
    with pytest.raises(BadStoredData):
        journal.read()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no journal"),
        (b'{"generation": 3}\n', "no journal"),
        (b"FOREPLAN-AGENT-JOURNAL 2\n00000000 0\n", "version 2"),
        (b"FOREPLAN-AGENT-JOURNAL 1\n00000000 0\nmore", "checksum"),
        (b"FOREPLAN-AGENT-JOURNAL 1\n00000000 0\n", "no desired state"),
    ],
)
def test_a_damaged_journal_says_what_to_do(tmp_path, content, says):
    journal = Journal(tmp_path)
    journal.path.write_bytes(content)
    with pytest.raises(BadStoredData, match=says) as caught:
        journal.read()
    assert "foreplan apply" in str(caught.value) or "Foreplan that wrote it" in str(caught.value)


def test_a_journal_that_cannot_be_read_is_bad_data(tmp_path):
    journal = Journal(tmp_path)
    journal.path.mkdir()
    with pytest.raises(BadStoredData, match="cannot be read"):
        journal.read()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match=r"--state-dir: found .*state.*expected a folder .*; name a folder"):
        Journal(tmp_path / "file" / "state")


@pytest.mark.parametrize("call", ["write", "clear"])
def test_what_the_disk_refuses_is_named_and_leaves_what_was_stored(tmp_path, monkeypatch, call):
    journal = Journal(tmp_path)
    journal.write(STATE)

    def refuse(*_arguments, **_keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", refuse)
        patch.setattr(type(journal.path), "unlink", refuse if call == "clear" else type(journal.path).unlink)
        with pytest.raises(StateNotStored, match=r"committed\.foreplan cannot be written: No space left"):
            journal.write(desired(4)) if call == "write" else journal.clear()
    assert journal.read() == STATE


def test_a_folder_that_is_gone_is_named_when_it_is_written(tmp_path):
    journal = Journal(tmp_path / "state")
    (tmp_path / "state").rmdir()
    with pytest.raises(StateNotStored, match="cannot be written: No such file"):
        journal.write(STATE)
