"""specs/export 里与真实规模有关的承诺：FP8 检查点、按引用的权重、流式打包。"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import deepseek_export
from tests.integration.cli import TINY
from tests.models import fp8_twins

pytestmark = pytest.mark.contract

FP8 = {
    **TINY,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [12, 20],
    },
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> tuple[Path, Path]:
    """FP8 检查点与它的 float32 孪生。"""
    return fp8_twins(tmp_path_factory.mktemp("twins"), FP8)


@pytest.fixture(scope="module")
def twin_bundles(twins, tmp_path_factory):
    """两者的 ``mla+moe`` bundle。"""
    out = tmp_path_factory.mktemp("twin-bundles")
    return [deepseek_export.export(path, out / path.name, "mla+moe") for path in twins]


def prefill_logits(bundle_path: Path, ids: list[int]) -> np.ndarray:
    """一次 prefill 的全部 logits。"""
    model = deepseek_export.load(bundle_path, threads=1)
    caches = model.session.new_caches(1, len(ids))
    positions = np.arange(len(ids))[None]
    return model.session.run(np.array([ids]), np.zeros(1, np.int64), positions, caches).copy()


def test_fp8_checkpoint_and_its_twin_give_the_same_logits(twin_bundles):
    """EXPORT-20：FP8 检查点与反量化的孪生，图、权重、logits 逐位相同；manifest 写明哪些配方要反量化。"""
    fp8, twin = twin_bundles
    for name in ("model.onnx", "weights/model.safetensors"):
        assert fp8.manifest.files[name] == twin.manifest.files[name]
    ids = list(range(3, 20))
    assert np.array_equal(prefill_logits(fp8.path, ids), prefill_logits(twin.path, ids))
    recipes = fp8.manifest.weights.recipes
    assert recipes["model.layers.0.self_attn.o_proj.weight"].block_size == (12, 20)
    assert recipes["model.layers.1.mlp.experts.*.up_proj.weight"].block_size == (12, 20)
    assert recipes["model.embed_tokens.weight"].block_size is None
    assert {r.block_size for r in twin.manifest.weights.recipes.values()} == {None}


def test_fp8_bundle_equals_transformers(twin_bundles):
    """EXPORT-20：以 transformers 为基准，FP8 检查点导出的 bundle 在各层级都校验通过。"""
    report = deepseek_export.verify(twin_bundles[0].path, steps=8)
    assert report.first_failure is None
    assert report.oracle.startswith("transformers")
