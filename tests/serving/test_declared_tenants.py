import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.serving.declared_tenants import DeclaredTenants
from server.store.keys import digest
from server.store.tenants_file import TenantsFileError
from tests.telemetry.captured_logs import CapturedLogs, captured_logs


@pytest.fixture(autouse=True)
def log() -> Iterator[CapturedLogs]:
    with captured_logs() as captured:
        yield captured


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.toml"
    path.write_text(f'[tenants.a]\nkeys = [{{ sha256 = "{digest("key")}" }}]\n')
    return path


def test_without_a_file_nobody_is_declared() -> None:
    declared = DeclaredTenants()
    declared.look_again()
    declared.follow()
    assert (dict(declared.tenants), declared.generation) == ({}, 0)


def test_a_file_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(TenantsFileError):
        DeclaredTenants(tmp_path / "none.toml")


def test_a_key_belongs_to_its_tenant_until_it_expires(file: Path) -> None:
    file.write_text(f"{file.read_text()}expires = 2001-01-01\n")
    declared = DeclaredTenants(file)
    assert declared.holder(digest("key"), now_s=0) == declared.tenants["a"]
    assert declared.holder(digest("key"), now_s=1e10) is None
    assert declared.holder(digest("other"), now_s=0) is None


def test_a_change_is_taken_over(file: Path) -> None:
    declared = DeclaredTenants(file)
    file.write_text("[tenants.bee]")
    declared.follow()
    assert (list(declared.tenants), declared.generation) == (["bee"], 1)
    assert declared.holder(digest("key"), now_s=0) is None


def test_a_file_put_in_the_place_of_the_old_one_is_taken_over(file: Path) -> None:
    declared = DeclaredTenants(file)
    before = file.stat()
    other = file.with_name("new")
    other.write_text(file.read_text().replace("tenants.a", "tenants.b"))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)
    declared.follow()
    assert list(declared.tenants) == ["b"]


def test_an_unchanged_file_is_not_read_again(file: Path, log: CapturedLogs) -> None:
    declared = DeclaredTenants(file)
    declared.follow()
    declared.follow()
    assert (declared.generation, log.events) == (0, [])


def test_when_told_to_it_is_read_again_although_it_looks_unchanged(tmp_path: Path) -> None:
    secret, file = tmp_path / "secret", tmp_path / "tenants.toml"
    secret.write_text("the-first-long-key")
    file.write_text(f'[tenants.a]\nkeys = [{{ file = "{secret}" }}]')
    declared = DeclaredTenants(file)
    secret.write_text("the-second-long-key")
    declared.follow()
    assert declared.holder(digest("the-first-long-key"), now_s=0) is not None
    declared.look_again()
    declared.follow()
    assert declared.holder(digest("the-first-long-key"), now_s=0) is None
    assert declared.holder(digest("the-second-long-key"), now_s=0) is not None


@pytest.mark.parametrize("broken", ["[tenants.a]\nclass = 'best'", None])
def test_a_broken_or_lost_file_changes_nothing_and_is_said_once(
    file: Path, log: CapturedLogs, broken: str | None
) -> None:
    declared = DeclaredTenants(file)
    if broken is None:
        file.unlink()
    else:
        file.write_text(broken)
    declared.follow()
    declared.follow()
    assert (list(declared.tenants), declared.generation) == (["a"], 0)
    errors = [event["why"] for event in log.events if event["level"] == "error"]
    assert len(errors) == 1
    assert ("line 2" if broken else "cannot be read") in str(errors[0])
    file.write_text("[tenants.c]")
    declared.follow()
    assert list(declared.tenants) == ["c"]
