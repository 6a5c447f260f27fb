"""BoundMlaCachePass：结果不变，容量之外的内容不再被读，跑两遍第二遍不变。"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from deepseek_export.capture import capture_model
from deepseek_export.capture.bodies import mla_attention_body
from deepseek_export.ops.mla_attention import mla_attention
from deepseek_export.ops.table import DOMAIN, MLA_ATTENTION, OPSET_VERSION
from deepseek_export.passes.base import GraphModule
from deepseek_export.passes.bound_mla_cache import BoundMlaCachePass
from deepseek_export.profile import resolve_profile
from tests.models import model_config

pytestmark = pytest.mark.unit


def module_for(profile: str, form: str = "auto") -> GraphModule:
    config = model_config("v3")
    overrides = [f"mla.form={form}"] if "mla" in profile else []
    captured = capture_model(config, resolve_profile(profile, overrides))
    return GraphModule.from_captured(captured, config, "float32")


def session_of(body: onnx.FunctionProto, w_kv_b: str = "float") -> ort.InferenceSession:
    """只有一个 MlaAttention 节点的模型；``w_kv_b`` 是那个输入的类型。"""
    names = [port.name for port in MLA_ATTENTION.inputs]
    attributes = {"scale": 0.2, "plugin_namespace": "dsx", "plugin_version": "1"}
    node = onnx.helper.make_node("MlaAttention", names, ["o", "kv_cache_out"], domain=DOMAIN, **attributes)
    kinds = {
        "past_lens": onnx.TensorProto.INT64,
        "w_kv_b": onnx.TensorProto.DataType.Value(w_kv_b.upper()),
    }
    values = [
        onnx.helper.make_tensor_value_info(
            port.name, kinds.get(port.name, onnx.TensorProto.FLOAT), [None] * len(port.dims)
        )
        for port in (*MLA_ATTENTION.inputs, *MLA_ATTENTION.outputs)
    ]
    graph = onnx.helper.make_graph([node], "one", values[: len(names)], values[len(names) :])
    opsets = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=11)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options)


@pytest.mark.parametrize("form", ["auto", "absorb", "naive"])
def test_result_is_unchanged_and_the_rest_is_never_read(form: str):
    """MLA-5：形状两侧（auto 的两个分支）都比；用到的前缀之外填 NaN 也不影响结果。"""
    module = module_for("mla", form)
    assert BoundMlaCachePass()(module).count == module.config.num_hidden_layers
    session, c = session_of(module.functions["MlaAttention"]), module.config
    rng = np.random.default_rng(0)
    for B, S, T, past in ((2, 1, 64, (5, 17)), (3, 4, 50, (0, 9, 2)), (1, 40, 41, (0,)), (2, 3, 8, (5, 5))):
        shapes = {
            "q_nope": (B, S, c.num_attention_heads, c.qk_nope_head_dim),
            "q_pe": (B, S, c.num_attention_heads, c.qk_rope_head_dim),
            "c_kv": (B, S, c.kv_lora_rank),
            "k_pe": (B, S, c.qk_rope_head_dim),
            "kv_cache": (B, 1, T, c.latent_cache_values),
            "w_kv_b": (c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        }
        feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        feeds["past_lens"] = np.array(past, np.int64)
        want, _ = mla_attention(**{k: torch.from_numpy(v) for k, v in feeds.items()}, scale=0.2)
        feeds["kv_cache"][:, :, max(past) + S :] = np.nan
        got, cache = session.run(None, feeds)
        assert np.abs(got - want.numpy()).max() < 1e-4
        assert cache.shape == feeds["kv_cache"].shape


def test_idempotent_and_leaves_the_captured_body_alone():
    module = module_for("mla")
    before = mla_attention_body(module.config, "auto", torch.float32, torch.float32).SerializeToString()
    assert BoundMlaCachePass()(module).changed
    again = BoundMlaCachePass()(module)
    assert (again.changed, again.count) == (False, 0)
    after = mla_attention_body(module.config, "auto", torch.float32, torch.float32).SerializeToString()
    assert before == after


def test_nothing_to_do_without_mla():
    result = BoundMlaCachePass()(module_for("moe"))
    assert (result.changed, result.count, result.refused) == (False, 0, ())
