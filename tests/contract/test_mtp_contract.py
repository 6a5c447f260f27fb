"""specs/mtp 里参考实现与导出的承诺；投机解码的承诺在 test_speculative_contract.py。"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import deepseek_export
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.checkpoint.synthetic import DEMO_CONFIG, write_checkpoint
from deepseek_export.errors import DsxError
from deepseek_export.ops.spec_accept import spec_accept, spec_accept_rejection
from deepseek_export.reference import Forms, load_draft, load_reference
from tests.bundles import edit_weight, run_polygraphy, tampered

pytestmark = pytest.mark.contract

#: 奇数尺寸的小模型；DEMO_CONFIG 的 yarn 与路由保留。
SMALL = DEMO_CONFIG | {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "q_lora_rank": 36,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 12,
    "n_group": 3,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    path = tmp_path_factory.mktemp("mtp") / "ck"
    return Checkpoint.open(write_checkpoint(path, SMALL, dtype="float32", mtp=True))


@pytest.fixture(scope="module")
def transformers_models(checkpoint: Checkpoint):
    """transformers 的主模型与 MTP；它把要忽略的层号写死成 61，这里换成这个检查点的。"""
    from transformers import DeepseekV3ForCausalLM
    from transformers.modeling_layers import MtpModel

    layer = checkpoint.config.num_hidden_layers

    class Patched(DeepseekV3ForCausalLM):
        _keys_to_ignore_on_load_unexpected = (rf"model\.layers\.{layer}\.",)

    model = Patched.from_pretrained(
        checkpoint.path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    return model, MtpModel.from_pretrained(model).eval()


@torch.no_grad()
def test_draft_logits_equal_transformers(checkpoint: Checkpoint, transformers_models):
    """MTP-1：每个位置的草稿 logits 相同；各种写法（expanded、absorb、naive）都是。"""
    from transformers.cache_utils import MtpCache

    model, mtp = transformers_models
    ids = torch.randint(0, 160, (1, 41), generator=torch.Generator().manual_seed(0))
    hidden = model(ids[:, :-1], output_hidden_states=True).hidden_states[-1]
    positions = torch.arange(1, 41)[None]
    cache = MtpCache(config=model.config.get_mtp_config())
    output = mtp.forward_layer(0, hidden, positions, cache, input_ids=ids[:, 1:])
    want = mtp._project_to_logits(output)

    past, rows = torch.zeros(1, dtype=torch.int64), torch.arange(40)[None]
    for forms in (Forms("expanded", "dense"), Forms("absorb", "sparse"), Forms("naive", "sparse")):
        main = load_reference(checkpoint, forms)
        draft = load_draft(checkpoint, 0, main)
        logits, mine, _ = main(ids[:, :-1], past, rows, main.empty_caches(1, 40))
        assert (mine - hidden).abs().max() < 1e-4
        got, final, _ = draft(ids[:, 1:], mine, past, rows, main.empty_caches(1, 40)[0])
        assert (final - output).abs().max() < 1e-4
        assert (got - want).abs().max() < 1e-4
        assert logits.shape == got.shape


@torch.no_grad()
def test_first_drafts_equal_transformers_generate(checkpoint: Checkpoint, transformers_models):
    """MTP-1：transformers 的 generate(use_mtp=True) 与普通 greedy 相同，它起草的第一个 token 与参考模型相同。"""
    model, mtp = transformers_models
    ids = torch.randint(0, 160, (1, 12), generator=torch.Generator().manual_seed(1))
    plain = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    spec = model.generate(
        ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None, use_mtp=True
    )
    assert torch.equal(plain, spec)
    out = model(plain[:, :12], output_hidden_states=True)
    candidate, _, _ = mtp(
        input_ids=plain[:, 1:13],
        last_hidden_states=out.hidden_states[-1],
        attention_mask=None,
        position_ids=torch.arange(1, 13)[None],
        mtp_cache=None,
    )
    main = load_reference(checkpoint, Forms("absorb", "sparse"))
    draft = load_draft(checkpoint, 0, main)
    past, rows = torch.zeros(1, dtype=torch.int64), torch.arange(12)[None]
    _, hidden, _ = main(plain[:, :12], past, rows, main.empty_caches(1, 16))
    logits, _, _ = draft(plain[:, 1:13], hidden, past, rows, main.empty_caches(1, 16)[0])
    assert int(logits[0, -1].argmax()) == int(candidate[0, 0])


@pytest.mark.heavy
@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", ["float16", "bfloat16", "int8"])
def test_narrow_cache_verifies_with_the_draft(checkpoint: Checkpoint, tmp_path: Path, cache_dtype: str):
    """PARITY-12：草稿模型与投机解码的缓存同样窄，也四级全过。"""
    overrides = (f"mla.cache_dtype={cache_dtype}",)
    out = tmp_path / "out"
    bundle = deepseek_export.export(checkpoint.path, out, "full", target="ort-cpu", overrides=overrides)
    report = deepseek_export.verify(bundle.path, steps=24)
    assert report.passed, report.first_failure
    assert any(case.name.startswith("mtp.onnx logits") for case in report.cases)
    assert any("speculative" in case.name for case in report.cases)


def test_embedding_and_head_are_shared(checkpoint: Checkpoint):
    """MTP-1：参考模型里共用内存，bundle 里指向权重文件的同一处。"""
    main = load_reference(checkpoint, Forms("absorb", "sparse"))
    draft = load_draft(checkpoint, 0, main)
    assert draft.embed.embed_tokens.weight.data_ptr() == main.embed.embed_tokens.weight.data_ptr()
    assert draft.head.lm_head.weight.data_ptr() == main.head.lm_head.weight.data_ptr()


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory):
    return deepseek_export.export(checkpoint.path, tmp_path_factory.mktemp("full") / "out", "full")


@pytest.mark.heavy
def test_compare_covers_the_draft(bundle, tmp_path: Path):
    """PARITY-8、PARITY-11：草稿模型的每个块也比；它的权重改坏了，定位到它的节点；命令原样执行。"""
    good = deepseek_export.compare(bundle.path, blocks=["mtp.onnx"], folder=tmp_path / "good")
    assert good.passed, good.first_failure
    parts = ("embed", "eh_proj", "self_attn", "mlp", "hidden", "head")
    assert list(dict.fromkeys(row.block for row in good.cases)) == [f"mtp.onnx {part}" for part in parts]
    process = run_polygraphy(good.commands["mtp.onnx"])
    assert process.returncode == 0, process.stdout

    name = "model.layers.2.eh_proj.weight"
    bad = tampered(bundle, tmp_path, edit_weight(bundle, name, lambda w: w * 1.01, "mtp.onnx"))
    report = deepseek_export.compare(bad.path, blocks=["2"], bisect=True)
    assert {row.block for row in report.cases if not row.case.passed} == {"mtp.onnx eh_proj"}
    assert report.culprit is not None
    assert (report.culprit.value, report.culprit.nodes[-1].op) == ("mtp/combined", "MatMul")
    assert report.culprit.causes[0].startswith(f"权重 {name} 与检查点不同")


@pytest.mark.heavy
def test_bundle_has_a_draft_graph_sharing_the_weights(bundle):
    """MTP-1：mtp.onnx 的词嵌入、lm_head 与 model.onnx 指向同一个偏移；MTP 权重一个不少。"""

    def places(path: Path) -> dict[str, dict[str, str]]:
        tensors = onnx.load(path, load_external_data=False).graph.initializer
        return {t.name: {e.key: e.value for e in t.external_data} for t in tensors if t.external_data}

    (entry,) = bundle.manifest.drafts
    main, draft = places(bundle.model_path), places(bundle.path / entry.file)
    shared = {"model.embed_tokens.weight", "lm_head.weight"}
    assert main.keys() & draft.keys() == shared
    assert all(main[name] == draft[name] for name in shared)
    assert all(name.startswith("model.layers.2.") for name in draft.keys() - shared)
    assert "model.layers.2.mlp.experts.*.gate_proj.weight" in draft
    counts = bundle.manifest.drafts[0].op_counts
    assert counts["dsx::MlaAttention"] == counts["dsx::MoeExperts"] == 1
    assert bundle.manifest.main.op_counts["dsx::SpecAccept"] == 1


@pytest.mark.heavy
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_draft_numerics_are_verified(checkpoint: Checkpoint, target: str, tmp_path: Path):
    """MTP-1：dsx verify 覆盖草稿模型的块与 logits，两个目标都通过。"""
    bundle = deepseek_export.export(checkpoint.path, tmp_path / "out", "full", target=target)
    report = deepseek_export.verify(bundle.path, steps=24)
    assert report.passed, report.first_failure
    drafted = {
        (case.level, case.name.split(" ")[1]) for case in report.cases if case.name.startswith("mtp.onnx")
    }
    assert {("block", "eh_proj"), ("block", "self_attn"), ("block", "mlp"), ("model", "logits")} <= drafted


class TestSpecAccept:
    """草稿验证算子。"""

    def test_greedy_accepts_the_longest_prefix(self):
        """MTP-2：逐行与朴素实现相同；K 可以为 0。"""
        generator = torch.Generator().manual_seed(0)
        for K in range(5):
            logits = torch.randn(64, K + 1, 5, generator=generator)
            best = logits.argmax(-1)
            drafts = torch.where(torch.rand(64, K, generator=generator) < 0.6, best[:, :K], 0)
            accepted, following = spec_accept(drafts, logits)
            for b in range(64):
                n = 0
                while n < K and drafts[b, n] == best[b, n]:
                    n += 1
                assert (int(accepted[b]), int(following[b])) == (n, int(best[b, n]))

    @pytest.mark.parametrize("K", [0, 1, 3])
    def test_rejection_keeps_the_distribution(self, K: int):
        """MTP-3：第一个 token 的分布就是主模型的分布，与草稿的分布无关（卡方检验）。"""
        generator = torch.Generator().manual_seed(K)
        V, n, temperature = 4, 40_000, 0.7
        logits = torch.randn(1, K + 1, V, generator=generator).expand(n, -1, -1)
        q = torch.randn(1, K, V, generator=generator).softmax(-1).expand(n, -1, -1)
        drafts = (
            torch.multinomial(q.reshape(-1, V), 1, generator=generator).view(n, K)
            if K
            else torch.zeros(n, 0).long()
        )
        uniform = torch.rand(n, K + 1, generator=generator)
        accepted, following = spec_accept_rejection(drafts, logits, q, uniform, torch.tensor([temperature]))
        first = torch.where(accepted > 0, drafts[:, 0], following) if K else following
        counts = torch.bincount(first, minlength=V).double()
        expected = (logits[0, 0] / temperature).softmax(-1).double() * n
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert chi2 < 16.27  # 自由度 3 的 99.9% 分位；种子固定，结果确定

    def test_rejection_when_draft_equals_target_accepts_everything(self):
        """MTP-3：q 与 p 相同则全部接受。"""
        logits = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(2))
        q = logits[:, :3].softmax(-1)
        drafts = q.argmax(-1)
        accepted, _ = spec_accept_rejection(drafts, logits, q, torch.full((8, 4), 0.999), torch.ones(1))
        assert accepted.tolist() == [3] * 8


@pytest.mark.heavy
def test_unclear_requests_are_refused(checkpoint: Checkpoint, tmp_path: Path):
    """MTP-5：没有 MTP 权重、MTP 层残缺、K 超界，各有各的码。"""
    without = write_checkpoint(tmp_path / "without", SMALL, dtype="float32", mtp=False)
    config = json.loads((without / "config.json").read_text(encoding="utf-8"))
    config["num_nextn_predict_layers"] = 1  # transformers 另存的检查点就是这样
    (without / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for arguments, code in (
        ((without, tmp_path / "a", "mtp"), "DSX-E119"),
        ((checkpoint.path, tmp_path / "b", "mtp", ["mtp.num_draft_tokens=9"]), "DSX-E003"),
    ):
        source, out, profile, *rest = arguments
        with pytest.raises(DsxError) as error:
            deepseek_export.export(source, out, profile, overrides=rest[0] if rest else ())
        assert error.value.code == code
        assert not out.exists()
    deepseek_export.export(without, tmp_path / "c", "mla")

    from safetensors.numpy import load_file, save_file

    tensors = load_file(checkpoint.path / "model.safetensors")
    truncated = tmp_path / "truncated"
    truncated.mkdir()
    (truncated / "config.json").write_bytes((checkpoint.path / "config.json").read_bytes())
    del tensors["model.layers.2.eh_proj.weight"]
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()},
        truncated / "model.safetensors",
    )
    with pytest.raises(DsxError) as error:
        deepseek_export.export(truncated, tmp_path / "d", "mtp")
    assert error.value.code == "DSX-E111"


@pytest.mark.heavy
def test_several_modules_each_have_a_graph(tmp_path: Path):
    """MTP-2：两个 MTP 模块各成一张图，第二个模块的 hidden 来自第一个；校验都通过。"""
    config = SMALL | {"num_nextn_predict_layers": 2}
    path = write_checkpoint(tmp_path / "ck", config, dtype="float32", mtp=True)
    bundle = deepseek_export.export(path, tmp_path / "out", "full", overrides=["mtp.num_draft_tokens=2"])
    assert [graph.file for graph in bundle.manifest.drafts] == ["mtp.onnx", "mtp.1.onnx"]
    report = deepseek_export.verify(bundle.path, levels=["op", "block"])
    assert report.passed, report.first_failure
