import pytest

from server.policy.tenants import ANYONE, OPERATOR, Key, Tenant, is_plain_end_user, name_problem


@pytest.mark.parametrize("name", ["search", "Team-1", "a.b_c", "0", "x" * 64])
def test_a_plain_name_can_be_used(name: str) -> None:
    assert name_problem(name) is None


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "a:b", "{a}", "é", "a\n", "x" * 65])
def test_a_name_that_would_break_a_path_or_a_key_is_refused_with_a_sentence(name: str) -> None:
    problem = name_problem(name)
    assert problem is not None
    assert name in problem
    assert "letters" in problem


@pytest.mark.parametrize("tenant", [ANYONE, OPERATOR])
def test_the_servers_own_names_are_taken(tenant: Tenant) -> None:
    assert name_problem(tenant.name) == f"`{tenant.name}` cannot be a tenant's name: the server uses it itself."


def test_a_tenant_may_use_every_model_unless_some_are_named() -> None:
    assert Tenant("t").may_use("any")
    named = Tenant("t", models=frozenset({"a", "b"}))
    assert [named.may_use(model) for model in ("a", "b", "c", "")] == [True, True, False, False]


@pytest.mark.parametrize(("expires_s", "now_s", "expired"), [(None, 1e12, False), (5, 4.9, False), (5, 5, True)])
def test_a_key_works_until_its_time(expires_s: float | None, now_s: float, expired: bool) -> None:
    assert Key("id", "t", 0, expires_s).expired(now_s) == expired


@pytest.mark.parametrize("name", ["8c9e-1f", "ann@example.org", "team:ann+x"])
def test_a_plain_end_user_stays_as_it_is(name: str) -> None:
    assert is_plain_end_user(name)


@pytest.mark.parametrize("name", ["", "Ann B", "ä", "a\nb", "{x}", "x" * 129])
def test_other_end_users_do_not(name: str) -> None:
    assert not is_plain_end_user(name)
