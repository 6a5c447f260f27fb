"""ops/moe_experts.py：只跑选中的专家 == 全跑再加权 == 逐 token 循环。"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_export.checkpoint.weight_only import (
    BlockFormat,
    block_scales,
    dequantized,
    signed_codes,
    unpacked_int4,
)
from deepseek_export.ops import moe_experts as module
from deepseek_export.ops import registry as _registry  # noqa: F401  登记 torch.ops.dsx
from deepseek_export.ops.coded_weights import widened
from deepseek_export.ops.moe_experts import active_experts, expert_step, experts_dense, fake, moe_experts
from tests.models import TOLERANCE, distance

pytestmark = pytest.mark.unit


def make_inputs(N, D, E, inner, k, dtype=torch.float32, seed=0):
    """每个 token 的 k 个专家互不相同。"""
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E, generator=g)[:k] for _ in range(N)]) if N else torch.zeros(0, k)
    weights = [torch.randn(E, *s, generator=g) * s[1] ** -0.5 for s in ((inner, D), (inner, D), (D, inner))]
    return (
        torch.randn(N, D, generator=g).to(dtype),
        ids.to(torch.int32),
        torch.rand(N, k, generator=g),
        *(w.to(dtype) for w in weights),
    )


def loops(x, ids, weights, w_gate, w_up, w_down):
    """逐 token、逐专家的 float64 实现。"""
    x, weights, w_gate, w_up, w_down = (t.double().numpy() for t in (x, weights, w_gate, w_up, w_down))
    y = np.zeros(x.shape)
    for n in range(len(x)):
        for e, weight in zip(ids[n].tolist(), weights[n], strict=True):
            gate = w_gate[e] @ x[n]
            y[n] += weight * (w_down[e] @ (gate / (1 + np.exp(-gate)) * (w_up[e] @ x[n])))
    return y


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sparse_equals_dense_equals_loops(data):
    """任意形状，含 N=0、k=E。"""
    N, D, E, inner = (data.draw(st.integers(low, top)) for low, top in ((0, 7), (1, 9), (1, 8), (1, 6)))
    inputs = make_inputs(N, D, E, inner, data.draw(st.integers(1, E)), seed=data.draw(st.integers(0, 999)))
    want = loops(*inputs)
    assert distance(moe_experts(*inputs), want) < TOLERANCE[torch.float32]
    assert distance(experts_dense(*inputs), want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("run", [moe_experts, experts_dense])
def test_no_tokens(run):
    """N=0 得到 [0, D]。"""
    assert run(*make_inputs(0, 6, 4, 5, 2)).shape == (0, 6)


@pytest.mark.parametrize("run", [moe_experts, experts_dense])
def test_float16(run):
    """float16：输出 float16，跨专家的累加在 float32。"""
    inputs = make_inputs(9, 48, 12, 28, 4, dtype=torch.float16)
    y = run(*inputs)
    assert y.dtype == torch.float16
    assert distance(y, loops(*inputs)) < TOLERANCE[torch.float16]


def test_accumulates_in_float32():
    """两个专家的巨大输出相消：float16 累加会先溢出成 inf。"""
    inputs = list(make_inputs(1, 4, 2, 4, 2, dtype=torch.float16))
    inputs[2] = torch.tensor([[1000.0, 1000.0]])
    inputs[3:6] = [t[:1].repeat(2, 1, 1) for t in inputs[3:6]]
    inputs[5][0], inputs[5][1] = 300.0, -300.0
    one = loops(inputs[0], torch.tensor([[0]]), inputs[2][:, :1], *inputs[3:])
    assert np.abs(one).max() > 65504, "单个专家的输出不够大，测试没有用"
    assert torch.equal(moe_experts(*inputs), torch.zeros(1, 4, dtype=torch.float16))


def test_only_active_experts_run(monkeypatch):
    """没有 token 的专家不运行；运行次序升序。"""
    inputs = list(make_inputs(5, 6, 8, 5, 2))
    inputs[1] = torch.tensor([[6, 2], [2, 6], [6, 3], [3, 2], [2, 3]], dtype=torch.int32)
    ran = []

    def spy(y, expert, *rest):
        ran.append(int(expert))
        return expert_step(y, expert, *rest)

    monkeypatch.setattr(module, "expert_step", spy)
    y = moe_experts(*inputs)
    assert ran == [2, 3, 6]
    assert distance(y, loops(*inputs)) < TOLERANCE[torch.float32]


def test_active_experts():
    """起点：全零 float32 累加器与升序、不重复的专家编号。"""
    y, experts = active_experts(
        torch.ones(3, 4).half(), torch.tensor([[7, 1], [1, 0], [7, 0]], dtype=torch.int32), 9
    )
    assert (y.dtype, y.shape, y.any().item()) == (torch.float32, (3, 4), False)
    assert (experts.dtype, experts.tolist()) == (torch.int64, [0, 1, 7])


def test_a_repeated_expert_counts_once_per_weight():
    """路由不会给重复的专家；万一重复，权重相加、写回不丢（index_copy 的前提：行号不重复）。"""
    inputs = list(make_inputs(3, 6, 4, 5, 3))
    inputs[1] = torch.tensor([[2, 2, 1], [0, 0, 0], [3, 1, 3]], dtype=torch.int32)
    want = loops(*inputs)
    assert distance(moe_experts(*inputs), want) < TOLERANCE[torch.float32]
    assert distance(experts_dense(*inputs), want) < TOLERANCE[torch.float32]


def test_inputs_are_left_alone():
    """不改动任何输入。"""
    inputs = make_inputs(5, 6, 4, 5, 2)
    before = [t.clone() for t in inputs]
    moe_experts(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("N", [0, 1, 5])
def test_fake_matches_eager(N):
    """形状推导与 eager 一致。"""
    inputs = make_inputs(N, 6, 4, 5, 2)
    got, want = moe_experts(*inputs), fake(*(t.to("meta") for t in inputs))
    assert (got.shape, got.dtype, got.is_contiguous()) == (want.shape, want.dtype, want.is_contiguous())


def test_opcheck():
    """torch 自带的算子检查。"""
    torch.library.opcheck(torch.ops.dsx.moe_experts.default, make_inputs(5, 6, 4, 5, 2))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_experts_restore_then_multiply(kind):
    """权重是码的：与还原之后的逐位相同，形状推导一致。"""
    x, ids, weights, *floating = make_inputs(5, 64, 4, 32, 2)
    form = BlockFormat(kind=kind)
    codes = [signed_codes(w.numpy(), form).view(np.int8) for w in floating]
    if kind == "int4":
        values = [unpacked_int4(code.view(np.uint8).reshape(-1)).astype(np.int8) for code in codes]
        codes = [value.reshape(w.shape) for value, w in zip(values, floating, strict=True)]
    scales = [torch.from_numpy(block_scales(w.numpy(), form)) for w in floating]
    pairs = [
        tensor
        for code, scale in zip(codes, scales, strict=True)
        for tensor in (torch.from_numpy(code), scale)
    ]
    want = moe_experts(x, ids, weights, *(torch.from_numpy(dequantized(w.numpy(), form)) for w in floating))
    inputs = (x, ids, weights, *pairs, 32, 1, 0)
    assert torch.equal(torch.ops.dsx.quantized_moe_experts(*inputs), want)
    torch.library.opcheck(torch.ops.dsx.quantized_moe_experts.default, inputs)


@pytest.mark.parametrize(("N", "K"), [(5, 40), (40, 33)])
def test_fp8_codes_restore_by_definition(N, K):
    """FP8 的码：每个 scale 管一块，边上的不满。线性层同样。"""
    g = torch.Generator().manual_seed(0)
    codes = torch.randn(2, N, K, generator=g).to(torch.float8_e4m3fn)
    scales = torch.rand(2, -(-N // 12), -(-K // 16), generator=g)
    rows, columns = torch.arange(N) // 12, torch.arange(K) // 16
    want = codes.float() * scales[:, rows][:, :, columns]
    codes = codes.view(torch.int8)
    assert torch.equal(widened(codes, scales, 16, 12, 1, torch.float32), want)
    x = torch.randn(1, 3, K, generator=g)
    inputs = (x, codes[0], scales[0], 16, 12, 1)
    assert torch.equal(torch.ops.dsx.quantized_linear(*inputs), torch.nn.functional.linear(x, want[0]))
    torch.library.opcheck(torch.ops.dsx.quantized_linear.default, inputs)
