import pytest

from server.policy.context import InvalidTruncation, TruncationPolicy, parse_truncation


def test_a_request_without_truncation_gets_the_operators_policy() -> None:
    default = TruncationPolicy(enabled=False, retention_ratio=0.6)
    assert parse_truncation(None, default) is default


@pytest.mark.parametrize("value", ["auto", {"type": "auto"}])
def test_auto_cuts_with_the_operators_ratio(value: object) -> None:
    assert parse_truncation(value, TruncationPolicy(enabled=False, retention_ratio=0.6)) == TruncationPolicy(True, 0.6)


@pytest.mark.parametrize("value", ["disabled", {"type": "disabled"}])
def test_disabled_never_cuts(value: object) -> None:
    assert not parse_truncation(value, TruncationPolicy()).enabled


@pytest.mark.parametrize(("ratio", "parsed"), [(0.5, 0.5), (1, 1.0), (1.0, 1.0)])
def test_a_retention_ratio_overrides_the_operators(ratio: float, parsed: float) -> None:
    value = {"type": "retention_ratio", "retention_ratio": ratio}
    assert parse_truncation(value, TruncationPolicy(enabled=False, retention_ratio=0.6)) == TruncationPolicy(
        True, parsed
    )


@pytest.mark.parametrize("ratio", [0, 0.0, -0.5, 1.01, 2, True, "0.8", None, float("nan"), float("inf")])
def test_a_ratio_outside_its_range_is_refused(ratio: object) -> None:
    with pytest.raises(InvalidTruncation, match="above 0 and at most 1"):
        parse_truncation({"type": "retention_ratio", "retention_ratio": ratio}, TruncationPolicy())


@pytest.mark.parametrize(
    "value",
    [
        "sometimes",
        "",
        True,
        0.8,
        [],
        {},
        {"type": "retention_ratio"},
        {"type": "auto", "retention_ratio": 0.8},
        {"type": "retention_ratio", "retention_ratio": 0.8, "token_limits": {"post_instructions": 100}},
    ],
)
def test_a_bad_truncation_is_refused_in_a_sentence(value: object) -> None:
    with pytest.raises(InvalidTruncation, match='must be "auto", "disabled" or') as caught:
        parse_truncation(value, TruncationPolicy())
    assert caught.value.param == "truncation"


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5, float("nan")])
def test_an_operators_ratio_outside_its_range_is_a_mistake(ratio: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        TruncationPolicy(retention_ratio=ratio)
