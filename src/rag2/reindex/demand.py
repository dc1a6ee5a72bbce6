"""What training finds -> which chunks a partial refresh encodes anew: the retrieved first.

Letters: N chunks, B questions, K found for each, M chunks of a part.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

ROUND = 4  # one in so many of a part's chunks goes round the corpus, whatever training finds


class Demand:
    """How often each chunk was found since its last turn, and how far the round has come.

    A part takes the chunks found most often, and for a quarter of its size the next ones of the
    corpus in the order of their ids: no embedding grows older than ROUND / share refreshes (of the
    share that whole chunks make up), though nothing ever finds it. Where fewer were found than
    there is room for, the round goes further.
    """

    def __init__(self, share: float, ids_N: np.ndarray, state: Mapping[str, Any] | None) -> None:
        """`share` of the chunks make a part; `state` is what a checkpoint holds."""
        self.share, self.ids_N = share, ids_N
        self.found_N = np.zeros(len(ids_N), dtype=np.int64)
        self.place = 0
        if state:
            self.found_N[state["rows"]] = state["counts"]
            self.place = state["place"]

    @property
    def whole(self) -> bool:
        """Whether every refresh encodes every chunk."""
        return self.share == 1

    def count(self, ids_BK: np.ndarray) -> None:
        """Training has found these chunks."""
        np.add.at(self.found_N, np.searchsorted(self.ids_N, ids_BK), 1)

    def choose(self) -> np.ndarray:
        """Rows [M] of the next part, increasing; their counts begin again. Ties by id."""
        total = len(self.ids_N)
        size = max(1, round(self.share * total))
        turn = -(-size // ROUND)
        by_count_N = np.argsort(-self.found_N, kind="stable")
        found = by_count_N[: np.count_nonzero(self.found_N)][: size - turn]
        round_N = np.roll(np.arange(total), -self.place)
        others = round_N[~np.isin(round_N, found)][: size - len(found)]
        self.place = int((others[-1] + 1) % total)
        rows_M = np.sort(np.concatenate([found, others]))
        self.found_N[rows_M] = 0
        return rows_M

    def state(self) -> dict[str, Any]:
        """What `Demand` needs to go on from here."""
        rows = np.flatnonzero(self.found_N)
        counts = self.found_N[rows].tolist()
        return {"rows": rows.tolist(), "counts": counts, "place": self.place}
