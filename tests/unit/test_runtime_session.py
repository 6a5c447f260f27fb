"""会话：绑定复用、主机侧检查、加载与执行错误、输入输出约定。"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from deepseek_export.backend.ort.runner import OrtRunner
from deepseek_export.errors import DsxError
from deepseek_export.runtime import ModelSession
from tests.unit.test_runtime_toy import VOCAB, Toy, make_toy, save_toy

pytestmark = pytest.mark.unit

ONE = np.array([[0]])


@pytest.fixture(scope="module")
def toy() -> Toy:
    return make_toy()


@pytest.fixture(scope="module")
def session(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> ModelSession:
    path = save_toy(toy, tmp_path_factory.mktemp("toy") / "model.onnx")
    return ModelSession(OrtRunner(path, threads=1, max_positions=toy.max_positions))


def test_steady_decode_rebinds_nothing(session: ModelSession, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = session.new_caches(1)
    session.run(ONE, np.array([0]), ONE, caches)
    bound: list[str] = []
    for kind in ("bind_ortvalue_input", "bind_ortvalue_output"):
        original = getattr(ort.IOBinding, kind)

        def spy(self: object, name: str, value: object, original: Any = original) -> None:
            bound.append(name)
            original(self, name, value)

        monkeypatch.setattr(ort.IOBinding, kind, spy)
    first = session.run(ONE, np.array([1]), ONE, caches)
    second = session.run(ONE, np.array([2]), ONE, caches)
    assert bound == []
    assert first is second
    caches.ensure(257)
    session.run(ONE, np.array([3]), ONE, caches)
    assert sorted(bound) == sorted(n for t in caches.spec.tensors for n in (t.name, t.out_name))


def test_bindings_die_with_their_caches(session: ModelSession) -> None:
    caches = session.new_caches(1)
    session.run(ONE, np.array([0]), ONE, caches)
    gone = weakref.ref(caches)
    del caches
    gc.collect()
    assert gone() is None


def test_float16_logits_are_returned_as_float32(toy: Toy, tmp_path: Path) -> None:
    path = save_toy(toy, tmp_path / "model.onnx", logits_dtype="float16")
    session = ModelSession(OrtRunner(path, max_positions=600))
    logits = session.run(np.array([[3, 1]]), np.array([0]), np.array([[0, 1]]), session.new_caches(1))
    assert logits.dtype == np.float32
    assert logits[0] == pytest.approx(toy.forward([3, 1]), abs=1e-2)


@pytest.mark.parametrize("bad", [-1, VOCAB, 10**23, -(10**23)])  # 最后两个 64 位放不下
def test_ids_out_of_vocabulary(session: ModelSession, bad: int) -> None:
    with pytest.raises(DsxError, match=rf"\[0, 1\] = {bad}") as caught:
        session.run(np.array([[0, bad]]), np.array([0]), ONE, session.new_caches(1))
    assert caught.value.code == "DSX-E509"


def test_non_integer_ids(session: ModelSession) -> None:
    with pytest.raises(DsxError, match="float64"):
        session.check_ids(np.array([0.5]))


@pytest.mark.parametrize(
    ("ids", "past", "positions"),
    [
        (np.zeros((2, 1), int), [0], [[0]]),
        (np.zeros((1, 0), int), [0], [[0]]),
        (np.zeros((1, 2), int), [0], [[2]]),
        (np.zeros((1, 2), int), [-1], [[0]]),
        (np.zeros((1, 2), int), [255], [[0]]),
    ],
)
def test_bad_calls_are_programming_errors(
    session: ModelSession, ids: np.ndarray, past: list[int], positions: list[list[int]]
) -> None:
    with pytest.raises(ValueError, match=r"要求|logits_positions|past_lens"):
        session.run(ids, np.array(past), np.array(positions), session.new_caches(1))


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(DsxError, match="不存在") as caught:
        ModelSession(OrtRunner(tmp_path / "model.onnx", max_positions=16))
    assert caught.value.code == "DSX-E507"


def load_advice(path: Path) -> str:
    with pytest.raises(DsxError, match="ONNXRuntimeError") as caught:
        ModelSession(OrtRunner(path, max_positions=16))
    assert caught.value.code == "DSX-E507"
    return caught.value.todo


def test_missing_truncated_and_escaping_weights(toy: Toy, tmp_path: Path) -> None:
    path = save_toy(toy, tmp_path / "model.onnx", external=True)
    data = tmp_path / "model.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:100])
    assert "权重文件缺失或不完整" in load_advice(path)
    data.unlink()
    assert "权重文件缺失或不完整" in load_advice(path)
    elsewhere = tmp_path.parent / f"{tmp_path.name}.elsewhere"
    elsewhere.write_bytes(whole)
    data.symlink_to(elsewhere)
    assert "硬链接" in load_advice(path)


def save_node(
    path: Path, kind: str, domain: str = "", dtype: int = TensorProto.FLOAT, opset: int = 24
) -> None:
    x, y = (helper.make_tensor_value_info(name, dtype, [1, 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node(kind, ["x"], ["y"], domain=domain)], "g", [x], [y])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("dsx", 1)]
    onnx.save_model(helper.make_model(graph, opset_imports=imports, ir_version=11), path)


def test_unsupported_operators_and_garbage(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for domain in ("", "dsx"):
        save_node(path, "Nope", domain)
        assert "没有模型要的算子" in load_advice(path)
    save_node(path, "Softmax", dtype=TensorProto.BFLOAT16)
    assert "没有模型要的算子" in load_advice(path)
    save_node(path, "Softmax", opset=99)
    assert "升级 onnxruntime" in load_advice(path)
    path.write_bytes(b"not a model")
    assert "没有损坏" in load_advice(path)


def _rename(model: onnx.ModelProto, old: str, new: str) -> None:
    graph = model.graph
    for value in [*graph.input, *graph.output]:
        value.name = new if value.name == old else value.name
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("logits", "scores", "logits"),
        ("past_lens", "past", "past_lens"),
        ("kv_cache_out.1", "present.1", "kv_cache_out.1"),
    ],
)
def test_contract_violations(toy: Toy, tmp_path: Path, old: str, new: str, named: str) -> None:
    path = save_toy(toy, tmp_path / "model.onnx")
    model = onnx.load(path)
    _rename(model, old, new)
    onnx.save_model(model, path)
    with pytest.raises(DsxError, match=named) as caught:
        ModelSession(OrtRunner(path, max_positions=16))
    assert caught.value.code == "DSX-E508"


@pytest.mark.parametrize(("kind", "width"), [(TensorProto.FLOAT, None), (TensorProto.DOUBLE, 3)])
def test_unusable_logits_declarations(tmp_path: Path, kind: int, width: int | None) -> None:
    """词表大小不是常数，或 dtype 不对。"""
    path = save_toy(make_toy(), tmp_path / "model.onnx")
    model = onnx.load(path)
    # 形状推断会补出常数维；Compress 的结果大小推不出来，正好藏住它。
    mask = onnx.numpy_helper.from_array(np.ones(3 if width else VOCAB, bool), "mask")
    model.graph.initializer.append(mask)
    model.graph.node[-1].output[0] = "wide"
    model.graph.node.append(helper.make_node("Compress", ["wide", "mask"], ["narrow"], axis=-1))
    model.graph.node.append(helper.make_node("Cast", ["narrow"], ["logits"], to=kind))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", kind, ["B", "L", width]))
    onnx.save_model(model, path)
    with pytest.raises(DsxError, match="logits 是") as caught:
        ModelSession(OrtRunner(path, max_positions=16))
    assert caught.value.code == "DSX-E508"


@pytest.mark.parametrize(
    ("kind", "shape", "name"),
    [
        (TensorProto.FLOAT, ["B", "H", "T", 4], "kv_cache.0"),
        (TensorProto.FLOAT, ["B", "T", 4], "kv_cache.0"),
        (TensorProto.DOUBLE, ["B", 1, "T", 4], "kv_cache.0"),
        (TensorProto.FLOAT, ["B", 1, "T", 4], "past_key_values.0"),
    ],
)
def test_unusable_cache_declarations(tmp_path: Path, kind: int, shape: list, name: str) -> None:
    info = helper.make_tensor_value_info
    node = helper.make_node("Identity", [name], ["kv_cache_out.0"])
    graph = helper.make_graph([node], "g", [info(name, kind, shape)], [info("kv_cache_out.0", kind, shape)])
    path = tmp_path / "model.onnx"
    onnx.save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11), path
    )
    with pytest.raises(DsxError, match="DSX-E508"):
        ModelSession(OrtRunner(path, max_positions=16))


def test_failure_inside_onnxruntime(toy: Toy, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """位置编码表只有 4 行却声称能走到 16：Gather 在运行时报错，原话要带出来，日志不能漏到终端。"""
    path = save_toy(make_toy(max_positions=4), tmp_path / "model.onnx")
    session = ModelSession(OrtRunner(path, max_positions=16))
    with pytest.raises(DsxError, match="Gather") as caught:
        session.run(np.zeros((1, 8), np.int64), np.array([0]), ONE, session.new_caches(1))
    assert caught.value.code == "DSX-E513"
    assert capfd.readouterr().err == ""
