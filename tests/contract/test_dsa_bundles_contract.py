"""specs/dsa：bundle、索引 key 的缓存、草稿、int8 的索引 key。"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import deepseek_export
from deepseek_export.backend.contract import CACHE_KINDS
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.errors import DsxError
from deepseek_export.parity.checks import LEVELS
from deepseek_export.profile import resolve_profile
from tests.sparse_models import tokens, vars_of

pytestmark = [pytest.mark.contract, pytest.mark.heavy]


def test_index_keys_are_a_cache(exported):
    """DSA-6：自己排名的层才有 index_cache，写进 I/O 与 manifest；存取一行、复制前缀、按长度回滚都带着它。"""
    bundle = exported("glm-dsa", "mla+moe")
    cache = bundle.manifest.cache
    assert [[tensor.name for tensor in cache.of_layer(layer)] for layer in range(4)] == [
        ["kv_cache", "index_cache"],
        ["kv_cache"],
    ] * 2
    assert cache.bytes_per_token == 4 * (4 * 56 + 2 * 24)
    model = deepseek_export.load(bundle.path)
    runner = model.session.runner
    assert [t.kind for t in runner.contract.caches.tensors] == ["latent", "index", "latent"] * 1 + [
        "latent",
        "index",
        "latent",
    ]
    assert CACHE_KINDS["index_cache"] == "index"
    assert runner.contract.caches.bytes_per_token == cache.bytes_per_token
    ids = tokens(60)[0].numpy()

    def step(caches, row, past):
        feeds = {
            "input_ids": row[None],
            "past_lens": np.array([past]),
            "logits_positions": np.array([[len(row) - 1]]),
        }
        return runner.run(feeds, ("logits",), caches)["logits"].copy()

    whole = runner.new_caches(1, 64)
    step(whole, ids[:50], 0)
    want = step(whole, ids[50:], 50)
    restored = runner.new_caches(1, 64)
    restored.restore_row(0, whole.save_row(0, 50))
    assert np.array_equal(step(restored, ids[50:], 50), want)
    copied = runner.new_caches(2, 64)
    copied.restore_row(1, whole.save_row(0, 50))
    copied.copy_row(1, 0, 50)
    assert np.array_equal(step(copied.first(1), ids[50:], 50), want)
    step(whole, ids[::-1][:8].copy(), 50)  # 猜错的草稿写过的行，回滚之后被盖掉
    assert np.array_equal(step(whole, ids[50:], 50), want)


def test_stages_keep_shared_layers_with_their_indexer(exported, tmp_path: Path):
    """CLUSTER-2：沿用选择的层与排名的那一层总在一个 stage，token 不变；切不成那么多个就说至多几个。"""
    bundle = exported("glm-dsa", "mla+moe")
    made = deepseek_export.split(bundle.path, tmp_path / "two", 2)
    assert [item.layers for item in made.record.stages] == [[0, 1], [2, 3]]
    prompt = [tokens(40, seed=3)[0].tolist()]
    want = deepseek_export.load(bundle.path, 1).generate(prompt, 8, ignore_eos=True).token_ids
    with deepseek_export.load(made.path, 1) as model:
        assert model.generate(prompt, 8, ignore_eos=True).token_ids == want
    with pytest.raises(DsxError, match="DSX-E740") as caught:
        deepseek_export.split(bundle.path, tmp_path / "three", 3)
    assert caught.value.todo == "--stages 至多 2"


@pytest.mark.parametrize(
    ("variant", "target"),
    [
        ("glm-dsa", "portable"),
        ("v32", "ort-cpu"),
        pytest.param("v32", "portable", marks=pytest.mark.slow),
        pytest.param("glm-dsa", "ort-cpu", marks=pytest.mark.slow),
    ],
)
def test_bundles_equal_transformers(saved, exported, variant: str, target: str):
    """DSA-7：verify 通过；从 12 个 token 续写 64 个，越过 index_topk，与 transformers 的 greedy 逐个相同。"""
    hf = saved(variant)[0]
    bundle = exported(variant, "mla+moe", target)
    report = deepseek_export.verify(bundle.path, levels=["op", "block", "model"])
    assert report.passed, report.first_failure
    prompt = tokens(12, seed=3)
    with torch.no_grad():
        want = hf.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, pad_token_id=0
        )
    model = deepseek_export.load(bundle.path)
    got = model.generate([prompt[0].tolist()], max_new_tokens=64, ignore_eos=True)
    assert got.token_ids == [want[0, 12:].tolist()]


def test_the_mask_of_the_baseline(exported):
    """DSA-7：MLA 关闭时每头 K/V 缓存加索引缓存，选择写成遮罩，仍与 transformers 相等。"""
    bundle = exported("glm-dsa", "baseline")
    names = {tensor.name for tensor in bundle.manifest.cache.tensors}
    assert names == {"k_cache", "v_cache", "index_cache"}
    report = deepseek_export.verify(bundle.path, levels=["model"])
    assert report.passed, report.first_failure


def test_drafts_have_their_own_indexer(tmp_path: Path):
    """DSA-9：带 MTP 的小 GLM-5 导出 full，草稿与参考实现相等，起草与不起草的输出相同。"""
    path = write_checkpoint(tmp_path / "x", vars_of("glm-dsa"), dtype="float32", mtp=True)
    bundle = deepseek_export.export(path, tmp_path / "out", "full", target="ort-cpu")
    assert bundle.manifest.cache.of_layer(4)[1].name == "index_cache"
    report = deepseek_export.verify(bundle.path, levels=["block", "tokens"], steps=40)
    assert report.passed, report.first_failure


INT8_KEYS = ("dsa.index_cache_dtype=int8",)


@pytest.mark.parametrize(
    ("variant", "target", "more", "levels"),
    [
        ("glm-dsa", "ort-cpu", (), ["op", "model"]),
        pytest.param("glm-dsa", "portable", (), ["block", "tokens"], marks=pytest.mark.slow),
        pytest.param("v32", "portable", ("mla.cache_dtype=int8",), LEVELS, marks=pytest.mark.slow),
        pytest.param("v32", "ort-cpu", ("mla.cache_dtype=bfloat16",), LEVELS, marks=pytest.mark.slow),
    ],
)
def test_int8_index_keys(
    saved, tmp_path: Path, variant: str, target: str, more: tuple[str, ...], levels: list[str]
):
    """DSA-13：一行 di+3 字节，写进 manifest；verify 通过，选中的集合对没有舍入的另有一行；不开的时候图不变。"""
    path = saved(variant)[1].path
    bundle = deepseek_export.export(
        path, tmp_path / "out", "mla+moe", target=target, overrides=(*INT8_KEYS, *more)
    )
    entry = next(tensor for tensor in bundle.manifest.cache.tensors if tensor.name == "index_cache")
    assert (entry.width, entry.dtype or bundle.manifest.cache.dtype) == (24 + 3, "int8")
    report = deepseek_export.verify(bundle.path, levels=levels, steps=30)
    assert report.passed, report.first_failure
    measured = [case for case in report.cases if "选中的集合对没有舍入的" in case.name]
    assert bool(measured) == ("op" in levels)
    assert all(case.measure.calc_diff < 0.05 for case in measured)
    losses = [case for case in report.cases if case.level == "loss" and "int8 索引 key" in case.name]
    assert bool(losses) == ("model" in levels)


def test_int8_keys_are_refused_where_they_mean_nothing(saved, tmp_path: Path):
    """DSA-13：没有稀疏注意力的模型（DSX-E136）；TensorRT 的目标（DSX-E322）；transformers 的缓存（DSX-E805）。"""
    for variant, target, code in (("v3", "portable", "DSX-E136"), ("v32", "tensorrt", "DSX-E322")):
        with pytest.raises(DsxError) as caught:
            deepseek_export.export(
                saved(variant)[1].path, tmp_path / "out", "mla", target=target, overrides=INT8_KEYS
            )
        assert caught.value.code == code
    with pytest.raises(DsxError) as caught:
        deepseek_export.apply(saved("v32")[0], resolve_profile("mla", INT8_KEYS))
    assert caught.value.code == "DSX-E805"
    assert not (tmp_path / "out").exists()
