"""lower：整条流水线、计数、合法性、清单。"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

import deepseek_export
from deepseek_export.capture import capture_draft, capture_model
from deepseek_export.checkpoint.recipe import load_array
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.errors import DsxError
from deepseek_export.passes import GraphModule, Pass, PassError, graph_listing, lower, lowering, pipeline
from deepseek_export.passes.expected import nodes
from deepseek_export.passes.legality import check_legality
from deepseek_export.passes.pipelines import Step
from deepseek_export.profile import resolve_profile
from deepseek_export.records import QUANT_TARGETS, TARGETS, TENSORRT_TARGETS, PassResult
from tests.models import TOLERANCE, distance, model_config, ort_session

pytestmark = pytest.mark.unit


@functools.cache
def captured(variant: str, profile: str, dtype: str = "float32"):
    return capture_model(model_config(variant), resolve_profile(profile), dtype)


def lowered(variant: str, profile: str, target: str, dtype: str = "float32", **options):
    arguments = (model_config(variant), resolve_profile(profile), dtype, target)
    return lower(captured(variant, profile, dtype), *arguments, **options)


def module_of(variant: str = "v3", profile: str = "mla+moe") -> GraphModule:
    """可以随意弄坏的一份。"""
    source = copy.deepcopy(captured(variant, profile))
    return GraphModule.from_captured(source, model_config(variant), "float32")


def by_name(model) -> dict[str, PassResult]:
    """pass 的名字 → 结果；每个 pass 至多跑一次。"""
    found = {result.name: result for result in model.results}
    assert len(found) == len(model.results)
    return found


def names(values) -> list[str]:
    return [value.name for value in values]


@pytest.mark.parametrize(
    ("variant", "fused"),
    [
        ("v3", True),
        ("v3-yarn", True),
        ("v3-one-group", True),
        ("v3-no-norm-topk", False),
        ("v2-greedy", False),
        ("v2-group", False),
        ("v2-lite", False),
    ],
)
def test_whole_model_is_equal_before_and_after(variant, fused, saved):
    checkpoint = saved(variant)[1]
    portable, ort = (lowered(variant, "mla+moe", target) for target in ("portable", "ort-cpu"))
    layers, all_layers = model_config(variant).num_moe_layers, model_config(variant).num_hidden_layers
    counts = {name: result.count for name, result in by_name(ort).items()}
    assert counts["lower-gate-experts-to-ort-moe"] == (layers if fused else 0)
    assert counts["lower-experts-to-ort-moe"] == (0 if fused else layers)
    assert counts["bound-mla-cache"] == all_layers
    assert len(ort.fallbacks) == (0 if fused else 1)
    contract = [n for n in names(portable.proto.graph.input) if n not in portable.weights]
    assert [n for n in names(ort.proto.graph.input) if n not in ort.weights] == contract
    assert names(ort.proto.graph.output) == names(portable.proto.graph.output)
    for B, S in ((1, 1), (2, 40)):
        ids = np.random.default_rng(S).integers(0, 211, (B, S))
        feeds = {
            "input_ids": ids,
            "past_lens": np.zeros(B, np.int64),
            "logits_positions": np.full((B, 1), S - 1),
        }
        width = model_config(variant).latent_cache_values
        feeds |= {f"kv_cache.{i}": np.zeros((B, 1, 48, width), np.float32) for i in range(3)}
        outs = []
        for model in (portable, ort):
            session = ort_session(model.proto)
            weights = {
                name: load_array(name, recipe, checkpoint.store) for name, recipe in model.weights.items()
            }
            outs.append(session.run(["logits", "hidden"], {**feeds, **weights}))
        for got, want in zip(outs[1], outs[0], strict=True):
            assert distance(got, want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("target", TARGETS)
def test_oversized_experts_are_split_in_the_whole_model(target, saved):
    """MOE-20：把上限降到 9 个专家（12 个要拆成两组），整个模型在每个目标上都与不拆的相等；没有拆的不留记录。"""
    checkpoint, config = saved("v3")[1], model_config("v3")
    arguments = (captured("v3", "mla+moe"), config, resolve_profile("mla+moe"), "float32", target)
    limit = 9 * config.hidden_size * config.moe_intermediate_size
    whole, split = lower(*arguments), lower(*arguments, max_elements=limit)
    assert "split-experts" not in by_name(whole)
    assert by_name(split)["split-experts"].count == config.num_moe_layers
    counts = [node.op_type for node in split.proto.graph.node]
    assert counts.count("MoeExperts") == 2 * config.num_moe_layers
    # TensorRT 的路由展开成原生算子，其余目标原样留着。
    assert counts.count("MoeGate") == (0 if target in TENSORRT_TARGETS else config.num_moe_layers)
    onnx.checker.check_model(split.proto)
    feeds = {"input_ids": np.arange(40)[None], "past_lens": np.zeros(1, np.int64)}
    feeds["logits_positions"] = np.arange(40)[None]
    cache = np.zeros((1, 1, 48, config.latent_cache_values), np.float32)
    feeds |= {f"kv_cache.{i}": cache for i in range(config.num_hidden_layers)}
    outs = []
    for model in (split, whole):
        weights = {name: load_array(name, recipe, checkpoint.store) for name, recipe in model.weights.items()}
        outs.append(ort_session(model.proto).run(["logits"], {**feeds, **weights})[0])
    assert distance(outs[0], outs[1]) < TOLERANCE[torch.float32]


def test_experts_that_become_codes_are_not_split():
    """MOE-20：``ort-cpu`` 上换成码的专家多大都不拆，不然换不成；要保持浮点的照常拆。"""
    config = model_config("v3", hidden_size=64, moe_intermediate_size=32)
    profile, layers = resolve_profile("mla+moe"), config.num_moe_layers
    arguments = (capture_model(config, profile, "float32"), config, profile, "float32", "ort-cpu")
    limit = 9 * config.hidden_size * config.moe_intermediate_size
    for keep, coded, split in (((), layers, 0), (("mlp.experts",), 0, 2 * layers)):
        found = lower(*arguments, limit, Quantization(kind="int4", keep=keep))
        counts = [node.op_type for node in found.proto.graph.node]
        assert (counts.count("Int4Experts"), counts.count("MoeExperts")) == (coded, split)


def test_a_weight_too_big_to_split_is_refused_by_code():
    """MOE-20：baseline 的专家在一个普通 MatMul 里，拆不了：DSX-E410，点名权重与元素数。"""
    config, profile = model_config("v3"), resolve_profile("baseline")
    with pytest.raises(DsxError) as error:
        lower(captured("v3", "baseline"), config, profile, "float32", "portable", max_elements=12_000)
    assert error.value.code == "DSX-E410"
    assert "experts.*.gate_proj" in error.value.what


def test_lowering_is_deterministic_and_leaves_the_captured_model_alone():
    source = captured("v3", "mla+moe")
    before = source.proto.SerializeToString(), dict(source.weights), sorted(source.functions)
    first, second = (lowered("v3", "mla+moe", "ort-cpu").proto.SerializeToString() for _ in range(2))
    assert first == second
    assert (source.proto.SerializeToString(), dict(source.weights), sorted(source.functions)) == before


@pytest.mark.parametrize("target", TARGETS)
def test_lowered_model_is_self_consistent(target):
    model = lowered("v3", "mla+moe", target)
    onnx.checker.check_model(model.proto)
    assert (model.proto.ir_version, model.proto.producer_name, model.proto.opset_import[0].version) == (
        11,
        "dsx",
        24,
    )
    assert names(model.proto.graph.input)[-len(model.weights) :] == list(model.weights)
    domains = {opset.domain for opset in model.proto.opset_import}
    assert domains == ({"", "dsx", "com.microsoft"} if target == "ort-cpu" else {"", "dsx"})
    bodies = {
        "portable": {"MlaAttention", "MoeGate", "MoeExperts"},
        "ort-cpu": {"MlaAttention"},
        "tensorrt": {"LatentAttention", "MoeExperts"},
    }
    assert {function.name for function in model.proto.functions} == bodies[target.removesuffix("-rtx")]
    # 下沉之后对齐校验仍能按名字找到每个 MoeExperts 的输入与输出。
    values = {name for node in model.proto.graph.node for name in (*node.input, *node.output)}
    for site in captured("v3", "mla+moe").sites:
        if site.op == "MoeExperts":
            assert {site.inputs[0], site.outputs[0]} <= values


def test_baseline_has_nothing_to_lower():
    """没有 dsx 算子可下沉；ort-cpu 只收拾形状与转置。"""
    portable, ort, *others = (lowered("v3", "baseline", target) for target in TARGETS)
    finishing = ["fold-reshape-shapes", "split-pairs"]
    assert [r.name for r in ort.results if r.changed] == finishing
    for model in (ort, *others):
        lowering = [r for r in model.results if r.name not in finishing]
        assert {(r.changed, r.count, r.refused) for r in lowering} == {(False, 0, ())}
        assert model is ort or portable.proto.graph == model.proto.graph
        assert {opset.domain for opset in model.proto.opset_import} == {""}


def test_float16_falls_back_loudly():
    model = lowered("v3", "mla+moe", "ort-cpu", "float16")
    results = by_name(model)
    for name in ("lower-gate-experts-to-ort-moe", "lower-experts-to-ort-moe"):
        assert (results[name].count, len(results[name].refused)) == (0, 2)
        assert PassResult.model_validate_json(results[name].model_dump_json()) == results[name]
    assert (results["bound-mla-cache"].count, results["bound-mla-cache"].refused) == (3, ())
    (line,) = model.fallbacks  # 同一个原因只说一次
    assert "没有改写 layers.1.mlp 等 2 处" in line
    assert "float16" in line


@pytest.mark.parametrize(
    ("profile", "keep", "says"),
    [
        ("mla", (), ["6 个专家权重没有量化"]),
        ("mla", ("down_proj",), ["4 个专家权重没有量化"]),
        ("mla", ("experts",), []),
        ("mla+moe", ("experts",), []),
    ],
)
def test_experts_left_in_float_are_reported(profile, keep, says):
    """EXPORT-32：没有下沉成 MoE 的专家没有量化，要写出来；用户要保留的不写。"""
    quantization = Quantization(kind="int8", keep=keep)
    model = lowered("v3", profile, "ort-cpu", quantization=quantization)
    experts = [line for line in model.fallbacks if "kv_lora_rank" not in line]  # 宽度 16 的 kv_b 另有一行
    assert [line.partition("：")[0] for line in experts] == says


def test_a_refusal_is_said_once_in_the_draft_too():
    """EXPORT-32：拒绝的原因已经有一行；草稿模型的节点叫 mtp.mlp、权重叫 model.layers.3.mlp，也不再说一遍。"""
    config, profile = model_config("v3", num_nextn_predict_layers=1), resolve_profile("full")
    draft = capture_draft(config, profile, 0)
    quantization = Quantization(kind="int8")  # 宽度 48 不是 32 的倍数
    lines = lower(draft, config, profile, "float32", "ort-cpu", quantization=quantization).fallbacks
    experts, kv_b = lines
    assert experts.startswith("quantize-moe-to-qmoe 没有改写 mtp.mlp：QMoE 要求")
    assert kv_b.startswith(
        "quantize-kv-b-weights 没有改写 mtp.self_attn：kv_lora_rank 不是 block（32）的倍数"
    )


def test_unknown_target_lists_the_targets():
    with pytest.raises(
        DsxError, match=r"'tpu' 不存在\n.*portable、ort-cpu、tensorrt、tensorrt-rtx"
    ) as caught:
        lowered("v3", "mla+moe", "tpu")
    assert caught.value.code == "DSX-E301"
    with pytest.raises(DsxError, match="是不是想写 tensorrt-rtx？"):
        lowered("v3", "mla+moe", "tensorrt_rtx")


@pytest.mark.heavy
@pytest.mark.parametrize("target", TENSORRT_TARGETS)
def test_int8_cache_of_sparse_attention_is_refused_for_tensorrt(saved, tmp_path, target: str):
    """MLA-7：TensorRT 的稀疏注意力核只读浮点的缓存；捕获之前就拒绝，什么也不写。"""
    path, overrides = saved("v32")[1].path, ["mla.cache_dtype=int8"]
    with pytest.raises(DsxError, match=f"目标 {target} 不支持稀疏注意力的 mla.cache_dtype=int8") as caught:
        deepseek_export.export(path, tmp_path / "out", "mla", target=target, overrides=overrides)
    assert caught.value.code == "DSX-E322"
    assert not (tmp_path / "out").exists()


def test_wrong_count_after_capture_names_capture():
    with pytest.raises(DsxError, match="capture 之后有 3 个 dsx::MlaAttention，方案 moe 应有 0 个") as caught:
        lower(captured("v3", "mla+moe"), model_config("v3"), resolve_profile("moe"), "float32", "portable")
    assert caught.value.code == "DSX-E302"


class _SkipPass(Pass):
    name: ClassVar[str] = "skip"

    def call(self, module):
        return PassResult(name=self.name, changed=False, count=0)


class _BreakPass(Pass):
    """按 ``action`` 弄坏图。"""

    name: ClassVar[str] = "break"
    action: ClassVar = staticmethod(lambda module: None)
    count: ClassVar[int] = 1

    def call(self, module):
        type(self).action(module)
        return PassResult(name=self.name, changed=True, count=self.count)


def _breaking(does, tally=1):
    class Broken(_BreakPass):
        action = staticmethod(does)
        count = tally

    return Broken


@pytest.mark.parametrize("says", [0, 1, 2])
def test_untruthful_count_names_the_pass(says, monkeypatch):
    """什么也没改：少报一处、报了两处而节点都还在，都点名。"""
    idle = _breaking(lambda module: None, says) if says else _SkipPass
    monkeypatch.setattr(lowering, "pipeline", lambda *_: [Step(idle(), nodes("MoeExperts"))])
    with pytest.raises(DsxError, match=rf"pass (skip|break) 报告改写 {says} 处.*之后还有 2 处") as caught:
        lowered("v3", "mla+moe", "ort-cpu")
    assert caught.value.code == "DSX-E302"


@pytest.mark.parametrize("target", QUANT_TARGETS)
def test_every_step_is_counted(target, monkeypatch):
    """EXPORT-3：量化与收拾的步骤也核对：把任何一步换成什么也不做的，只要它本该处理几处就失败并点名。"""
    quantization, blamed = Quantization(kind="int8"), []
    steps = pipeline(target, quantization)
    for index, step in enumerate(steps):
        idle = [*steps[:index], dataclasses.replace(step, rewrite=_SkipPass()), *steps[index + 1 :]]
        monkeypatch.setattr(lowering, "pipeline", lambda *_, idle=idle: idle)
        # 专家已随前一步融合；没有 MTP 就没有草稿验证，没有稀疏注意力就没有索引器；宽度 48 量化不了；折叠形状的不核对。
        if (
            step.rewrite.name
            in (
                "lower-experts-to-ort-moe",
                "lower-indexer-to-tensorrt",
                "skip-index-queries",
                "fuse-quantized-linears",
                "fold-reshape-shapes",
            )
            or "spec-accept" in step.rewrite.name
        ):
            lowered("v3-bias-tied", "mla+moe", target, quantization=quantization)
            continue
        with pytest.raises(DsxError, match="pass skip 报告改写 0 处") as caught:
            lowered("v3-bias-tied", "mla+moe", target, quantization=quantization)
        assert caught.value.code == "DSX-E302"
        blamed.append(step.rewrite.name)
    assert len(blamed) == (10 if target == "ort-cpu" else 5)


def test_illegal_graph_names_the_pass(monkeypatch):
    def action(module):
        module.graph.nodes[0].domain = "elsewhere"

    monkeypatch.setattr(lowering, "pipeline", lambda *_: [Step(_breaking(action)(), nodes("MoeExperts"))])
    with pytest.raises(DsxError, match="break 之后（目标 ort-cpu）") as caught:
        lowered("v3", "mla+moe", "ort-cpu")
    assert caught.value.code == "DSX-E303"
    assert "break" in caught.value.todo


def test_faults_inside_a_pass_name_it_and_its_predecessors():
    def crash(module):
        raise ValueError("坏了")

    with pytest.raises(PassError, match="pass break 在 call 阶段失败，之前跑过：a、b：坏了") as caught:
        _breaking(crash)()(module_of(), ["a", "b"])
    assert isinstance(caught.value.__cause__, ValueError)

    def complain(module):
        raise DsxError("DSX-E301", "不行", "换一个")

    with pytest.raises(DsxError, match="不行（pass break，它是第一个 pass）"):
        _breaking(complain)()(module_of())
    with pytest.raises(PassError, match="I/O 契约变了"):
        _breaking(lambda module: module.graph.outputs.pop())()(module_of())
    with pytest.raises(PassError, match="changed=True 而 count=0"):
        _breaking(lambda module: None, 0)()(module_of())


def test_passes_state_their_preconditions():
    rewrites = {step.rewrite.name: step.rewrite for step in pipeline("ort-cpu")}
    module = module_of()
    module.graph.opset = 17
    with pytest.raises(PassError, match=r"requires 阶段失败.*17"):
        rewrites["lower-experts-to-ort-moe"](module)


def node(module, op) -> gs.Node:
    return module.find(op)[0]


def _attr(op, key, value):
    return lambda m: node(m, op).attrs.__setitem__(key, value)


def _append(m, **kwargs):
    m.graph.nodes.append(gs.Node(**kwargs))


def _weight(m):
    return next(t for t in m.graph.inputs if t.name == "lm_head.weight")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda m: setattr(node(m, "MoeGate"), "op", "Unknown"), "没有的算子 dsx::Unknown"),
        (lambda m: node(m, "MoeGate").inputs.pop(), "有 1 个输入，应为 2"),
        (lambda m: node(m, "MoeGate").outputs.pop(), "有 1 个输出，应为 2"),
        (lambda m: node(m, "MoeGate").inputs.__setitem__(1, gs.Variable.empty()), "的输入 bias 是空的"),
        (lambda m: node(m, "MoeGate").attrs.pop("top_k"), "多或少了属性 top_k"),
        (_attr("MoeExperts", "extra", 1), "多或少了属性 extra"),
        (_attr("MoeGate", "top_k", 4.0), "top_k = 4.0 应为 int"),
        (_attr("MoeGate", "plugin_version", "2"), "plugin_version = '2' 应为 '1'"),
        (_attr("MoeGate", "topk_group", 3), "而共用函数体的"),
        (lambda m: m.functions.pop("MoeGate"), "dsx::MoeGate 没有函数体"),
        (lambda m: m.functions["MoeGate"].input.pop(), "函数体签名"),
        (
            lambda m: _append(m, op="Identity", name="n", outputs=[gs.Variable("hidden")]),
            "值 hidden 定义了两次",
        ),
        (lambda m: m.graph.inputs.append(m.graph.inputs[0]), "图的输入 input_ids 重复"),
        (lambda m: setattr(m.graph.nodes[1], "name", m.graph.nodes[0].name), "节点名 embed/Shape_0 重复"),
        (lambda m: node(m, "MoeExperts").inputs.__setitem__(0, gs.Variable("ghost")), "ghost 没有来源"),
        (lambda m: m.graph.nodes.reverse(), "在使用之后才定义"),
        (lambda m: m.graph.nodes[-1].outputs.clear(), "图的输出 logits 没有来源"),
        (lambda m: _append(m, op="If", name="n", attrs={"then_branch": gs.Graph()}), "带子图"),
        (
            lambda m: _append(m, op="MoE", name="n", domain="com.microsoft"),
            "域 com.microsoft 不允许，允许：dsx",
        ),
        (lambda m: m.weights.pop("lm_head.weight"), "lm_head.weight 既不在 I/O 契约里，也没有权重配方"),
        (lambda m: setattr(_weight(m), "shape", [1, 2]), "权重 lm_head.weight 声明为 float32[1, 2]"),
        (lambda m: setattr(_weight(m), "dtype", np.dtype(np.float16)), "声明为 float16"),
        (lambda m: m.graph.inputs.remove(_weight(m)), "配方 lm_head.weight 没有对应的权重输入"),
        (lambda m: node(m, "MoeGate").inputs.__setitem__(1, gs.Constant("c", np.zeros(12))), "没有节点消费"),
        (lambda m: m.graph.inputs.reverse(), "个输入是"),
        (lambda m: m.graph.outputs.reverse(), "输出是"),
    ],
)
def test_every_violation_is_detected(damage, says):
    module = module_of()
    check_legality(module, "capture", "portable")
    damage(module)
    with pytest.raises(DsxError) as caught:
        check_legality(module, "某个 pass", "portable")
    assert caught.value.code == "DSX-E303"
    assert says in caught.value.what
    assert caught.value.what.startswith("某个 pass 之后")


def test_scale_may_differ_between_nodes_that_share_a_body():
    module = module_of()
    _attr("MlaAttention", "scale", 0.5)(module)
    check_legality(module, "capture", "portable")


def test_many_violations_are_summarised():
    module = module_of()
    for each in module.graph.nodes:
        each.domain = "elsewhere"
    with pytest.raises(DsxError, match=r"……等 .* 处"):
        check_legality(module, "capture", "portable")


def test_listing_shows_small_constants_by_value_and_nested_bodies():
    text = graph_listing(lowered("v3", "mla+moe", "portable").proto)
    assert text.startswith("model target=portable profile=mla+moe opset=(ai.onnx 24, dsx 1)\n\n[inputs]\n")
    assert "constants/" not in text
    assert "kv_cache.0: float32[B, 1, T, 56]" in text
    assert "lm_head.weight: float32[211, 48]" in text
    assert "scale=0.1581" in text
    assert "value_float=@scale" in text
    assert "\n  body(i, go_on, y_in) -> go_on_out, y_out:\n    Reshape(i, int64(1)) -> i_1d\n" in text
    assert text.endswith("\n")
    assert text == graph_listing(lowered("v3", "mla+moe", "portable").proto)
