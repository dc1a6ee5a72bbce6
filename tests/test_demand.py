"""What a partial refresh encodes: the found first, and everything in its turn."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag2.reindex.demand import ROUND, Demand
from rag2.reindex.policy import SyncRefresh


def demand(share: float, count: int) -> Demand:
    return Demand(share, np.arange(100, 100 + 7 * count, 7), None)


def test_the_most_found_come_first_and_their_counts_begin_again():
    made = demand(0.4, 20)  # 8 chunks a turn, 2 of them round the corpus
    rows = [19] * 5 + [11] * 4 + [3] * 3 + [17] * 2 + [5, 7, 9]
    made.count(made.ids_N[np.array([rows])])
    assert made.choose().tolist() == [0, 1, 3, 5, 7, 11, 17, 19]
    assert made.choose().tolist() == [2, 3, 4, 5, 6, 7, 8, 9]  # 9 found once, then the round
    assert made.choose().tolist() == [9, 10, 11, 12, 13, 14, 15, 16]
    assert not made.found_N.any()


@given(
    count=st.integers(1, 60),
    share=st.floats(0.01, 1.0),
    finds=st.lists(st.lists(st.integers(0, 10**6), max_size=40), min_size=1, max_size=6),
)
def test_no_embedding_grows_older_than_its_turn_and_every_part_has_its_size(
    count: int, share: float, finds: list[list[int]]
):
    made = demand(share, count)
    size = max(1, round(share * count))
    rounds = math.ceil(count / math.ceil(size / ROUND))
    age_N = np.zeros(count, dtype=int)
    for turn in range(2 * rounds):
        found = [place % count for place in finds[turn % len(finds)]]
        made.count(made.ids_N[np.array([found], dtype=int)])
        rows = made.choose()
        assert len(rows) == size and (np.diff(rows) > 0).all()
        age_N += 1
        age_N[rows] = 0
        assert age_N.max() < rounds


def test_what_a_checkpoint_holds_is_enough_to_go_on():
    rng = np.random.default_rng()
    whole = demand(0.2, 50)
    for _ in range(3):
        whole.count(whole.ids_N[rng.integers(50, size=(4, 3))])
        whole.choose()
    whole.count(whole.ids_N[rng.integers(50, size=(9, 3))])
    again = Demand(0.2, whole.ids_N, json.loads(json.dumps(whole.state())))
    for _ in range(9):
        np.testing.assert_array_equal(again.choose(), whole.choose())


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_a_share_that_is_none_is_refused(share: float):
    with pytest.raises(ValueError, match="share"):
        SyncRefresh(share=share)
