"""The operator's key in the data folder: made at the first start, found there by commands on the same machine."""

import os
from pathlib import Path
from typing import Final

from server.store.keys import new_key

_FILE: Final = "operator.key"


class OperatorKeyUnavailable(Exception):
    """The key can be neither read nor made; the message is one sentence for the operator."""


def read_operator_key(folder: Path) -> str | None:
    """The key in a data folder, or None if there is none. Raises `OperatorKeyUnavailable`."""
    file = folder / _FILE
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorKeyUnavailable(f"The operator key in {file} cannot be read: {error}.") from error


def ensure_operator_key(folder: Path) -> str:
    """The key in a data folder, made if there is none. Raises `OperatorKeyUnavailable`.

    Of several servers that start at once on one folder, all get the same key: it is linked into place whole.
    """
    if (key := read_operator_key(folder)) is not None:
        return key
    file, draft = folder / _FILE, folder / f"{_FILE}.{os.getpid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as made:  # noqa: PTH123
            made.write(f"{new_key()}\n")
        try:
            os.link(draft, file)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    except OSError as error:
        raise OperatorKeyUnavailable(f"No operator key can be made in {folder}: {error.strerror}.") from error
    key = read_operator_key(folder)
    if key is None:
        raise OperatorKeyUnavailable(f"The operator key in {file} is empty: delete it, and start again.")
    return key
