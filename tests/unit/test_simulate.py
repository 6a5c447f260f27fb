"""plan/simulate.py：能手算的都手算一遍，其余的看守恒、单调与下界。"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_export.plan.simulate import Outcome, Station, Work, chunked_prompt, ragged_steps, simulate

pytestmark = pytest.mark.unit

ONE = Work(1, 1, 0)


def always(seconds: float) -> Callable[[Work], float]:
    return lambda work: seconds


def run(stations: Sequence[Station], works: int, steps: int = 1, window: int = 1 << 20) -> Outcome:
    return simulate(stations, [[ONE] * works] * steps, window)


def line(*seconds: float) -> list[Station]:
    return [Station(f"stage {index}", always(value)) for index, value in enumerate(seconds)]


def test_one_stage_works_one_after_another():
    """CLUSTER-61：一个 stage，几个小批就是几倍的时间，一步接一步。"""
    done = run(line(2.0), works=3, steps=2)
    assert done.ends == (6.0, 12.0)
    assert done.busy == {"stage 0": 12.0}


@pytest.mark.parametrize(("stages", "works"), [(1, 1), (4, 1), (1, 4), (3, 5), (5, 3)])
def test_fill_and_drain(stages: int, works: int):
    """CLUSTER-61：一样快的 S 个 stage、M 个小批，一步是 (S + M - 1) 份；只有一个小批就是各段之和。"""
    done = run(line(*[0.5] * stages), works, steps=3)
    assert done.seconds == pytest.approx(3 * 0.5 * (stages + works - 1))
    assert done.busy == dict.fromkeys(done.busy, 3 * 0.5 * works)


def test_the_slowest_stage_sets_the_pace():
    """CLUSTER-61：M 个小批，最慢的做 M 份，别的只在头尾各露出一份。"""
    assert run(line(1.0, 3.0, 2.0), works=6).seconds == pytest.approx(1.0 + 6 * 3.0 + 2.0)


def test_a_link_is_a_queue_and_its_latency_is_not():
    """CLUSTER-61：带宽占着边，小批排队过；延迟只推迟到达，几个小批的延迟重叠。"""
    wide = [*line(1.0), Station("edge", always(0.0), latency=5.0), Station("stage 1", always(1.0))]
    assert run(wide, works=4).seconds == pytest.approx(4 + 5 + 1)
    narrow = [*line(1.0), Station("edge", always(3.0), latency=5.0), Station("stage 1", always(1.0))]
    assert run(narrow, works=4).seconds == pytest.approx(1 + 4 * 3 + 5 + 1)


def test_no_more_in_the_ring_than_the_window():
    """CLUSTER-61：环里满了就等最先进去的回来。"""
    ring = [*line(1.0), Station("edge", always(0.0), latency=9.0)]
    assert run(ring, works=4, window=1).seconds == pytest.approx(40)
    assert run(ring, works=4, window=2).seconds == pytest.approx(21)
    assert run(ring, works=4, window=4).seconds == pytest.approx(13)


def test_stages_share_a_core():
    """CLUSTER-61：两个 stage 在一个核上，谁也快不过一个接一个。"""
    shared = [Station("core", always(1.0)), Station("core", always(2.0))]
    done = run(shared, works=5)
    assert done.seconds == pytest.approx(15)
    assert done.busy == {"core": 15.0}


def test_ragged_lengths_are_the_same_every_time():
    """CLUSTER-61：长短由种子定；分批同 PipelineRunner（连着的，前面的多一条）；每步长一个，满了换一条；token 不多不少。"""
    steps = ragged_steps(7, 3, 40, (10, 20), seed=3)
    assert steps == ragged_steps(7, 3, 40, (10, 20), seed=3)
    assert steps != ragged_steps(7, 3, 40, (10, 20), seed=4)
    assert [work.rows for work in steps[0]] == [3, 2, 2]
    assert {work.tokens for step in steps for work in step} == {3, 2}
    depths = [sum(work.depth for work in step) for step in steps]
    assert all(7 * 10 <= depth < 7 * 20 for depth in depths)
    assert len({work.depth for step in steps for work in step[1:]}) > 1
    alone = [work.depth for (work,) in ragged_steps(1, 1, 12, (4, 7))]
    assert set(alone) == {4, 5, 6}
    assert all(after in (before + 1, 4) for before, after in itertools.pairwise(alone))


def test_a_prompt_goes_in_chunk_by_chunk():
    """CLUSTER-61：一步一块，最后一块不满；已算的部分在缓存里。"""
    assert chunked_prompt(300, 128) == [[Work(1, 128, 0)], [Work(1, 128, 128)], [Work(1, 44, 256)]]


TIMES = st.lists(st.floats(1e-3, 10.0), min_size=1, max_size=6)


@given(TIMES, st.integers(1, 6), st.integers(1, 3), st.integers(1, 8), st.floats(0, 5))
@settings(max_examples=60, deadline=None)
def test_never_faster_than_the_busiest_and_work_is_conserved(
    seconds: list[float], works: int, steps: int, window: int, latency: float
):
    """CLUSTER-61：不快过最忙的那一站，也不快过一个小批走完一圈；不慢过一个一个地走；忙的时间就是全部的活。"""
    route = [Station(f"stage {index}", always(value), latency) for index, value in enumerate(seconds)]
    done = run(route, works, steps, window)
    around = sum(seconds) + latency * len(seconds)
    slack = 1e-9 * done.seconds
    assert done.seconds >= steps * max(max(seconds) * works, around) - slack
    assert done.seconds <= steps * works * around + slack
    assert list(done.busy.values()) == pytest.approx([value * works * steps for value in seconds])
    assert list(done.ends) == sorted(done.ends)


@given(TIMES, st.integers(1, 6), st.floats(1e6, 1e12), st.floats(1.0, 100.0))
@settings(max_examples=60, deadline=None)
def test_more_bandwidth_is_never_slower(seconds: list[float], works: int, bandwidth: float, factor: float):
    """CLUSTER-61：网络的带宽大了、窗口宽了，都不会变慢。"""

    def timed(speed: float, window: int = 1 << 20) -> float:
        route = []
        for index, value in enumerate(seconds):
            route += [Station(f"stage {index}", always(value)), Station(f"edge {index}", always(1e7 / speed))]
        return run(route, works, window=window).seconds

    slow = timed(bandwidth)
    assert timed(bandwidth * factor) <= slow * (1 + 1e-12)
    assert timed(bandwidth, window=1) >= timed(bandwidth, window=2) * (1 - 1e-12) >= slow * (1 - 1e-9)
