"""``dsx bench`` 的读速：一步至少读多少，与 ``dsx plan`` 是同一份算术；探针读的就是那么多。"""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_export import api
from deepseek_export.benchmark.reading import MemoryReader, open_reader, step_bytes
from deepseek_export.bundle import Bundle
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.cpu_library import OFF
from deepseek_export.plan.plan import make_plan
from deepseek_export.plan.shape import ModelShape
from deepseek_export.plan.sized import SizedModel

pytestmark = [pytest.mark.unit, pytest.mark.heavy]


def test_a_step_reads_what_plan_says(exported, saved):
    """CPU-30：权重是 ``dsx plan`` 的各部分、同一个算法；缓存是每行看得见的 token。"""
    bundle = exported("v3-yarn", "mla+moe")
    model = SizedModel.open(saved("v3-yarn")[1].path, bundle.manifest.profile)
    parts, per_token = model.parts("float32"), bundle.manifest.cache.bytes_per_token
    for batch in (1, 3):
        found = step_bytes([bundle.manifest], batch, 20)
        assert found.weights == round(model.shape.weights_read(parts, batch))
        assert found.cache == batch * 20 * per_token
        assert found.total == found.weights + found.cache
    assert (
        make_plan(saved("v3-yarn")[1].path, bundle.manifest.profile).weight_bytes["float32"] > found.weights
    )


def test_more_rows_read_more_experts_and_never_more_than_all(exported):
    """CPU-30：行多了命中的专家多，封顶是全部；不稀疏的每步全读。"""
    sparse, dense = exported("v3-yarn", "mla+moe"), exported("v3-yarn", "mla")
    rows = [step_bytes([sparse.manifest], batch, 1).weights for batch in (1, 2, 64)]
    assert rows == sorted(rows)
    assert rows[0] < rows[1]
    everything = step_bytes([dense.manifest], 1, 1).weights
    assert rows[-1] == pytest.approx(everything, rel=0.01)
    assert step_bytes([dense.manifest], 64, 1).weights == everything


def test_the_draft_is_not_read(tmp_path):
    """CPU-30：带草稿模型的 bundle，主模型的一步读的与不带的相同；切成 stage 也相同。"""
    found = {}
    for profile in ("mla+moe", "full"):
        bundle = api.export(CHECKPOINT, tmp_path / profile, profile, target="ort-cpu")
        found[profile] = step_bytes([bundle.manifest], 2, 30)
    assert found["full"] == found["mla+moe"]
    stages = api.split(tmp_path / "mla+moe", tmp_path / "stages", 2).directories
    manifests = [Bundle.open(directory).manifest for directory in stages]
    assert len(manifests) == 2
    assert step_bytes(manifests, 2, 30) == found["full"]


def test_sparse_attention_reads_the_chosen_rows_and_every_index_key(exported):
    """CPU-30：名额之内读看得见的全部；越过之后潜向量只读名额那么多，索引 key 仍全读。"""
    manifest = exported("v32", "mla+moe").manifest
    shape = ModelShape.build(manifest.model, manifest.profile, 0)
    assert manifest.model.indexer is not None
    topk = manifest.model.indexer.topk
    assert [shape.rows_read(context) for context in (topk - 1, topk, topk + 9)] == [topk - 1, topk, topk]
    inside, at, beyond = (step_bytes([manifest], 1, context).cache for context in (topk - 1, topk, topk + 9))
    index = next(tensor for tensor in manifest.cache.tensors if tensor.layers is not None)
    assert index.layers is not None
    assert at - inside == manifest.cache.bytes_per_token
    assert beyond - at == 9 * 4 * index.heads * index.width * len(index.layers)


def test_the_probe_reads_all_of_its_memory(monkeypatch, library):
    """CPU-30：探针的内存有界，每一块都读到、只读一遍；离开时放掉。"""
    monkeypatch.setattr("deepseek_export.benchmark.reading.memory_bytes", lambda: 1 << 28)
    read = library.memory_reader()
    words = np.arange(1, 97, dtype=np.uint64)
    assert read(words.ctypes.data, words.nbytes) == np.bitwise_xor.reduce(words)
    assert read(words.ctypes.data, 0) == 0
    with MemoryReader(read, 2) as reader:
        assert reader.nbytes == sum(chunk.nbytes for chunk in reader.chunks) == 1 << 25
        assert len({chunk.ctypes.data for chunk in reader.chunks}) == len(reader.chunks) > 1
        assert reader.rate() > 0
    assert reader.chunks == ()


def test_without_the_library_the_rate_is_unknown(monkeypatch):
    """CPU-30：没有算子库就说不知道，不用慢的代替。"""
    monkeypatch.setenv("DSX_CPU_LIBRARY", OFF)
    assert open_reader(1) is None
