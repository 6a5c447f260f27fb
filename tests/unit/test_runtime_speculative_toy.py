"""投机解码用的玩具模型：给玩具主模型接上草稿验证，再造出会时对时错的草稿模块；附 numpy 的独立实现。

草稿模块就是主模型换一张错开的位置表、再掺一点 prev_hidden：它看不到最前面的 token，所以只是经常猜对。
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deepseek_export.backend.ort.runner import OrtRunner
from deepseek_export.runtime import (
    DraftSession,
    Generator,
    ModelSession,
    SpeculativeFloor,
    SpeculativeGenerator,
)
from deepseek_export.runtime.session import Chance
from tests.unit.test_runtime_toy import LAYERS, VOCAB, WIDTH, Toy, make_toy, save_toy

pytestmark = pytest.mark.unit

LIMIT = 300


@dataclass(frozen=True)
class Draft:
    """第 ``shift - 1`` 个草稿模块；``twist`` 把输出的 token 全错开几格。"""

    toy: Toy
    shift: int
    mix: np.ndarray
    twist: int = 0

    def weights(self) -> dict[str, np.ndarray]:
        table = self.toy.weights["position"]
        moved = np.concatenate([table[self.shift :], table[-1:].repeat(self.shift, 0)])
        head = np.roll(self.toy.weights["head"], self.twist, axis=1)
        return self.toy.weights | {"position": moved, "head": head}

    def forward(self, ids: list[int], prev: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """没有缓存，从头算：``(logits, hidden)``。"""
        return layers(self.weights(), ids, prev @ self.mix)


def layers(w: dict[str, np.ndarray], ids: list[int], extra: Any = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """玩具的前向，带 hidden。"""
    x = w["embed"][ids] + w["position"][: len(ids)] + extra
    visible = np.tril(np.ones((len(ids), len(ids)), bool))
    for layer in range(LAYERS):
        key = x @ w[f"wkv.{layer}"]
        scores = np.where(visible, (x @ w[f"wq.{layer}"]) @ key.T, -np.inf)
        probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
        x = np.tanh(x + (probs / probs.sum(axis=-1, keepdims=True)) @ key @ w[f"wo.{layer}"])
    return x @ w["head"], x


def draft_oracle(toy: Toy, drafts: list[Draft], tokens: list[int], count: int) -> list[int]:
    """已知 ``tokens``（最新的一个还没有送进主模型）时该起草什么，照定义从头算。"""
    newest = len(tokens) - 1
    prev = layers(toy.weights, tokens[:newest])[1]
    found: list[int] = []
    for index, draft in enumerate(drafts):
        ids = [*tokens, *found][index + 1 : index + 1 + newest]
        fed, (logits, prev) = prev, draft.forward(ids, prev)
        found.append(int(logits[-1].argmax()))
    while len(found) < count:
        ids, fed = [*ids, found[-1]], np.concatenate([fed, prev[-1:]])
        logits, prev = drafts[-1].forward(ids, fed)
        found.append(int(logits[-1].argmax()))
    return found[:count]


def markov(seed: int = 0) -> Toy:
    """下一个 token 只由当前 token 决定：注意力与位置都不起作用。"""
    toy = make_toy(LIMIT, seed)
    dead = {
        name: np.zeros_like(value)
        for name, value in toy.weights.items()
        if name == "position" or name.startswith("wo.")
    }
    return replace(toy, weights=toy.weights | dead)


def make_drafts(toy: Toy, count: int, mix: float = 0.1, twist: int = 0) -> list[Draft]:
    """``count`` 个模块，``mix`` 是 prev_hidden 的分量。"""
    rng = np.random.default_rng(7)
    scale = [(mix * rng.standard_normal((WIDTH, WIDTH))).astype(np.float32) for _ in range(count)]
    return [Draft(toy, index + 1, scale[index], twist) for index in range(count)]


class _Ops:
    """往已有的图上接节点。"""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph

    def __call__(self, kind: str, *inputs: str, out: str, at: int | None = None, **attrs: Any) -> str:
        node = helper.make_node(kind, list(inputs), [out], name=out, **attrs)
        self.graph.node.insert(len(self.graph.node) if at is None else at, node)
        return out

    def const(self, name: str, value: Any, dtype: Any = np.int64) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def io(self, kind: str, name: str, dtype: int, shape: list) -> None:
        getattr(self.graph, kind).append(helper.make_tensor_value_info(name, dtype, shape))


def save_main(toy: Toy, path: Path, verify: str = "greedy", **options: Any) -> Path:
    """主模型加上图内的草稿验证。"""
    model = onnx.load(save_toy(toy, path, **options))
    op = _Ops(model)
    op.io("input", "draft_ids", TensorProto.INT64, ["B", "K"])
    op.const("axis2", [2])
    op("Mul", "past_col", op.const("zero_i", 0), out="zero_col")
    op("Cast", "logits", out="logits32", to=TensorProto.FLOAT)
    if verify == "greedy":
        op("ArgMax", "logits32", out="best", axis=-1, keepdims=0)
        op("Sub", "zero_col", "one", out="never")  # 补一个必错的草稿，K=0 就不特殊
        op("Concat", "draft_ids", "never", out="padded", axis=1)
        op("Not", op("Equal", "padded", "best", out="hit"), out="miss")
    else:
        _accept_by_chance(op)
    op("CumSum", op("Cast", "miss", out="miss_i", to=TensorProto.INT64), "one", out="misses")
    op("Cast", op("Equal", "misses", "zero", out="kept"), out="kept_i", to=TensorProto.INT64)
    op("ReduceSum", "kept_i", "axis1", out="num_accepted", keepdims=0)
    op("Unsqueeze", "num_accepted", "axis1", out="num_col")
    if verify == "greedy":
        op("Squeeze", op("GatherElements", "best", "num_col", out="next_col", axis=1), "axis1", out="next_id")
    else:
        _sample_rest(op)
    for name in ("num_accepted", "next_id"):
        op.io("output", name, TensorProto.INT64, ["B"])
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, path)
    return path


def _accept_by_chance(op: _Ops) -> None:
    op.io("input", "draft_probs", TensorProto.FLOAT, ["B", "K", VOCAB])
    op.io("input", "uniform", TensorProto.FLOAT, ["B", "L"])
    op.io("input", "temperature", TensorProto.FLOAT, [1])
    op("Softmax", op("Div", "logits32", "temperature", out="scaled"), out="p", axis=-1)
    op.const("last", [-1])
    op.const("end", [np.iinfo(np.int64).max])
    op("Slice", "p", "last", "end", "axis1", out="p_last")
    op("Mul", "p_last", op.const("zero_f", 0, np.float32), out="q_last")
    op("Concat", "draft_probs", "q_last", out="q", axis=1)
    op("Concat", "draft_ids", "zero_col", out="padded", axis=1)
    op("Unsqueeze", "padded", "axis2", out="padded3")
    for name in "pq":
        op("GatherElements", name, "padded3", out=f"{name}_at3", axis=2)
        op("Squeeze", f"{name}_at3", "axis2", out=f"{name}_at")
    op("Mul", "draft_ids", "zero_i", out="zeros_k")
    op("Add", "zero_col", op.const("two", 2), out="twos")
    op("Cast", op("Concat", "zeros_k", "twos", out="bar_i", axis=1), out="bar", to=TensorProto.FLOAT)
    op("Add", op("Mul", "uniform", "q_at", out="uq"), "bar", out="lhs")  # 最后一列必拒
    op("Not", op("Less", "lhs", "p_at", out="hit"), out="miss")


def _sample_rest(op: _Ops) -> None:
    for name in "pq":
        op("GatherND", name, "num_col", out=f"{name}_row", batch_dims=1)
    op("Relu", op("Sub", "p_row", "q_row", out="diff"), out="rest")
    op("CumSum", "rest", "one", out="cdf")
    op("Slice", "cdf", "last", "end", "axis1", out="total")
    op("Mul", op("Slice", "uniform", "last", "end", "axis1", out="u_last"), "total", out="aim")
    op("Cast", op("LessOrEqual", "cdf", "aim", out="below"), out="below_i", to=TensorProto.INT64)
    op("ReduceSum", "below_i", "axis1", out="slot", keepdims=0)
    op("Min", "slot", op.const("top", VOCAB - 1), out="next_id")


def save_draft(draft: Draft, path: Path, **options: Any) -> Path:
    """草稿模块。"""
    model = onnx.load(save_toy(replace(draft.toy, weights=draft.weights()), path, **options))
    op = _Ops(model)
    op.io("input", "prev_hidden", TensorProto.FLOAT, ["B", "S", WIDTH])
    at = next(index for index, node in enumerate(op.graph.node) if node.name == "x0")
    op.graph.node[at].output[0] = op.graph.node[at].name = "x_base"
    op("MatMul", "prev_hidden", op.const("mix", draft.mix, np.float32), out="mixed_in", at=at + 1)
    op("Add", "x_base", "mixed_in", out="x0", at=at + 2)
    op("ArgMax", "logits", out="best", axis=-1, keepdims=0)
    op("Gather", "best", op.const("last_row", -1), out="draft_id", axis=1)
    op.io("output", "draft_id", TensorProto.INT64, ["B"])
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, path)
    return path


def build(
    folder: Path,
    toy: Toy,
    drafts: list[Draft],
    count: int,
    *,
    verify: Any = "greedy",
    eos: tuple[int, ...] = (),
    chunk: int = 512,
    floor: SpeculativeFloor | None = None,
    **options: Any,
) -> SpeculativeGenerator:
    """存盘、加载、装成生成器。"""
    kwargs: dict[str, Any] = {"threads": 1, "max_positions": toy.max_positions}
    session = ModelSession(OrtRunner(save_main(toy, folder / "model.onnx", verify, **options), **kwargs))
    paths = [save_draft(draft, folder / f"mtp.{i}.onnx", **options) for i, draft in enumerate(drafts)]
    modules = [DraftSession(OrtRunner(path, **kwargs)) for path in paths]
    return SpeculativeGenerator(session, modules, None, eos, count, verify, chunk, floor)


def one_by_one(generator: SpeculativeGenerator) -> Generator:
    """同一个主模型，逐个 token 解码。"""
    return Generator(generator.session, generator.tokenizer, generator.eos_token_ids, generator.prefill_chunk)


@pytest.mark.parametrize("split_kv", [False, True])
def test_draft_graph_matches_numpy(tmp_path: Path, split_kv: bool) -> None:
    draft = make_drafts(make_toy(LIMIT), 2)[1]
    session = DraftSession(
        OrtRunner(save_draft(draft, tmp_path / "mtp.onnx", split_kv=split_kv), threads=1, max_positions=LIMIT)
    )
    prev = np.random.default_rng(0).standard_normal((1, 4, WIDTH)).astype(np.float32)
    ids = [[3, 1, 4, 1]]
    zero = np.array([0])
    caches = session.new_caches(1)
    got = session.run(np.array(ids), prev, zero, np.array([[3]]), caches, want_logits=True)
    logits, hidden = draft.forward(ids[0], prev[0])
    assert got.hidden[0] == pytest.approx(hidden, abs=1e-4)
    assert got.logits is not None
    assert got.logits[0] == pytest.approx(logits[3:], abs=1e-4)
    assert got.draft_id.tolist() == [logits[3].argmax()]
    assert session.run(np.array(ids), prev, zero, np.array([[3]]), caches).logits is None


def test_main_graph_verifies(tmp_path: Path) -> None:
    toy = make_toy(LIMIT)
    session = ModelSession(OrtRunner(save_main(toy, tmp_path / "model.onnx"), threads=1, max_positions=LIMIT))
    assert session.verify_mode == "greedy"
    right = toy.greedy([5, 2], 4)
    for wrong_at in range(4):
        drafts = right[:3]
        if wrong_at < 3:
            drafts[wrong_at] = (drafts[wrong_at] + 1) % VOCAB
        ids = np.array([[5, 2, *drafts]])
        positions = np.array([[1, 2, 3, 4]])
        got = session.verify(ids, np.array([0]), positions, np.array([drafts]), session.new_caches(1))
        assert (got.num_accepted.tolist(), got.next_id.tolist()) == ([wrong_at], [right[wrong_at]])
        assert got.hidden[0] == pytest.approx(layers(toy.weights, ids[0].tolist())[1], abs=1e-4)


def test_rejection_graph_is_certain_when_q_equals_p(tmp_path: Path) -> None:
    """q = p 时草稿必被接受；q 压在 p 为 0 的 token 上时必被拒绝。"""
    toy = make_toy(LIMIT)
    session = ModelSession(
        OrtRunner(save_main(toy, tmp_path / "model.onnx", "rejection"), threads=1, max_positions=LIMIT)
    )
    scores = toy.forward([5])[0] / 0.5
    probs = np.exp(scores - scores.max())
    probs = (probs / probs.sum()).astype(np.float32)[None, None]
    chance = Chance(probs, np.array([[0.999, 0.5]], np.float32), 0.5)
    draft = int(probs.argmax())
    got = session.verify(
        np.array([[5, draft]]),
        np.array([0]),
        np.array([[0, 1]]),
        np.array([[draft]]),
        session.new_caches(1),
        chance,
    )
    assert got.num_accepted.tolist() == [1]
