import pytest

from benchmarks.fleet import ROUTERS, Machine, People, Replica, simulate

LITTLE = People(conversations_per_s=0.05, duration_s=300, counted_from_s=60)


def test_an_idle_replica_computes_what_it_has_not_seen_and_no_more() -> None:
    replica = Replica(Machine(prefill_tokens_per_s=1000, tpot_s=0.1))
    assert replica.serve(10.0, conversation=1, prompt=500, computed=500, answer=20) == 10.5
    assert replica.cached == {1: 520}
    assert (replica.open_requests(12.4), replica.open_requests(12.5)) == (1, 0)


def test_prompts_wait_for_each_other_and_sequences_for_a_place() -> None:
    replica = Replica(Machine(prefill_tokens_per_s=1000, tpot_s=0.1, sequences=2))
    first = [replica.serve(0.0, number, 1000, 1000, 10) for number in range(3)]
    assert first == [1.0, 2.0, 3.0]  # the third has its place when the first ends, at 2.0


def test_what_could_not_begin_in_time_is_refused_and_leaves_nothing_behind() -> None:
    replica = Replica(Machine(prefill_tokens_per_s=1000, ttft_slo_s=2))
    assert replica.serve(0.0, 1, 1500, 1500, 10) == 1.5
    assert replica.serve(0.0, 2, 1000, 1000, 10) is None
    assert (replica.taken, list(replica.cached)) == (1, [1])


def test_the_conversation_seen_longest_ago_is_forgotten_first() -> None:
    replica = Replica(Machine(cache_tokens=250))
    for conversation in (1, 2, 1, 3):
        replica.serve(0.0, conversation, 90, 90, 10)
    assert list(replica.cached) == [1, 3]


@pytest.mark.parametrize("name", ROUTERS)
def test_with_one_replica_every_router_is_the_same(name: str) -> None:
    assert simulate(1, ROUTERS[name](), Machine(), LITTLE) == simulate(1, ROUTERS["round robin"](), Machine(), LITTLE)


def test_conversations_that_stay_find_their_prefix_again() -> None:
    hits = {name: simulate(8, ROUTERS[name](), Machine(), LITTLE).hit_ratio for name in ROUTERS}
    assert hits["by conversation"] > hits["by conversation, bounded"] - 0.05 > hits["round robin"] + 0.2


def test_a_replica_more_moves_few_conversations() -> None:
    router = ROUTERS["by conversation"]()
    machine = Machine()
    before = [router([Replica(machine)] * 8, 0.0, conversation) for conversation in range(2000)]
    after = [router([Replica(machine)] * 9, 0.0, conversation) for conversation in range(2000)]
    moved = sum(a != b for a, b in zip(before, after, strict=True))
    assert moved / 2000 < 2 / 9
