"""specs/parity 的 PARITY-13：``dsx verify`` 要比什么是一个纯函数，这里逐行列出。"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from deepseek_export.backend.base import Limits
from deepseek_export.bundle.manifest import CacheEntry, GraphEntry, Manifest, QuantizationEntry
from deepseek_export.errors import DsxError
from deepseek_export.parity.checks import LEVELS, Check, Level, checks, requested
from deepseek_export.parity.tolerances import tolerance
from deepseek_export.profile import resolve_profile
from deepseek_export.records import OpSite

pytestmark = pytest.mark.contract

LENGTHS = (29, 16, 5)


def manifest(
    dtype: str = "float32",
    cache: str = "",
    quant: str = "",
    target: str = "portable",
    profile: str = "full",
    drafts: int = 0,
    verify: str = "greedy",
    ops: bool = True,
) -> Manifest:
    """只填 ``checks`` 看得到的：三层（第 0 层 dense）的主模型与 ``drafts`` 个草稿模型。"""

    def graph(file: str, role: str, layers: range) -> GraphEntry:
        names = [(i, op) for i in layers for op in ("MlaAttention", "MoeGate", "MoeExperts")]
        sites = [OpSite(i, op, (), ()) for i, op in names if i or op == "MlaAttention"]
        return GraphEntry.model_construct(file=file, role=role, sites=sites if ops else [])

    graphs = [graph("model.onnx", "main", range(3))]
    graphs += [graph(f"mtp{i}.onnx", "draft", range(3 + i, 4 + i)) for i in range(drafts)]
    return Manifest.model_construct(
        target=target,
        dtype=dtype,
        profile=resolve_profile(profile, [f"mtp.verify={verify}"]),
        model=SimpleNamespace(num_hidden_layers=3, indexer=None),
        graphs=graphs,
        cache=CacheEntry.model_construct(dtype=cache or dtype),
        quantization=QuantizationEntry.model_construct(kind=quant) if quant else None,
    )


def plan(
    levels: Sequence[Level] = LEVELS, limits: Limits | None = None, attention: Any = "", **made: Any
) -> list[Check]:
    found = manifest(**made)
    return checks(found, limits or Limits(512), levels, LENGTHS, attention or found.dtype)


def shown(check: Check) -> str:
    """``层级 图 与谁比 容差``；不比的写 ``层级 图 不比``。"""
    if check.skipped:
        return f"{check.level} {check.graph} 不比"
    keys = dict.fromkeys(":".join(filter(None, key)) for key in check.keys)
    return f"{check.level} {check.graph} {check.against} {' '.join(keys)}"


OP, BLOCK = "op model.onnx eager op:float32", "block model.onnx reference block:float32"
MODEL, TOKENS = "model model.onnx oracle logits:float32", "tokens model.onnx oracle logits:float32"
ROUNDED = "{} model.onnx rounded {}"
ACTIVATIONS = "activations model.onnx reference "

TABLE: list[tuple[str, dict[str, Any], list[str]]] = [
    ("float32", {}, [OP, BLOCK, MODEL, TOKENS]),
    ("one level", {"levels": ("block",)}, [BLOCK]),
    (
        "float16: the activations first, an overflow makes everything after it NaN",
        {"dtype": "float16"},
        [ACTIVATIONS, *(s.replace("32", "16") for s in (OP, BLOCK, MODEL, TOKENS))],
    ),
    (
        "float16, tokens only: no activations",
        {"dtype": "float16", "levels": ("tokens",)},
        [TOKENS.replace("32", "16")],
    ),
    (
        "drafts: block and logits of each, one after the other",
        {"drafts": 2, "levels": ("block", "model")},
        [
            BLOCK,
            *(
                line
                for i in range(2)
                for line in (
                    f"block mtp{i}.onnx reference block:float32",
                    f"model mtp{i}.onnx reference logits:float32",
                )
            ),
            MODEL,
        ],
    ),
    (
        "narrow cache: the reference rounds too, the loss is against what does not",
        {"cache": "float16"},
        [
            OP,
            "block model.onnx reference narrow_cache:float16 block:float32",
            ROUNDED.format("model", "logits_narrow_cache:float16"),
            "loss model.onnx oracle cache_loss:float16",
            ROUNDED.format("tokens", "logits_narrow_cache:float16"),
        ],
    ),
    (
        "narrow cache, tokens only: no loss",
        {"cache": "int8", "levels": ("tokens",)},
        [ROUNDED.format("tokens", "logits_narrow_cache:int8")],
    ),
    (
        "the CPU library rounds the factors to bfloat16",
        {"cache": "bfloat16", "attention": "bfloat16", "levels": ("op", "block")},
        [
            "op model.onnx eager op:bfloat16 op:float32",
            "block model.onnx reference block:bfloat16 block:float32",
        ],
    ),
    (
        "a float16 model's tolerance holds a narrow cache",
        {"dtype": "float16", "cache": "bfloat16", "levels": ("model",)},
        [ACTIVATIONS, ROUNDED.format("model", "logits:float16"), "loss model.onnx oracle logits:float16"],
    ),
    (
        "a wide cache is not narrow",
        {"dtype": "float16", "cache": "float32", "levels": ("model",)},
        [ACTIVATIONS, "model model.onnx oracle logits:float16"],
    ),
    (
        "quantised: same weights, then the loss instead of tokens",
        {"quant": "int8", "target": "ort-cpu"},
        [
            "op model.onnx eager op:float32:int8",
            "block model.onnx reference block:float32:int8",
            ROUNDED.format("model", "logits:float32:int8"),
            "loss model.onnx oracle loss:float32:int8 loss_all:float32:int8",
        ],
    ),
    (
        "quantised, tokens only: the loss all the same",
        {"quant": "int4", "target": "ort-cpu", "levels": ("tokens",)},
        ["loss model.onnx oracle loss:float32:int4 loss_all:float32:int4"],
    ),
    (
        "quantised for TensorRT: activations are not rounded",
        {"quant": "int4", "target": "tensorrt", "dtype": "float16"},
        [
            ACTIVATIONS,
            "op model.onnx eager op:float16",
            "block model.onnx reference block:float16",
            ROUNDED.format("model", "logits:float16"),
            "loss model.onnx oracle loss:float16:int4 loss_all:float16:int4",
        ],
    ),
    (
        "quantised with a narrow cache: one loss",
        {"quant": "int8", "target": "ort-cpu", "cache": "bfloat16", "levels": ("model",)},
        [
            ROUNDED.format("model", "logits:float32:int8"),
            "loss model.onnx oracle loss:float32:int8 loss_all:float32:int8",
        ],
    ),
    (
        "bfloat16: nothing can be cut out",
        {"dtype": "bfloat16", "target": "tensorrt", "drafts": 1},
        [
            "op model.onnx 不比",
            "op mtp0.onnx 不比",
            "block model.onnx 不比",
            "block mtp0.onnx 不比",
            "model mtp0.onnx 不比",
            "model model.onnx oracle logits:bfloat16",
            "tokens model.onnx oracle logits:bfloat16",
        ],
    ),
    (
        "quantised bfloat16: the loss cannot be seen either",
        {"dtype": "bfloat16", "target": "tensorrt", "quant": "int8", "levels": ("model", "tokens")},
        [ROUNDED.format("model", "logits:bfloat16"), "loss model.onnx 不比"],
    ),
]


@pytest.mark.parametrize(("given", "want"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_what_is_compared(given: dict[str, Any], want: list[str]):
    """PARITY-13：哪张图在哪一级、与谁比、用容差表的哪一行。"""
    assert [shown(check) for check in plan(**given)] == want


def test_ways_and_sites():
    """PARITY-13：算子取第一处与最后一处；有草稿模型的再投机各走一遍，随机的除外并说明。"""
    op, _ = plan(("op",), drafts=1)
    assert [(site.layer, site.op) for site in op.sites] == [
        (0, "MlaAttention"),
        (2, "MlaAttention"),
        (1, "MoeExperts"),
        (2, "MoeExperts"),
    ]
    plain = ["alone", "batch"]
    for made, ways, notes in (
        ({}, plain, 0),
        ({"drafts": 1}, [*plain, "speculative alone", "speculative batch"], 0),
        ({"drafts": 1, "verify": "rejection"}, plain, 1),
        ({"verify": "rejection"}, plain, 0),
    ):
        (tokens,) = plan(("tokens",), **made)
        assert ([way.name for way in tokens.ways], len(tokens.notes)) == (ways, notes)
    (nothing,) = plan(("op",), ops=False)
    assert (nothing.sites, nothing.skipped, len(nothing.notes)) == ((), False, 1)


def test_what_the_backend_limits():
    """PARITY-13：批放不下就少比几条，一次要不了那么多行 logits 就分段，都写明；放得下的不提。"""
    model, tokens = plan(("model", "tokens"), Limits(512, max_batch=2, logits_rows=28))
    assert (model.prompts, tokens.prompts) == (2, 2)
    assert ["前 2 条" in note or "28 行" in note for note in model.notes] == [True, True]
    assert tokens.notes == model.notes[:1]
    for limits in (Limits(512), Limits(512, max_batch=3, logits_rows=29)):
        assert [(check.prompts, check.notes) for check in plan(("model", "tokens"), limits)] == [(3, ())] * 2


def test_every_check_has_a_tolerance_and_every_gap_a_reason():
    """PARITY-13：各种 dtype、缓存、量化、目标、层级的组合里，要比的都在容差表里，不比的都有理由，没有重复的。"""
    targets = [("portable", "float32", ""), ("portable", "float16", ""), ("tensorrt", "bfloat16", "")]
    targets += [("ort-cpu", "float32", kind) for kind in ("", "int8", "int4")]
    targets += [("tensorrt", dtype, kind) for dtype in ("float16", "bfloat16") for kind in ("int8", "int4")]
    some = [levels for n in range(1, 5) for levels in itertools.combinations(LEVELS, n)]
    for (target, dtype, quant), cache, drafts in itertools.product(
        targets, ("float32", "float16", "bfloat16", "int8"), (0, 2)
    ):
        made = {"target": target, "dtype": dtype, "quant": quant, "cache": cache, "drafts": drafts}
        for levels in some:
            found = plan(levels, **made)
            assert len({(check.level, check.graph) for check in found}) == len(found)
            assert {check.level for check in found} <= {*levels, "loss", "activations"}
            for check in found:
                assert check.notes if check.skipped else all(tolerance(*key) for key in check.keys)


def test_levels_are_refused_by_name():
    """PARITY-10：不认识的层级、空的层级带码拒绝；``loss`` 不能点名；认得的排好次序、去掉重复。"""
    for levels in (["oops"], ["op", "loss"], "op", [], [["op"]]):
        with pytest.raises(DsxError) as error:
            requested(levels)
        assert error.value.code == "DSX-E607"
        assert "op、block、model、tokens" in error.value.todo
    with pytest.raises(DsxError, match="levels 是字符串 'op'"):
        requested("op")
    assert requested(["tokens", "op", "op"]) == ("op", "tokens")


def test_the_plan_needs_no_torch():
    """PARITY-13：列出要比什么不导入 torch。"""
    code = "import sys, deepseek_export.parity.checks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
