"""perf/suites/cluster_model.py：预测怎样由一个 stage 的测量算出，误差怎样写进 dsx plan 带着的那一份。"""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.cpu_library import find_library
from deepseek_export.plan.result import Validation
from deepseek_export.plan.simulate import Work
from deepseek_export.plan.sized import SizedModel
from deepseek_export.plan.stages import LayeredModel
from deepseek_export.profile import resolve_profile
from perf import gates, pages
from perf.results import Case, newest
from perf.suites import cluster_model
from perf.suites.cluster_model import off, prediction
from perf.workload.workspace import Workspace
from tests.perf_runs import make_run, spread, suite

pytestmark = pytest.mark.unit

ONE = [Work(1, 1, 10)]
WHOLE, HALVES = [(0, 4)], [(0, 2), (2, 4)]


@pytest.fixture(scope="module")
def model() -> LayeredModel:
    return SizedModel.open(CHECKPOINT, resolve_profile("mla+moe")).layered("int8")


def test_one_stage_is_predicted_by_what_was_measured_on_it(model: LayeredModel):
    """CLUSTER-62：一个 stage 的单条就是量到的一步加两条边；只有一个 stage，环里就只有一个小批。"""
    assert prediction(model, WHOLE, 2, 1.0, 0.25, ONE) == pytest.approx(1.5)
    assert prediction(model, WHOLE, 2, 1.0, 0.25, ONE * 4) == pytest.approx(4 * 1.5)


def test_stages_share_the_step(model: LayeredModel):
    """CLUSTER-62：单条是一步加 S + 1 条边；满的时候由最忙的 stage 定，在一个核上就是全部的活。"""
    assert prediction(model, HALVES, 2, 1.0, 0.25, ONE) == pytest.approx(1.75)
    layers = [(index, index + 1) for index in range(4)]
    assert prediction(model, layers, 2, 1.0, 0.25, ONE) == pytest.approx(2.25)
    two, one = (prediction(model, HALVES, cores, 1.0, 0.0, ONE * 16) for cores in (2, 1))
    assert one == pytest.approx(16)
    shares = [model.cost(span, cluster_model._READER).seconds(ONE[0]) for span in HALVES]
    assert two == pytest.approx((16 * max(shares) + min(shares)) / sum(shares))


def test_off_counts_both_ways():
    """CLUSTER-62：预测得多了少了一样算。"""
    assert off(spread(0.5, 2.0, 1.0)).samples == (2.0, 2.0, 1.0)


def test_the_plan_carries_the_newest_full_run():
    """CLUSTER-62：dsx plan 带着的是历史里最近一次完整的；没有量过就是空的，缩小的不算。"""
    case = Case(name="2 个 stage，满", values={}, ratios={"预测/量到": spread(0.9, 1.1, 1.0)})
    run = make_run([suite("cluster-model", [case])])
    found = Validation.model_validate_json(pages.validation(newest([run])))
    assert [(one.case, one.median, one.low, one.high) for one in found.errors] == [(case.name, 1.0, 0.9, 1.1)]
    assert found.machine
    quick = make_run([suite("cluster-model", [case])], quick=True)
    assert Validation.model_validate_json(pages.validation(newest([quick]))) == Validation()


@pytest.mark.slow
def test_the_quick_scenario_runs(tmp_path: Path):
    """CLUSTER-62：缩小的场景真的量一遍：每种 stage 数两格，各有预测、量到的与门槛要的比值；不看多快。"""
    if find_library() is None:
        pytest.skip("没有 C++ 算子库")
    found = cluster_model.run(Workspace(tmp_path), quick=True, threads=1)
    assert [case.name for case in found.cases] == [
        f"{count} 个 stage，{how}" for count in (1, 2) for how in ("单条", "满")
    ]
    for case in found.cases:
        assert case.values.keys() == {"predicted.step_s", "measured.step_s"}
    wanted = {gate.ratio for gate in gates.load_gates().gates if gate.suite == found.suite}
    assert wanted <= found.cases[0].ratios.keys()
