"""reference/：每种结构变体对照 transformers 在同一份检查点上的结果。"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from deepseek_export.checkpoint import Checkpoint
from deepseek_export.reference import Forms, ReferenceModel, cache_tensors, load_reference
from deepseek_export.reference.mla import MultiheadLatentAttention, RMSNorm
from deepseek_export.reference.moe import Gate
from tests.models import ODD, TOLERANCE, VARIANTS, YARN, build_model, distance, save_checkpoint

pytestmark = pytest.mark.unit

#: logits 的最大绝对误差；实测约 5e-6（logits 标准差约 1）。
LOGITS = TOLERANCE[torch.float32]

AS_OPS = Forms("auto", "sparse", as_ops=True)
ALL_FORMS = [
    Forms(attention, moe)
    for attention, moe in itertools.product(("expanded", "absorb", "naive", "auto"), ("dense", "sparse"))
]
ALL_FORMS += [AS_OPS, Forms("auto", "dense", as_ops=True), Forms("expanded", "sparse", as_ops=True)]
TWO_FORMS = [AS_OPS, Forms("expanded", "dense")]
CASES = [
    pytest.param(variant, forms, id=f"{variant}-{forms.attention}-{forms.moe}{'-ops' * forms.as_ops}")
    for variant in VARIANTS
    for forms in (ALL_FORMS if variant in ("v3-yarn", "v2-lite") else TWO_FORMS)
]


@pytest.fixture(scope="module")
def oracle(saved):
    """变体名 → (input_ids [2, 90], transformers 的 logits [2, 90, V])，各算一次。"""
    cache: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def compute(variant: str):
        if variant not in cache:
            ids = torch.randint(0, ODD["vocab_size"], (2, 90), generator=torch.Generator().manual_seed(7))
            with torch.no_grad():
                cache[variant] = (ids, saved(variant)[0](ids).logits)
        return cache[variant]

    return compute


def run(model: ReferenceModel, ids, past, caches, positions=None):
    """一次前向；缺省要全部位置的 logits。"""
    if positions is None:
        positions = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
    return model(ids, torch.as_tensor(past), positions, caches)


def run_chunks(model: ReferenceModel, ids, sizes, capacity=128):
    """分几次前向，拼起各次的 logits。"""
    caches = model.empty_caches(ids.shape[0], capacity)
    parts, start = [], 0
    for size in sizes:
        logits, _, caches = run(model, ids[:, start : start + size], [start] * ids.shape[0], caches)
        parts.append(logits)
        start += size
    return torch.cat(parts, 1)


@pytest.mark.parametrize(("variant", "forms"), CASES)
def test_logits_equal_transformers(saved, oracle, variant, forms):
    """一次 prefill、分块、逐 token 三种走法；90 个位置超过 yarn 的原始长度 64。"""
    model = load_reference(saved(variant)[1], forms)
    ids, want = oracle(variant)
    assert (run_chunks(model, ids, [90]) - want).abs().max() < LOGITS
    assert (run_chunks(model, ids, [40, 7, 43]) - want).abs().max() < LOGITS
    assert (run_chunks(model, ids[:, :69], [66, 1, 1, 1]) - want[:, :69]).abs().max() < LOGITS


@pytest.mark.parametrize("variant", VARIANTS)
def test_token_by_token_from_an_empty_cache(saved, oracle, variant):
    """从空缓存起每次一个 token。"""
    model = load_reference(saved(variant)[1], Forms("auto", "sparse"))
    ids, want = oracle(variant)
    assert (run_chunks(model, ids[:, :12], [1] * 12, capacity=12) - want[:, :12]).abs().max() < LOGITS


@pytest.mark.parametrize("forms", TWO_FORMS, ids=["op", "expanded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_unequal_rows_equal_each_row_alone(saved, variant, forms):
    """右侧填充的批：每行与单独运行相同，填充的 token 之后会被覆盖、不被读到。"""
    model = load_reference(saved(variant)[1], forms)
    g = torch.Generator().manual_seed(1)
    ids, more = torch.randint(0, 211, (3, 20), generator=g), torch.randint(0, 211, (3, 2), generator=g)
    lengths = torch.tensor([20, 1, 7])
    last = (lengths - 1)[:, None]
    first, _, caches = run(model, ids, [0, 0, 0], model.empty_caches(3, 24), last)
    second, _, _ = run(model, more, lengths, caches)
    for b, n in enumerate(lengths.tolist()):
        row = torch.cat([ids[b : b + 1, :n], more[b : b + 1]], 1)
        alone = run_chunks(model, row, [n + 2])
        assert (first[b] - alone[0, n - 1]).abs().max() < LOGITS
        assert (second[b] - alone[0, n:]).abs().max() < LOGITS


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_text_equals_generate(saved, variant):
    """贪心 32 个 token 与 transformers 的 generate 逐个相同。"""
    hf, checkpoint = saved(variant)
    model = load_reference(checkpoint, AS_OPS)
    prompt = torch.randint(0, 211, (1, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        want = hf.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False, pad_token_id=0
        )
    caches, text, new = model.empty_caches(1, 48), prompt, prompt
    for _ in range(32):
        past = text.shape[1] - new.shape[1]
        logits, _, caches = run(model, new, [past], caches, torch.tensor([[new.shape[1] - 1]]))
        new = logits[:, -1].argmax(-1, keepdim=True)
        text = torch.cat([text, new], 1)
    assert text.tolist() == want.tolist()


def test_logits_positions_and_hidden(saved, oracle):
    """logits 只在指定的行（可乱序、可重复）；hidden 是最终 norm 之后的全部行。"""
    hf, checkpoint = saved("v3-yarn")
    model = load_reference(checkpoint, AS_OPS)
    ids, want = oracle("v3-yarn")
    positions = torch.tensor([[89, 0, 3], [5, 5, 88]])
    logits, hidden, _ = run(model, ids, [0, 0], model.empty_caches(2, 90), positions)
    assert logits.shape == (2, 3, 211)
    for b in range(2):
        assert (logits[b] - want[b, positions[b]]).abs().max() < LOGITS
    with torch.no_grad():
        assert distance(hidden, hf.model(ids).last_hidden_state) < LOGITS


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("mscales", [(1.0, 1.0), (0.707, 1.0), (None, None)])
@pytest.mark.parametrize("variant", ["v3", "v2-greedy"])
def test_yarn_scales(tmp_path, variant, mscales, truncate):
    """yarn 的 mscale 两处生效：cos/sin 与 softmax scale；两者不等、缺省、不截断都对。"""
    rope = {key: value for key, value in YARN.items() if not key.startswith("mscale")} | {
        "truncate": truncate
    }
    for key, value in zip(("mscale", "mscale_all_dim"), mscales, strict=True):
        if value is not None:
            rope[key] = value
    hf = build_model(variant, rope_parameters=rope, num_hidden_layers=1)
    model = load_reference(Checkpoint.open(save_checkpoint(hf, tmp_path)), Forms("auto", "sparse"))
    ids = torch.randint(0, 211, (1, 100), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = hf(ids).logits
    assert (run_chunks(model, ids, [100]) - want).abs().max() < LOGITS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["v3-yarn", "v2-bias-tied"])
def test_half_precision_and_sharded_checkpoints(tmp_path, variant, dtype):
    """半精度、分片的检查点装成 float32 后与 transformers 装的相同。"""
    save_checkpoint(build_model(variant), tmp_path, dtype=dtype, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    model = load_reference(Checkpoint.open(tmp_path), AS_OPS)
    assert torch.equal(model.embed.embed_tokens.weight, hf.model.embed_tokens.weight)
    assert torch.equal(model.layers[1].mlp.experts.down_proj.weight, hf.model.layers[1].mlp.experts.down_proj)
    ids = torch.randint(0, 211, (1, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = hf(ids).logits
    assert (run_chunks(model, ids, [20]) - want).abs().max() < LOGITS


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_model(saved, oracle, dtype):
    """半精度模型：router 保持 float32；结果接近 float32（全 dense，没有路由翻转）。"""
    model = load_reference(saved("v3-yarn")[1], AS_OPS, dtype)
    for module in model.modules():
        want = torch.float32 if isinstance(module, Gate) else getattr(torch, dtype)
        assert all(p.dtype == want for p in module.parameters(recurse=False))
    model = load_reference(saved("v3-all-dense")[1], AS_OPS, dtype)
    ids, want = oracle("v3-all-dense")
    logits = run_chunks(model, ids, [90]).float()
    assert logits.isfinite().all()
    cosine = nn.functional.cosine_similarity(logits.flatten(), want.flatten(), dim=0)
    assert cosine > (0.9999 if dtype == "float16" else 0.999)


def test_latent_norms_ignore_the_config_eps(tmp_path):
    """q_a / kv_a 的 RMSNorm 用 1e-6 而不是 config.rms_norm_eps；用错了本测试会失败。"""
    hf = build_model("v3-yarn", rms_norm_eps=1e-2)
    checkpoint = Checkpoint.open(save_checkpoint(hf, tmp_path))
    ids = torch.randint(0, 211, (1, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = hf(ids).logits
    model = load_reference(checkpoint, AS_OPS)
    assert (run_chunks(model, ids, [40]) - want).abs().max() < LOGITS
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        wrong = load_reference(checkpoint, AS_OPS)
        for layer in wrong.layers:
            assert getattr(layer.self_attn, name).eps == 1e-6
            getattr(layer.self_attn, name).eps = 1e-2
        assert (run_chunks(wrong, ids, [40]) - want).abs().max() > 100 * LOGITS, name
    others = {m.eps for n, m in model.named_modules() if isinstance(m, RMSNorm) and "_a_layernorm" not in n}
    assert others == {1e-2}


def test_tied_head_shares_memory(saved):
    """权重绑定时输出头与词嵌入是同一块内存，不多占一份。"""
    model = load_reference(saved("v3-bias-tied")[1], AS_OPS)
    assert model.head.lm_head.weight.data_ptr() == model.embed.embed_tokens.weight.data_ptr()


def test_loaded_model_needs_no_gradient(saved):
    """eval 模式、不求梯度、没有 meta 参数。"""
    model = load_reference(saved("v2-lite")[1], Forms("expanded", "dense"))
    assert not model.training
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_cache_tensors(saved):
    """潜缓存与展开缓存的张量名和宽度；empty_caches 的形状与 dtype。"""
    config = saved("v3")[1].config

    def shapes(config, forms, dtype, layer=0):
        found = cache_tensors(config, forms, dtype, torch.float32, layer)
        return [(tensor.name, tensor.heads, tensor.width, tensor.dtype) for tensor in found]

    f32, int8 = torch.float32, torch.int8
    assert shapes(config, AS_OPS, f32) == [("kv_cache", 1, 40 + 16, f32)]
    assert shapes(config, AS_OPS, int8) == [("kv_cache", 1, 40 + 2 * 16 + 6, int8)]
    expanded = Forms("expanded", "dense")
    assert shapes(config, expanded, f32) == [("k_cache", 6, 24 + 16, f32), ("v_cache", 6, 20, f32)]
    # 沿用前一层的没有索引 key；潜缓存是 int8 的，索引 key 仍是浮点的，除非另说。
    sparse = saved("glm-dsa")[1].config
    assert [len(shapes(sparse, AS_OPS, f32, layer)) for layer in range(4)] == [2, 1, 2, 1]
    assert shapes(sparse, AS_OPS, int8)[1] == ("index_cache", 1, 24, f32)
    packed = Forms("absorb", "sparse", index_int8=True)
    assert shapes(sparse, packed, f32) == [("kv_cache", 1, 40 + 16, f32), ("index_cache", 1, 24 + 3, int8)]
    caches = load_reference(saved("v3")[1], expanded).empty_caches(2, 5, torch.float16)
    assert [tuple(t.shape) for t in caches[0]] == [(2, 6, 5, 40), (2, 6, 5, 20)]
    assert len(caches) == 3
    assert not any(t.any() for layer in caches for t in layer)
    assert caches[0][0].dtype == torch.float16


def test_input_caches_are_left_alone(saved):
    """eager 参考实现不改传入的缓存。"""
    model = load_reference(saved("v3")[1], AS_OPS)
    caches = model.empty_caches(1, 8)
    run(model, torch.tensor([[1, 2, 3]]), [0], caches)
    assert not any(t.any() for layer in caches for t in layer)


def test_forms_follow_the_profile():
    """参考用方案里的算法；捕获把打开的优化写成算子，与算法无关。"""
    from deepseek_export.profile import resolve_profile

    full = resolve_profile("mla+moe", ["mla.form=absorb"])
    assert Forms.for_capture(full) == AS_OPS
    assert Forms.for_reference(full) == Forms("absorb", "sparse")
    off = resolve_profile("baseline")
    assert Forms.for_capture(off) == dataclasses.replace(Forms.for_reference(off), as_ops=True)
    assert Forms.for_reference(off) == Forms("expanded", "dense")


def test_attention_parameters_per_variant(saved):
    """attention_bias 只给 q_a、kv_a、o 加 bias；没有 q_lora 时是单个 q_proj。"""
    names = {
        variant: {
            name
            for name, _ in MultiheadLatentAttention(saved(variant)[1].config, "op").named_parameters()
            if "norm" not in name
        }
        for variant in ("v3-bias-tied", "v3-no-q-lora")
    }
    biases = {name for name in names["v3-bias-tied"] if name.endswith("bias")}
    assert biases == {"q_a_proj.bias", "kv_a_proj_with_mqa.bias", "o_proj.bias"}
    assert "q_proj.weight" in names["v3-no-q-lora"]
