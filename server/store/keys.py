"""Keys: how they are made, and the digest that is all we keep of them."""

import hashlib
import secrets
import string
from typing import Final

KEY_PREFIX: Final = "tg-"
# 40 letters out of 62 are 238 bits: nobody guesses one, so a plain SHA-256 is as good as a slow hash.
_LETTERS: Final = string.ascii_letters + string.digits
_LENGTH: Final = 40
_ID_LENGTH: Final = 16


def new_key() -> str:
    """A key that no one else has."""
    return KEY_PREFIX + "".join(secrets.choice(_LETTERS) for _ in range(_LENGTH))


def digest(key: str) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def key_id(key_digest: str) -> str:
    """The short name under which the operator finds a key; it does not help to guess it."""
    return key_digest[:_ID_LENGTH]
