"""NarrowKvBWeightsPass：权重改成 bfloat16，函数体先转回 float32，数值只差权重的舍入；保留的不动，跑两遍第二遍不变。"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from deepseek_export.backend.ort.values import ort_value
from deepseek_export.capture import capture_model
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.ops.table import MLA_ATTENTION
from deepseek_export.passes.base import GraphModule
from deepseek_export.passes.narrow_kv_b_weights import NarrowKvBWeightsPass
from deepseek_export.profile import resolve_profile
from tests.models import model_config
from tests.unit.test_passes_bound_mla_cache import session_of

pytestmark = pytest.mark.unit

LAYERS = 3


@pytest.fixture
def module() -> GraphModule:
    config = model_config("v3")
    assert config.num_hidden_layers == LAYERS
    return GraphModule.from_captured(capture_model(config, resolve_profile("mla")), config, "float32")


@pytest.mark.parametrize(("keep", "count"), [((), LAYERS), (("layers.0",), LAYERS - 1), (("kv_b_proj",), 0)])
def test_weights_and_body(module, keep, count):
    """EXPORT-32：不保留的层换掉；再跑一遍不变。"""
    rewrite = NarrowKvBWeightsPass(Quantization(kind="int8", keep=keep))
    assert rewrite(module).count == count
    dtypes = [recipe.dtype for name, recipe in module.weights.items() if "kv_b_proj" in name]
    assert dtypes == ["float32"] * (LAYERS - count) + ["bfloat16"] * count
    readers = [n.op_type for n in module.functions[MLA_ATTENTION.name].node if "w_kv_b" in n.input]
    assert ("Cast" in readers) == (count > 0)
    assert not rewrite(module).changed


def test_the_body_reads_either_type(module):
    """EXPORT-32：换过的函数体用舍入过的权重，结果与原来的函数体一位不差。"""
    plain = session_of(module.functions[MLA_ATTENTION.name])
    NarrowKvBWeightsPass(Quantization(kind="int8"))(module)
    narrow = session_of(module.functions[MLA_ATTENTION.name], w_kv_b="bfloat16")
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
    weight = rng.standard_normal((H * (c.qk_nope_head_dim + c.v_head_dim), r)).astype(ml_dtypes.bfloat16)
    want = plain.run(None, feeds | {"w_kv_b": weight.astype(np.float32)})
    values = {name: ort_value(array) for name, array in (feeds | {"w_kv_b": weight}).items()}
    got = [value.numpy() for value in narrow.run_with_ort_values(None, values)]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
