"""specs/runtime 的承诺，在真 bundle 上证明。"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import deepseek_export
from deepseek_export.bundle import Bundle
from deepseek_export.errors import DsxError
from deepseek_export.integration.causal_lm import DsxForCausalLM
from tests.bundles import tampered

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
from deepseek_export.backend.contract import CacheSpec
from deepseek_export.backend.ort.caches import OrtCaches
from deepseek_export.backend.ort.values import port_of

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

options = ort.SessionOptions()
options.log_severity_level = 2
session = ort.InferenceSession(sys.argv[1], options)
spec = CacheSpec.of(map(port_of, session.get_inputs()), map(port_of, session.get_outputs()))
caches = OrtCaches.allocate(spec, 1, 1 << 17, 1 << 17)
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


@pytest.mark.parametrize("eos", [(138, 200), (200, 149), (138,)])
def test_stops_where_transformers_stops(v3_bundle: Bundle, saved, tmp_path: Path, eos: tuple[int, ...]):
    """RUNTIME-6：结束符取自 generation_config.json（整数或列表），不是 config.json 的；DsxForCausalLM 也一样。"""
    text = json.dumps({"eos_token_id": eos[0] if len(eos) == 1 else eos})
    checkpoint = shutil.copytree(saved("v3-yarn")[1].path, tmp_path / "checkpoint")
    (checkpoint / "generation_config.json").write_text(text)
    path = tampered(v3_bundle, tmp_path, lambda folder: _write(folder / "generation_config.json", text)).path
    prompt = torch.tensor([[3, 5, 7]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = AutoModelForCausalLM.from_pretrained(checkpoint).eval().generate(prompt, **options)[0, 3:].tolist()
    assert len(want) < 8
    result = deepseek_export.load(path).generate(prompt.tolist(), 8)
    assert (result.token_ids, result.finish_reasons) == ([want], ["eos"])
    assert DsxForCausalLM.from_pretrained(path).generate(prompt, **options)[0, 3:].tolist() == want


@pytest.mark.parametrize(
    "text",
    ["{", "[]", *(f'{{"eos_token_id": {eos}}}' for eos in ('"1"', "true", "[]", "[1, 211]", "-1", "1.0"))],
)
def test_bad_stop_tokens_are_refused(v3_bundle: Bundle, saved, tmp_path: Path, text: str):
    """RUNTIME-6：坏的 generation_config.json 在导出与加载时按码拒绝。"""
    path = tampered(v3_bundle, tmp_path, lambda folder: _write(folder / "generation_config.json", text)).path
    checkpoint = shutil.copytree(saved("v3-yarn")[1].path, tmp_path / "checkpoint")
    _write(checkpoint / "generation_config.json", text)
    for call in (
        lambda: deepseek_export.load(path),
        lambda: DsxForCausalLM.from_pretrained(path),
        lambda: deepseek_export.export(checkpoint, tmp_path / "out", "mla+moe"),
    ):
        with pytest.raises(DsxError) as error:
            call()
        assert error.value.code == "DSX-E121"
        assert "generation_config.json" in error.value.what


def test_without_a_generation_config_the_model_config_decides(v3_bundle: Bundle, tmp_path: Path):
    """RUNTIME-6：没有写 eos_token_id 才看 config.json 的；它超出词表同样拒绝。"""

    def stops_at(eos: int) -> Path:
        def change(folder: Path) -> None:
            _write(folder / "generation_config.json", "{}")
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            manifest["model"]["eos_token_ids"] = [eos]
            _write(folder / "manifest.json", json.dumps(manifest))
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            _write(folder / "config.json", json.dumps(config | {"eos_token_id": eos}))

        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        return tampered(v3_bundle, tmp_path, change).path

    assert deepseek_export.load(stops_at(138)).generate([[3, 5, 7]], 8).token_ids == [[116, 149, 138]]
    with pytest.raises(DsxError) as error:
        deepseek_export.load(stops_at(211))
    assert error.value.code == "DSX-E121"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def test_what_a_long_prompt_used_goes_back(trained_bundle):
    """RUNTIME-16：一段长提示词之后，进程的匿名内存比它算的时候少得多。"""
    script = """
import sys
from pathlib import Path
import numpy as np
from deepseek_export import api

def anonymous(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

session = api.load(sys.argv[1], 1).session
caches = session.new_caches(1, 2048)
run = lambda tokens: session.run(np.zeros((1, tokens), np.int64), np.array([0]), np.array([[0]]), caches)
run(8)
before, mapped = anonymous("RssAnon"), anonymous("RssFile")
run(2000)
print(anonymous("RssAnon") - before, anonymous("VmHWM") - mapped - before)
"""
    environment = os.environ | {"DSX_CPU_LIBRARY": "off"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(trained_bundle)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    kept, peak = map(int, done.stdout.split())
    assert peak > 1 << 24, "这段提示词用不了多少，看不出来"
    assert kept < peak / 2
