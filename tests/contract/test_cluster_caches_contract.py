"""specs/cluster 的 CLUSTER-7：流水线的缓存守 RUNTIME-7 的约定，测试就是别的后端的那一套。"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

import deepseek_export
from deepseek_export.backend.base import Caches
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.runtime import ModelSession
from tests.contract.test_caches_contract import (
    CAPACITY,
    assert_row,
    filled,
    test_clearing_a_row,
    test_copying_a_row_equals_saving_and_restoring,
    test_first_rows_are_a_view,
    test_rows_in_the_middle_are_a_view,
    test_saving_and_restoring_a_row_is_exact,
    test_too_long_is_refused,
)
from tests.contract.test_mtp_contract import SMALL
from tests.stages import loaded

__all__ = [
    "test_clearing_a_row",
    "test_copying_a_row_equals_saving_and_restoring",
    "test_first_rows_are_a_view",
    "test_rows_in_the_middle_are_a_view",
    "test_saving_and_restoring_a_row_is_exact",
    "test_too_long_is_refused",
]
pytestmark = [pytest.mark.contract, pytest.mark.heavy]


def opened(folder, limit: int) -> Iterator[ModelSession]:
    checkpoint = write_checkpoint(folder / "ck", SMALL | {"max_position_embeddings": limit}, dtype="float32")
    bundle = deepseek_export.export(checkpoint, folder / "out").path
    stages = deepseek_export.split(bundle, folder / "stages", 2)
    with loaded(stages.path) as model:
        yield model.session


@pytest.fixture(scope="module")
def allocate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Caches]]:
    for session in opened(tmp_path_factory.mktemp("short"), CAPACITY):
        yield session.new_caches


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelSession]:
    yield from opened(tmp_path_factory.mktemp("long"), 4 * CAPACITY)


def test_growing_keeps_the_contents(long):
    """CLUSTER-7：升档之后内容不变，视图跟着主人。"""
    caches = long.new_caches(2)
    view = caches.first(1)
    rows = filled(caches)
    assert caches.ensure(CAPACITY + 1)
    assert caches.capacity == view.capacity == 2 * CAPACITY
    for row, want in enumerate(rows):
        got = caches.save_row(row, CAPACITY)
        for name, array in want.items():
            assert np.array_equal(got[name], array)


def test_a_saved_row_is_a_copy(allocate):
    """CLUSTER-7：存下之后再改那一行，存下的不变；内容随时可以看，也可以写进另一个缓存。"""
    caches, other = allocate(1), allocate(1)
    (want,) = filled(caches)
    saved = caches.save_row(0, CAPACITY)
    caches.clear_row(0)
    assert set(saved) == set(want)
    assert len(saved) == len(want)
    other.restore_row(0, saved)
    caches.restore_row(0, saved)
    for have in (caches, other):
        assert_row(have, 0, want)
