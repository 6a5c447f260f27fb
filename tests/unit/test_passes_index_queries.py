"""SkipIndexQueriesPass：名额够的一步不算索引器的 query，要排名的一步一位不变。"""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from deepseek_export.ops.table import LIGHTNING_INDEXER
from deepseek_export.passes.base import GraphModule
from deepseek_export.passes.bound_mla_cache import BoundMlaCachePass
from deepseek_export.passes.fold_reshape_shapes import FoldReshapeShapesPass
from deepseek_export.passes.skip_index_queries import SkipIndexQueriesPass
from deepseek_export.passes.split_pairs import SplitPairsPass
from tests.captured import captured_graph, model_feeds
from tests.models import ort_session

pytestmark = pytest.mark.unit

#: 变体 → 自己排名的层有几个；名额都是 24 个。
INDEXERS = {"v32": 3, "glm-dsa": 2}
TOPK = 24


def run(module: GraphModule, checkpoint, S: int, past: list[int], T: int) -> dict[str, np.ndarray]:
    """全部输出，另有各个索引器的 ``q``、``w``（名字换成 ``q.0`` 之类）。"""
    rng, vocab = np.random.default_rng(S), module.config.vocab_size
    ids = rng.integers(0, vocab, (len(past), S))
    feeds = model_feeds(
        module, checkpoint, ids, past, T, lambda shape: rng.standard_normal(shape, dtype=np.float32)
    )
    proto, shown = module.to_proto(), {}
    for i, node in enumerate(module.find(LIGHTNING_INDEXER.name)):
        for port, tensor in zip("qw", node.inputs, strict=False):
            shown[tensor.name] = f"{port}.{i}"
            proto.graph.output.append(onnx.helper.make_tensor_value_info(tensor.name, 1, None))
    names = [output.name for output in proto.graph.output]
    results = ort_session(proto).run(names, feeds)
    return {shown.get(name, name): value for name, value in zip(names, results, strict=True)}


@pytest.mark.parametrize("variant", INDEXERS)
@pytest.mark.parametrize(
    ("by", "S", "past", "T", "ranks"),
    [
        ("length", 3, [0, 21], 64, False),
        ("length", 1, [3, 23], 64, False),
        ("length", 3, [0, 22], 64, True),
        ("length", 1, [40], 64, True),
        ("capacity", 3, [0, 21], 24, False),
        ("capacity", 3, [0, 3], 25, True),
    ],
)
def test_queries_are_computed_only_to_rank(saved, variant, by, S, past, T, ranks):
    """DSA-2：名额够时 ``q``、``w`` 没有行，不够时都在；logits 与缓存都一位不变。两种流水线里的样子都试。"""
    module, checkpoint = captured_graph(variant), saved(variant)[1]
    if by == "length":
        for rewrite in (BoundMlaCachePass(), FoldReshapeShapesPass(), SplitPairsPass()):
            rewrite(module)
    want = run(module, checkpoint, S, past, T)
    assert SkipIndexQueriesPass(by)(module).count == INDEXERS[variant]
    got = run(module, checkpoint, S, past, T)
    assert got.keys() == want.keys()
    for name, value in got.items():
        if name[:2] in ("q.", "w."):
            assert value.shape[1] == (S if ranks else 0), name
            value, want[name] = (value, want[name]) if ranks else (0, 0)
        np.testing.assert_array_equal(value, want[name], err_msg=name)
    assert not SkipIndexQueriesPass(by)(module).changed


def test_models_without_an_indexer_are_left_alone():
    """情形 2：没有索引器。"""
    module = captured_graph("v3")
    assert not SkipIndexQueriesPass("length")(module).changed
