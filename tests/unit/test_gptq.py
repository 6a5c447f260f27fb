"""GPTQ：比最近的码好，结果与线程数无关；码的各种写法互为逆。"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_export.calibration.gptq import Gram, gptq
from deepseek_export.calibration.weights import nearest
from deepseek_export.checkpoint.recipe import Recipe, materialize
from deepseek_export.checkpoint.restored import separated
from deepseek_export.checkpoint.weight_only import (
    BlockFormat,
    block_codes,
    block_scales,
    block_steps,
    loaded_steps,
    signed_codes,
    stored_codes,
)

FORM = BlockFormat(kind="int4", block=32, scale="float16")


def _layer(width: int, rows: int = 24, tokens: int = 512) -> tuple[torch.Tensor, Gram]:
    """相关的输入：真的激活也是低秩加一点。"""
    generator = torch.Generator().manual_seed(width)
    basis = torch.randn(width // 4, width, generator=generator)
    inputs = torch.randn(tokens, width // 4, generator=generator) @ basis
    inputs += 0.1 * torch.randn(tokens, width, generator=generator)
    gram = Gram(width)
    for part in inputs.split(100):
        gram.add(part[None])
    return torch.randn(rows, width, generator=generator), gram


def _loss(weight: torch.Tensor, values: torch.Tensor, gram: Gram) -> float:
    gap = (values - weight).double()
    return float(torch.einsum("ni,ij,nj->", gap, gram.sum, gap))


@pytest.mark.parametrize("width", [32, 128, 80])
def test_the_output_is_closer_than_with_nearest_codes(width: int):
    """输出的误差不到最近的码的一半；码与 scale 都在格式里，末块不满也行。"""
    weight, gram = _layer(width)
    root = gram.inverse_root()
    assert root is not None
    found, plain = gptq(weight, root, FORM), nearest(weight, FORM)
    assert _loss(weight, found.values(32), gram) < 0.5 * _loss(weight, plain.values(32), gram)
    assert found.steps.dtype == torch.int8
    assert -8 <= int(found.steps.min()) <= int(found.steps.max()) <= 7
    assert found.scales.dtype == torch.float16
    assert found.scales.shape == (24, -(-width // 32))


def test_the_root_is_of_the_damped_inverse():
    """U 是上三角，U^T U 是加了阻尼的 H 的逆。"""
    _, gram = _layer(64)
    root = gram.inverse_root(0.05)
    assert root is not None
    damped = gram.sum + 0.05 * gram.sum.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    product = (root.double().T @ root.double() @ damped).numpy()
    np.testing.assert_allclose(product, np.eye(64), atol=1e-3)
    assert bool((root.tril(-1) == 0).all())


def test_inputs_that_are_all_zero_give_no_root():
    """没有可以依据的，由调用的人取最近的码。"""
    gram = Gram(32)
    gram.add(torch.zeros(4, 32))
    assert gram.inverse_root() is None


def test_rows_do_not_see_each_other():
    """一行的码与同一个矩阵里还有哪些行无关：几个输入相同的线性层可以合在一起算。"""
    weight, gram = _layer(64)
    root = gram.inverse_root()
    assert root is not None
    whole, part = gptq(weight, root, FORM), gptq(weight[5:9], root, FORM)
    assert torch.equal(whole.steps[5:9], part.steps)
    assert torch.equal(whole.scales[5:9], part.scales)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.sampled_from(["int4", "int8"]), st.integers(0, 1000))
def test_stored_codes_come_back(width: int, kind: str, seed: int):
    """压成存储的字节与 block_codes、signed_codes 逐字节相同，读回来是原来的码。"""
    form = BlockFormat.model_validate({"kind": kind, "block": 32, "scale": "float16"})
    weights = np.random.default_rng(seed).standard_normal((3, width)).astype(np.float32)
    steps = block_steps(weights, block_scales(weights, form), form)
    unsigned = stored_codes(steps, form, signed=False)
    assert np.array_equal(unsigned, block_codes(weights, form))
    assert np.array_equal(loaded_steps(unsigned, form, weights.shape, signed=False), steps)
    if width % 32 == 0:
        signed = stored_codes(steps, form, signed=True)
        assert np.array_equal(signed, signed_codes(weights, form))
        assert np.array_equal(loaded_steps(signed, form, weights.shape, signed=True), steps)


class _Store:
    """配方读的那一半。"""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.arrays[name][start:stop]


@pytest.mark.parametrize(
    ("op", "count", "groups"),
    [("copy", 1, None), ("deinterleave", 1, (6, 4)), ("stack", 3, None), ("stack_swiglu", 4, None)],
)
def test_initializers_are_taken_apart(op: str, count: int, groups: tuple[int, int] | None):
    """叠放、交错、重排之后，还拆得回一个个来源。"""
    rng = np.random.default_rng(0)
    arrays = {f"w{i}": rng.standard_normal((12, 4)).astype(np.float32) for i in range(count)}
    shape = {"stack": (3, 12, 4), "stack_swiglu": (2, 24, 4)}.get(op, (12, 4))
    recipe = Recipe.model_validate(
        {"op": op, "sources": tuple(arrays), "shape": shape, "dtype": "float32", "groups": groups}
    )
    rows = np.concatenate([part.reshape(-1, 4) for part in materialize("w", recipe, _Store(arrays))])
    found = separated(recipe, rows.reshape(shape))
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())
