"""The tenants of the tenants file, as it last could be read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import structlog

from server.policy.tenants import Tenant
from server.store.tenants_file import FileTenants, TenantsFileError, read_tenants

log = structlog.get_logger(__name__)

Stamp = tuple[int, int, int]
_GONE: Final[Stamp] = (0, 0, 0)
_UNREAD: Final[Stamp] = (-1, -1, -1)


class DeclaredTenants:
    """Follows one file, or none. Raises `TenantsFileError` if the file cannot be used to begin with.

    `generation` counts the changes.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._stamp = _GONE if path is None else _stamp(path)
        self._content = FileTenants() if path is None else read_tenants(path)
        self.generation = 0

    @property
    def in_a_file(self) -> bool:
        """Whether there is a file to follow."""
        return self._path is not None

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        return self._content.tenants

    def holder(self, digest: str, now_s: float) -> Tenant | None:
        """The tenant that holds a key which the file names and which has not expired."""
        key = self._content.holders.get(digest)
        return None if key is None or key.expired(now_s) else self._content.tenants[key.tenant]

    def look_again(self) -> None:
        """Let the next `follow` read the file although it looks unchanged: a key it refers to may have changed."""
        self._stamp = _UNREAD

    def follow(self) -> None:
        """Read the file if it has changed. A file that cannot be used changes nothing, and the log says why."""
        if self._path is None or (stamp := _stamp(self._path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._content = read_tenants(self._path)
        except TenantsFileError as error:
            why = str(error)
            log.error("tenants file not taken over; what it said before still counts", why=why)  # noqa: TRY400
            return
        self.generation += 1
        log.info("tenants file read", file=str(self._path), tenants=len(self._content.tenants))


def _stamp(path: Path) -> Stamp:
    """What changes when the file is written or replaced."""
    try:
        found = path.stat()
    except OSError:
        return _GONE
    return found.st_mtime_ns, found.st_size, found.st_ino
