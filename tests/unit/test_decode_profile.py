"""一步解码的剖析：各部分怎样从事件里分出来，加得起来；真的走一遍，每个算子都在。数多大不在测试里看。"""

from __future__ import annotations

from typing import Any

import pytest

from perf.suites import decode_profile
from perf.suites.decode_profile import HOST, KERNELS, NODES, SESSION, WAITS

pytestmark = pytest.mark.unit


def event(name: str, ts: int, dur: int, op: str = "", **waits: int) -> dict[str, Any]:
    stats = {"main_thread": {"Run": 7, **waits}}
    return {"name": name, "ts": ts, "dur": dur, "args": {"op_name": op, "thread_scheduling_stats": stats}}


def test_events_are_split_into_what_they_are():
    """预热的那一步不算；等线程的从 kernel 里分出来，不会比节点还长；没有线程统计的节点全是 kernel；分支里的不重复算。"""
    step = [
        event("model_run", 100, 60),
        event("SequentialExecutor::Execute", 105, 50),
        event("a_kernel_time", 106, 30, "Int8Linear", Distribution=2, Wait=4),
        event("SequentialExecutor::Execute", 110, 20),
        event("inner_kernel_time", 111, 15, "Softmax"),
        event("b_kernel_time", 140, 3, "Add", Wait=9),
        {"name": "c_kernel_time", "ts": 150, "dur": 2, "args": {"op_name": "Add"}},
    ]
    later = [one | {"ts": one["ts"] + 1000} for one in step]
    warm = [event("model_run", 1, 5000), event("z_kernel_time", 2, 4000, "Add")]
    found = decode_profile.account([*warm, *later, *step], steps=2, own=0.0)
    assert found.nodes == 3
    assert found.operators == pytest.approx({"Int8Linear": 24e-6, "Add": 2e-6})
    less = decode_profile.account([*warm, *later, *step], steps=2, own=3e-6)
    assert less.operators == pytest.approx({"Int8Linear": 21e-6, "Add": 0})
    assert found.waits == pytest.approx(9e-6)
    assert found.session == pytest.approx(10e-6)
    assert found.run == pytest.approx(60e-6)


def test_a_profiled_step_names_every_part(exported, tmp_path):
    """一格有全部五部分与每个算子；打开剖析的与没有打开的各有墙钟，印出来的表每行是一部分。"""
    bundle = exported("v3-yarn", "mla+moe")
    each = decode_profile.node_cost(1, tmp_path)
    assert min(each) >= 0
    case = decode_profile.profile(bundle.path, "float32 depth 8", 8, 3, 1, each, tmp_path)
    assert set(case.values) == {"dsx.step_s", "profiled.step_s"}
    assert set(case.facts["parts"]) == {KERNELS, WAITS, NODES, SESSION, HOST}
    assert all(seconds >= 0 for seconds in case.facts["parts"].values())
    assert {"RMSNormalization", "RotaryEmbedding"} <= set(case.facts["operators"])
    assert case.facts["nodes"] > len(case.facts["operators"])
    shown = decode_profile.lines(case)
    assert len(shown) == 1 + len(case.facts["parts"]) + len(case.facts["operators"])
    assert shown[0].startswith("float32 depth 8：一步 ")
