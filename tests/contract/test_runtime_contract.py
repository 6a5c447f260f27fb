"""specs/runtime 的承诺，在真 bundle 上证明。"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import deepseek_export
from deepseek_export.bundle import Bundle
from deepseek_export.errors import DsxError

pytestmark = pytest.mark.contract

PROFILES = ("baseline", "mla", "moe", "mla+moe")


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_every_profile_gives_the_same_tokens(exported, target: str):
    """RUNTIME-1：基线与各项优化的 greedy 输出逐 token 相同。"""
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9, 3]]
    outputs = [
        deepseek_export.load(exported("v3-yarn", profile, target).path).generate(prompts, 40).token_ids
        for profile in PROFILES
    ]
    assert all(output == outputs[0] for output in outputs)


@pytest.mark.parametrize("profile", PROFILES)
def test_caches_are_updated_in_place(exported, profile: str):
    """RUNTIME-2：缓存原地更新。没有原地执行的 TensorScatter 会让 ONNX Runtime 打警告；一步解码后缓存地址不变、
    内容只多了新行，常驻内存的增量不随容量涨。"""
    bundle = exported("v3-yarn", profile)
    script = """
import sys, numpy as np, onnxruntime as ort
from pathlib import Path
from deepseek_export.runtime.cache import CacheBuffers, CacheSpec

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

options = ort.SessionOptions()
options.log_severity_level = 2
session = ort.InferenceSession(sys.argv[1], options)
caches = CacheBuffers(CacheSpec.from_session(session), 1, 1 << 17, 1 << 17)
for tensor in caches.spec.tensors:
    caches.array(tensor.name)[:] = 0  # 把页真正分配出来
binding = session.io_binding()
for name, value in (("input_ids", [[7]]), ("past_lens", [3]), ("logits_positions", [[0]])):
    binding.bind_cpu_input(name, np.array(value))
binding.bind_output("logits")
caches.bind(binding)
session.run_with_iobinding(binding)
before, pointers = anonymous(), [caches.value(t.name).data_ptr() for t in caches.spec.tensors]
for _ in range(3):
    session.run_with_iobinding(binding)
assert pointers == [caches.value(t.name).data_ptr() for t in caches.spec.tensors]
assert anonymous() - before < caches.nbytes / 4, (anonymous() - before, caches.nbytes)
for tensor in caches.spec.tensors:
    rows = np.abs(caches.array(tensor.name)).sum((0, 1, 3)).nonzero()[0]
    assert rows.tolist() == [3], rows
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(bundle.model_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "in-place optimization not activated" not in done.stderr


def test_ragged_batch_equals_each_sequence_alone(v3_bundle: Bundle):
    """RUNTIME-3：长度不等的 batch 与每条单独跑的结果相同，分块大小不影响结果。"""
    model = deepseek_export.load(v3_bundle.path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 211, n).tolist() for n in (1, 17, 40)]
    together = model.generator.logits(prompts)
    for i, prompt in enumerate(prompts):
        for chunk in (None, 1, 6):
            alone = model.generator.logits([prompt], chunk=chunk)[0]
            assert np.abs(alone - together[i]).max() < 1e-4


def test_capacity_grows_in_buckets_without_changing_tokens(v3_bundle: Bundle):
    """RUNTIME-4：缓存容量分档增长，跨档前后输出不变；到 max_position_embeddings 为止，更长的 prompt 拒绝。"""
    model = deepseek_export.load(v3_bundle.path)
    limit = v3_bundle.manifest.model.max_position_embeddings
    prompt = np.random.default_rng(1).integers(0, 211, 250).tolist()
    grown = model.generate([prompt], 20).token_ids[0]  # 跨过 256
    roomy = model.generate([prompt, prompt * 2], 20).token_ids[0]  # 一开始就是更大的档
    assert grown == roomy
    result = model.generate([[1] * (limit - 2)], 10)
    assert result.finish_reasons == ["length"]
    assert len(result.token_ids[0]) <= 3
    with pytest.raises(DsxError) as error:
        model.generate([[1] * (limit + 1)], 1)
    assert error.value.code == "DSX-E511"


def test_sampling_is_seeded_and_independent_of_the_batch(v3_bundle: Bundle):
    """RUNTIME-5：同一种子结果相同；temperature=0 就是 greedy。"""
    model = deepseek_export.load(v3_bundle.path)
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 7}
    first = model.generate([[1, 2, 3], [4, 5]], 12, **options).token_ids
    assert first == model.generate([[1, 2, 3], [4, 5]], 12, **options).token_ids
    assert first[0] == model.generate([[1, 2, 3]], 12, **options).token_ids[0]
    assert first != model.generate([[1, 2, 3], [4, 5]], 12, **{**options, "seed": 8}).token_ids
    greedy = model.generate([[1, 2, 3]], 12).token_ids
    assert greedy == model.generate([[1, 2, 3]], 12, temperature=1.0, top_k=1, seed=0).token_ids
