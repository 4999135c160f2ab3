import re

from server.store.keys import digest, key_id, new_key


def test_a_key_has_our_prefix_and_238_random_bits() -> None:
    keys = {new_key() for _ in range(1000)}
    assert len(keys) == 1000
    assert all(re.fullmatch("tg-[0-9A-Za-z]{40}", key) for key in keys)
    assert len({letter for key in keys for letter in key[3:]}) == 62


def test_the_digest_is_sha_256() -> None:
    assert digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert key_id(digest("abc")) == "ba7816bf8f01cfea"


def test_half_a_letter_has_a_digest_too() -> None:
    assert digest("\ud800") != digest("")
