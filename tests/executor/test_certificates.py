from __future__ import annotations

import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from executor import certificates
from executor.certificates import init_authority, issue, read_certificate, rotate, rotate_authority
from executor.roles import Role
from plans.errors import BadStoredData, InvalidInput


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    init_authority(tmp_path / "ca")
    return tmp_path / "ca"


def test_a_certificate_says_name_role_hosts_and_when_it_ends(folder: Path) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    init_authority(folder.with_name("other"), now=now)
    made = issue(
        folder.with_name("other"), "node-a", Role.AGENT, hosts=["10.0.0.1", "node-a.lan", "::1"], days=7, now=now
    )
    assert (made.name, made.role) == ("node-a", Role.AGENT)
    assert set(made.hosts) == {"10.0.0.1", "node-a.lan", "::1"}
    assert made.expires == now + timedelta(days=7)


def test_keys_are_for_their_owner_only_and_certificates_for_everybody(folder: Path) -> None:
    issue(folder, "me", Role.OPERATOR)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {"ca.pem": 0o644, "ca-key.pem": 0o600, "me.pem": 0o644, "me-key.pem": 0o600}


def test_it_is_signed_by_the_authority_and_is_none_itself(folder: Path) -> None:
    issue(folder, "me", Role.CLIENT)
    authority, mine = (x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in ("ca.pem", "me.pem"))
    mine.verify_directly_issued_by(authority)
    assert not mine.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_it_never_outlives_its_authority(tmp_path: Path) -> None:
    end = init_authority(tmp_path, days=10).expires
    assert issue(tmp_path, "me", Role.CLIENT, days=90).expires == end


def test_rotating_keeps_what_it_says_and_changes_the_key(folder: Path) -> None:
    before = [issue(folder, "a", Role.AGENT, hosts=["h"]), issue(folder, "me", Role.OPERATOR)]
    keys = [(folder / name).read_bytes() for name in ("a-key.pem", "me-key.pem")]
    after = rotate(folder)
    assert [(one.name, one.role, one.hosts) for one in after] == [(one.name, one.role, one.hosts) for one in before]
    assert not set(keys) & {(folder / name).read_bytes() for name in ("a-key.pem", "me-key.pem")}
    assert [one.name for one in rotate(folder, ["me"])] == ["me"]


def test_a_new_authority_leaves_the_old_one_trusted_until_it_expires(folder: Path) -> None:
    old = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    rotate_authority(folder)
    new, kept = x509.load_pem_x509_certificates((folder / "ca.pem").read_bytes())
    assert kept == old
    issue(folder, "me", Role.CLIENT)
    x509.load_pem_x509_certificate((folder / "me.pem").read_bytes()).verify_directly_issued_by(new)
    rotate_authority(folder)
    assert old not in x509.load_pem_x509_certificates((folder / "ca.pem").read_bytes())


def test_a_certificate_is_replaced_only_when_that_is_asked_for(folder: Path) -> None:
    issue(folder, "me", Role.OPERATOR)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(
        InvalidInput, match=r"found me\.pem, expected no certificate of 'me' yet; .*rotate .* --replace"
    ):
        issue(folder, "me", Role.CLIENT)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert issue(folder, "me", Role.CLIENT, replace=True).role is Role.CLIENT
    (folder / "me.pem").unlink()  # as after a kill between key and certificate
    assert issue(folder, "me", Role.OPERATOR).role is Role.OPERATOR


def test_an_authority_that_has_expired_issues_nothing_until_it_is_replaced(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    init_authority(tmp_path, days=1, now=now - timedelta(days=5))
    with pytest.raises(InvalidInput, match=r"ca\.pem: found one that ended .*; .*certs rotate .*--ca"):
        issue(tmp_path, "me", Role.CLIENT)
    rotate_authority(tmp_path)
    assert issue(tmp_path, "me", Role.CLIENT).expires > now


def test_a_copy_under_another_name_is_not_rotated_in_place_of_what_it_is_a_copy_of(folder: Path) -> None:
    issue(folder, "me", Role.CLIENT)
    for end in (".pem", "-key.pem"):
        (folder / f"copy{end}").write_bytes((folder / f"me{end}").read_bytes())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(BadStoredData, match=r"copy\.pem: this is the certificate of 'me'"):
        rotate(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["", "../x", "a/b", "ca", "x-key", ".hidden"])
def test_a_name_that_is_no_file_of_its_own_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="NAME"):
        issue(folder, name, Role.CLIENT)


def test_servers_need_a_host_and_a_second_authority_a_folder_of_its_own(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="--host"):
        issue(folder, "g", Role.GATEWAY)
    with pytest.raises(InvalidInput, match="rotate --ca"):
        init_authority(folder)
    with pytest.raises(InvalidInput, match="certs init"):
        issue(folder.parent, "me", Role.CLIENT)
    with pytest.raises(InvalidInput, match="NAME"):
        rotate(folder, ["nobody"])


