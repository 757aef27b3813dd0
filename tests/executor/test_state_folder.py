from __future__ import annotations

import pytest

from executor.state_folder import locked_folder
from plans.errors import InvalidInput


def test_a_folder_is_made_and_is_free_again_afterwards(tmp_path):
    for _ in range(2):
        with locked_folder(tmp_path / "deep" / "state", "agent") as folder:
            assert folder.is_dir()


def test_one_process_of_a_role_may_use_a_folder(tmp_path):
    with (
        locked_folder(tmp_path, "agent"),
        locked_folder(tmp_path, "gateway"),
        pytest.raises(InvalidInput, match=r"--state-dir: .*no other agent uses; stop the agent"),
        locked_folder(tmp_path, "agent"),
    ):
        pass


@pytest.mark.parametrize("name", ["file", "file/state"])
def test_a_folder_that_cannot_be_used_is_named_with_a_remedy(tmp_path, name):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InvalidInput, match=r"--state-dir: found .*file.*; name a folder"),
        locked_folder(tmp_path / name, "gateway"),
    ):
        pass
