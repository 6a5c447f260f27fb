"""specs/export 的承诺。"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from deepseek_export.bundle import Bundle
from deepseek_export.checkpoint import Checkpoint, expected_tensors
from deepseek_export.ops.table import DOMAIN
from tests.models import VARIANTS

pytestmark = pytest.mark.contract

PROFILES = ("baseline", "mla", "moe", "mla+moe")


def feeds_for(bundle: Bundle, B: int = 2, S: int = 5, T: int = 9) -> dict[str, np.ndarray]:
    """一次 prefill 的输入。"""
    config = bundle.manifest.model
    rng = np.random.default_rng(0)
    feeds = {
        "input_ids": rng.integers(0, config.vocab_size, (B, S)),
        "past_lens": np.zeros(B, np.int64),
        "logits_positions": np.broadcast_to(np.arange(S), (B, S)).copy(),
    }
    for tensor in bundle.manifest.cache.tensors:
        for i in range(config.num_hidden_layers):
            shape = (B, tensor.heads, T, tensor.width)
            feeds[f"{tensor.name}.{i}"] = np.zeros(shape, bundle.manifest.cache.dtype)
    return feeds


def hf_logits(model, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


@pytest.mark.parametrize("profile", PROFILES)
def test_portable_bundle_runs_without_dsx(exported, saved, profile: str, tmp_path: Path):
    """EXPORT-1：portable bundle 在没有 dsx 的进程里，用普通 ONNX Runtime 跑出 transformers 的 logits。"""
    model, _ = saved("v3-yarn")
    bundle = exported("v3-yarn", profile)
    feeds = feeds_for(bundle)
    np.savez(tmp_path / "feeds.npz", **feeds)
    script = (
        "import sys, numpy as np, onnxruntime as ort\n"
        "feeds = dict(np.load(sys.argv[1]))\n"
        "options = ort.SessionOptions(); options.log_severity_level = 4\n"
        "session = ort.InferenceSession(sys.argv[2], options)\n"
        "np.save(sys.argv[3], session.run(['logits'], feeds)[0])\n"
        "assert not any(name.split('.')[0] in ('deepseek_export', 'torch') for name in sys.modules)\n"
    )
    arguments = [tmp_path / "feeds.npz", bundle.model_path, tmp_path / "logits.npy"]
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True)
    got, want = np.load(tmp_path / "logits.npy"), hf_logits(model, feeds["input_ids"])
    assert np.abs(got - want).max() < 1e-4


@pytest.mark.parametrize("profile", PROFILES)
def test_portable_bundle_runs_on_the_onnx_reference_evaluator(exported, saved, profile: str):
    """EXPORT-2：同一个文件在 onnx 参考求值器上也跑得出来，所以它只依赖 ONNX 标准。"""
    model, _ = saved("v3-yarn")
    bundle = exported("v3-yarn", profile)
    feeds = feeds_for(bundle)
    (got,) = ReferenceEvaluator(str(bundle.model_path)).run(["logits"], feeds)
    assert np.abs(got - hf_logits(model, feeds["input_ids"])).max() < 1e-4


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("profile", PROFILES)
def test_checker_and_op_counts(exported, profile: str, target: str):
    """EXPORT-3：onnx.checker 带完整形状推导通过；打开的优化每层恰好一个算子，关闭的一个 dsx 节点也没有。"""
    bundle = exported("v3-yarn", profile, target)
    onnx.checker.check_model(str(bundle.model_path), full_check=True)
    config, counts = bundle.manifest.model, bundle.manifest.graphs[0].op_counts
    mla, moe = "mla" in profile, "moe" in profile
    assert counts.get("dsx::MlaAttention", 0) == (config.num_hidden_layers if mla else 0)
    lowered = target == "ort-cpu" and moe
    assert counts.get("dsx::MoeExperts", 0) == (config.num_moe_layers if moe and not lowered else 0)
    assert counts.get("com.microsoft::MoE", 0) == (config.num_moe_layers if lowered else 0)
    if profile == "baseline":
        assert not any(name.startswith(f"{DOMAIN}::") for name in counts)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_initializers_are_the_checkpoint_tensors(exported, saved, variant: str):
    """EXPORT-4：每个检查点张量恰好用一次，initializer 名就是检查点里的名字；叠放的专家用 ``*``。"""
    if variant not in ("v3-yarn", "v3-bias-tied", "v2-lite"):
        from deepseek_export.checkpoint.recipe import weight_recipes

        recipes = weight_recipes(saved(variant)[1].config, "float32")
    else:
        recipes = exported(variant, "mla+moe").manifest.weights.recipes
    expected = expected_tensors(saved(variant)[1].config)
    used = [source for recipe in recipes.values() for source in recipe.sources]
    assert sorted(used) == sorted(expected)
    for name, recipe in recipes.items():
        if recipe.op == "copy":
            assert recipe.sources == (name,)
        elif recipe.op == "stack":
            stems = {
                source.replace(f".experts.{i}.", ".experts.*.") for i, source in enumerate(recipe.sources)
            }
            assert stems == {name}
            assert ".mlp.experts.*." in name


def test_plugin_attributes(v3_bundle: Bundle):
    """EXPORT-5：每个 dsx 节点带 plugin_namespace / plugin_version，且文件里有它的函数体。"""
    model = onnx.load(v3_bundle.model_path, load_external_data=False)
    functions = {function.name for function in model.functions if function.domain == DOMAIN}
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert {node.op_type for node in nodes} == {"MlaAttention", "MoeGate", "MoeExperts"} == functions
    for node in nodes:
        attributes = {a.name: a.s for a in node.attribute if a.type == onnx.AttributeProto.STRING}
        assert attributes["plugin_namespace"] == b"dsx"
        assert attributes["plugin_version"] == b"1"


def test_profiles_that_are_off_do_not_change_the_graph(saved, exported, tmp_path: Path):
    """PROFILE-1：关闭某项优化时的图，与其它设置无关，逐字节相同。"""
    import deepseek_export

    checkpoint = saved("v3-yarn")[1].path
    baseline = exported("v3-yarn", "baseline")
    again = deepseek_export.export(
        checkpoint, tmp_path / "again", "baseline", overrides=["fallback.on_drift=refuse"]
    )
    assert baseline.manifest.files["model.onnx"] == again.manifest.files["model.onnx"]
    naive = exported("v3-yarn", "mla", overrides=("mla.form=naive",))
    absorb = exported("v3-yarn", "mla", overrides=("mla.form=absorb",))
    main = [onnx.load(b.model_path, load_external_data=False).graph for b in (naive, absorb)]
    assert main[0] == main[1]  # 两种形式只差函数体，主图逐字节相同


def test_checkpoint_without_tokenizer_exports(exported):
    """EXPORT-7：没有 tokenizer 的检查点照样导出，用 token id 生成。"""
    import deepseek_export

    model = deepseek_export.load(exported("v3-yarn", "mla+moe").path)
    assert model.tokenizer is None
    assert len(model.generate([[1, 2, 3]], 4).token_ids[0]) == 4
    with pytest.raises(deepseek_export.DsxError) as error:
        model.generate("文本")
    assert error.value.code == "DSX-E514"


def test_source_is_never_written(saved, exported):
    """EXPORT-8：检查点目录只读不写。"""
    _, checkpoint = saved("v3-yarn")
    exported("v3-yarn", "mla+moe")
    assert Checkpoint.open(checkpoint.path).store.fingerprint() == checkpoint.store.fingerprint()
    assert not any(path.name.startswith(".") for path in checkpoint.path.iterdir())
