"""QuantizeKvBWeightsPass：w_kv_b 换成 int8 的行，函数体先还原成 float32，一位不差；保留的、放不进的不动，跑两遍第二遍不变。"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from deepseek_export.capture import CapturedModel, capture_model
from deepseek_export.checkpoint import ModelConfig
from deepseek_export.checkpoint.weight_only import BlockFormat, Quantization, dequantized, packed_rows
from deepseek_export.ops.table import MLA_ATTENTION
from deepseek_export.ops.weight_rows import decode_weight_rows
from deepseek_export.passes.base import GraphModule
from deepseek_export.passes.quantize_kv_b_weights import QuantizeKvBWeightsPass
from deepseek_export.profile import resolve_profile
from tests.models import model_config
from tests.unit.test_passes_bound_mla_cache import session_of

pytestmark = pytest.mark.unit

LAYERS, RANK = 2, 64


@pytest.fixture(scope="module")
def captured() -> tuple[CapturedModel, ModelConfig]:
    config = model_config("v3", num_hidden_layers=LAYERS, kv_lora_rank=RANK)
    return capture_model(config, resolve_profile("mla")), config


@pytest.fixture
def module(captured) -> GraphModule:
    return GraphModule.from_captured(*captured, "float32")


@pytest.mark.parametrize(
    ("keep", "counts"), [((), (LAYERS, 0, 0)), (("layers.0",), (0, 1, 1)), (("kv_b_proj",), (0, LAYERS, 0))]
)
def test_weights(module, keep, counts):
    """EXPORT-32：都不保留的换掉；有一层要保留，其余的拒绝并说明，留给后面的 pass；再跑一遍不变。"""
    rewrite = QuantizeKvBWeightsPass(Quantization(kind="int4", keep=keep))
    result = rewrite(module)
    assert (result.count, result.kept, len(result.refused)) == counts
    kv_b = {name: recipe for name, recipe in module.weights.items() if "kv_b_proj" in name}
    assert [recipe.dtype for recipe in kv_b.values()] == ["int8" if result.count else "float32"] * LAYERS
    for recipe in kv_b.values():
        assert recipe.shape[1] == (RANK + 2 * RANK // 32 if result.count else RANK)
    assert len(module.quantized) == result.count
    assert not rewrite(module).changed


def test_a_rank_that_is_no_multiple_is_refused(module):
    """EXPORT-32：r 不是 block 的倍数，写明值。"""
    module.config = replace(module.config, kv_lora_rank=48)
    result = QuantizeKvBWeightsPass(Quantization(kind="int8"))(module)
    assert (result.changed, len(result.refused)) == (False, LAYERS)
    assert "48" in result.refused[0].value


def weight_rows(rows: int, block: int) -> tuple[np.ndarray, BlockFormat]:
    """各块的大小差得远：scale 有零、非规格化的、很大的。"""
    form = BlockFormat.model_validate({"kind": "int8", "block": block, "scale": "float16"})
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.uniform(-7, 4, (rows, RANK // 32))
    sizes[0] = 0
    return (rng.standard_normal((rows, RANK)) * sizes.repeat(32, 1)).astype(np.float32), form


@pytest.mark.parametrize("block", [32, 64])
def test_rows_hold_the_codes_and_the_scales(block):
    """EXPORT-32：一行还原成的就是量化再还原的权重，一位不差。"""
    weight, form = weight_rows(40, block)
    rows = packed_rows(weight, form)
    assert rows.shape == (40, RANK + 2 * RANK // block)
    np.testing.assert_array_equal(
        decode_weight_rows(torch.from_numpy(rows), RANK).numpy(), dequantized(weight, form)
    )


@pytest.mark.parametrize("block", [32, 64])
def test_the_body_restores_the_weights(module, block):
    """EXPORT-32：换过的函数体与原来的函数体配还原的权重，结果一位不差。"""
    plain = session_of(module.functions[MLA_ATTENTION.name])
    QuantizeKvBWeightsPass(Quantization.model_validate({"kind": "int8", "block": block}))(module)
    packed = session_of(module.functions[MLA_ATTENTION.name], w_kv_b="int8")
    c, rng = module.config, np.random.default_rng(0)
    H, r = c.num_attention_heads, c.kv_lora_rank
    shapes = {
        "q_nope": (2, 3, H, c.qk_nope_head_dim),
        "q_pe": (2, 3, H, c.qk_rope_head_dim),
        "c_kv": (2, 3, r),
        "k_pe": (2, 3, c.qk_rope_head_dim),
        "kv_cache": (2, 1, 16, r + c.qk_rope_head_dim),
    }
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    feeds["past_lens"] = np.array([0, 9])
    weight, form = weight_rows(H * (c.qk_nope_head_dim + c.v_head_dim), block)
    want = plain.run(None, feeds | {"w_kv_b": dequantized(weight, form)})
    got = packed.run(None, feeds | {"w_kv_b": packed_rows(weight, form)})
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