@pytest.mark.parametrize(
    ("kept", "remedy"), [("ca.pem", "put its ca-key.pem beside it"), ("ca-key.pem", "certs rotate --ca")]
)
def test_half_of_an_authority_is_never_written_over(folder: Path, kept: str, remedy: str) -> None:
    for path in folder.iterdir():
        if path.name != kept:
            path.rename(folder.parent / path.name)
    before = (folder / kept).read_bytes()
    with pytest.raises(InvalidInput, match=rf"found {kept}, expected a folder without an authority; .*{remedy}"):
        init_authority(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {kept: before}


def test_a_key_that_is_kept_elsewhere_is_asked_for(folder: Path) -> None:
    (folder / "ca-key.pem").rename(folder.parent / "ca-key.pem")
    with pytest.raises(InvalidInput, match=r"found no ca-key\.pem, .*; put it back from where it is kept"):
        issue(folder, "me", Role.CLIENT)


def test_damaged_files_are_named(folder: Path) -> None:
    issue(folder, "me", Role.CLIENT)
    (folder / "me.pem").write_text("nothing")
    with pytest.raises(BadStoredData, match=r"me\.pem"):
        read_certificate(folder / "me.pem")
    other = folder.with_name("other")
    init_authority(other)
    (folder / "ca-key.pem").write_bytes((other / "ca-key.pem").read_bytes())
    with pytest.raises(BadStoredData, match=r"not the key"):
        issue(folder, "you", Role.CLIENT)


@pytest.mark.parametrize(
    "host", ["bad host", "10.0.0.1:7443", "-node", "node_.", "", "a" * 254, "node/a", "[::1]:8001"]
)
def test_a_host_that_no_caller_could_name_is_refused(folder: Path, host: str) -> None:
    with pytest.raises(InvalidInput, match=r"--host.*without a port"):
        issue(folder, "node-a", Role.AGENT, hosts=[host])


def test_an_authority_changed_twice_stays_trusted_as_long_as_it_has_signed_a_certificate_here(folder: Path) -> None:
    issue(folder, "me", Role.CLIENT)
    mine = x509.load_pem_x509_certificate((folder / "me.pem").read_bytes())
    rotate_authority(folder)
    rotate_authority(folder)
    trusted = x509.load_pem_x509_certificates((folder / "ca.pem").read_bytes())
    assert len(trusted) == 3
    mine.verify_directly_issued_by(trusted[-1])
    rotate(folder)
    rotate_authority(folder)
    assert len(x509.load_pem_x509_certificates((folder / "ca.pem").read_bytes())) == 2


def test_there_is_nothing_to_rotate_without_an_authority(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="certs init"):
        rotate(tmp_path / "nowhere")


def test_an_authority_whose_making_or_change_was_cut_short_is_lost_in_no_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(path: Path, key: object) -> None:
        raise KeyboardInterrupt(path)

    with monkeypatch.context() as patch:
        patch.setattr(certificates, "_write_key", cut_short)
        with pytest.raises(KeyboardInterrupt):
            init_authority(tmp_path)
    with pytest.raises(InvalidInput, match=r"found ca\.pem.*remove it if nothing trusts it"):
        init_authority(tmp_path)
    (tmp_path / "ca.pem").unlink()
    init_authority(tmp_path)
    old = x509.load_pem_x509_certificate((tmp_path / "ca.pem").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(certificates, "_write_key", cut_short)
        with pytest.raises(KeyboardInterrupt):
            rotate_authority(tmp_path)
    issue(tmp_path, "me", Role.CLIENT)
    mine = x509.load_pem_x509_certificate((tmp_path / "me.pem").read_bytes())
    mine.verify_directly_issued_by(old)
    rotate_authority(tmp_path)
    new, *kept = x509.load_pem_x509_certificates((tmp_path / "ca.pem").read_bytes())
    assert kept == [old]
    issue(tmp_path, "you", Role.CLIENT)
    x509.load_pem_x509_certificate((tmp_path / "you.pem").read_bytes()).verify_directly_issued_by(new)


@pytest.mark.parametrize("days", [0, 36_501, 10_000_000])
def test_a_time_that_no_calendar_has_is_refused_everywhere(folder: Path, days: int) -> None:
    calls: list[Callable[[], object]] = [
        lambda: init_authority(folder.with_name("new"), days=days),
        lambda: issue(folder, "me", Role.CLIENT, days=days),
        lambda: rotate(folder, days=days),
        lambda: rotate_authority(folder, days=days),
    ]
    for call in calls:
        with pytest.raises(InvalidInput, match=rf"--days: found {days}, expected 1 to 36500"):
            call()


def test_rotating_replaces_all_or_nothing_where_one_was_issued_by_somebody_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    issue(folder, "a", Role.CLIENT)
    with monkeypatch.context() as patch:
        patch.setattr(certificates, "role_uri", lambda role: f"urn:other:{role}")
        issue(folder, "b", Role.CLIENT)
    before = (folder / "a.pem").read_bytes()
    with pytest.raises(BadStoredData, match=r"b\.pem.*names no role"):
        rotate(folder)
    assert (folder / "a.pem").read_bytes() == before
