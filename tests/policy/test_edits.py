from server.policy.edits import NO_EDITS, Edits


def test_dropped_turns_are_told_in_the_header_and_the_body() -> None:
    edits = Edits(dropped_messages=12, dropped_tokens=3481)
    assert edits.header() == "messages=12, tokens=3481"
    assert edits.applied() == [{"type": "drop_turns", "dropped_messages": 12, "dropped_tokens": 3481}]


def test_a_clamped_max_tokens_is_told_in_the_body() -> None:
    edits = Edits(max_tokens=(4096, 512))
    assert edits.header() is None
    assert edits.applied() == [{"type": "clamp_max_tokens", "from": 4096, "to": 512}]


def test_both_edits_are_told_in_order() -> None:
    assert [edit["type"] for edit in Edits(2, 50, (100, 60)).applied()] == ["drop_turns", "clamp_max_tokens"]


def test_a_plain_prompt_is_told_of_dropped_tokens() -> None:
    edits = Edits(dropped_tokens=30)
    assert edits.header() == "messages=0, tokens=30"
    assert edits.applied() == [{"type": "drop_tokens", "dropped_tokens": 30}]


def test_an_untouched_request_is_told_nothing() -> None:
    assert Edits().header() is None
    assert Edits().applied() == []


def test_the_edits_of_several_conversations_add_up() -> None:
    assert Edits(1, 10) + Edits(2, 20, (9, 3)) == Edits(3, 30, (9, 3))
    assert not NO_EDITS
    assert Edits(1, 10)
