"""What holds for a while ends as it began."""

import os
from typing import get_args

import numpy as np
import pytest
import torch
from torch.backends import cuda as kernels

from rag2.modes import Precision, computing_on, matmul
from rag2.reindex.store import Store
from rag2.retriever.encoder import DualEncoder

PRECISIONS = get_args(Precision)


def state() -> tuple[str, bool, bool]:
    return (
        torch.get_float32_matmul_precision(),
        kernels.flash_sdp_enabled(),
        kernels.math_sdp_enabled(),
    )


@pytest.mark.parametrize("outer", PRECISIONS)
@pytest.mark.parametrize("inner", PRECISIONS)
def test_a_precision_holds_inside_alone_and_so_does_a_nested_one(
    outer: Precision, inner: Precision
):
    before = state()
    with matmul(outer):
        begun = state()
        assert begun == (outer, outer != "medium", True)
        with pytest.raises(ZeroDivisionError), matmul(inner):
            assert state() == (inner, inner != "medium", True)
            raise ZeroDivisionError
        assert state() == begun
    assert state() == before


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_are_right_to_the_precision_asked_for(seed: int, precision: Precision):
    a, b = torch.randn(64, 300), torch.randn(300, 64)
    with matmul(precision):
        error = (a @ b - (a.double() @ b.double())).abs().max()
    allowed = {"highest": 2e-4, "high": 0.2, "medium": 1.0}[precision]
    assert error < allowed


def test_an_index_is_the_same_whatever_the_precision_of_training(
    store: Store, encoder: DualEncoder
):
    made = store.build(0, 0)
    with matmul("medium"):
        again = store.build(1, 0)
        rows_N = np.arange(len(made))
        np.testing.assert_array_equal(again.index.vectors(rows_N), made.index.vectors(rows_N))


def test_threads_and_cores_hold_inside_alone():
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    one = {min(cores)}
    with pytest.raises(ZeroDivisionError), computing_on(threads + 1, one):
        assert os.sched_getaffinity(0) == one and torch.get_num_threads() == threads + 1
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == cores and torch.get_num_threads() == threads
    with computing_on(None, None):
        assert os.sched_getaffinity(0) == cores and torch.get_num_threads() == threads
