"""int8 的 latent 缓存要付多少误差（MLA-7），与没有采用的写法并列：演示检查点的参考实现，缓存写入之前先舍入，比 float32 缓存的 logits。

``mla.cache_dtype=int8`` 用的是 ``int8`` 一行；旋转部分也只留 8 位的两种没有采用。
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from unittest import mock

import torch
from tokenizers import Tokenizer

from deepseek_export.benchmark.spread import Spread
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.ops.int8_cache import decode_rows, encode_rows
from deepseek_export.reference import Forms, load_reference, mla
from perf.results import Case, SuiteResult
from perf.workload.workspace import Workspace

TITLE = "int8 缓存的误差"
Rounding = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Scenario:
    """固定的场景：留出的提示接成一段，只看前几个 token。"""

    prompt_len: int = 512


FULL = Scenario()
QUICK = Scenario(prompt_len=128)


def _int8(x: torch.Tensor) -> torch.Tensor:
    """每个 token 一个 scale。"""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale) * scale


def _packed(c_kv: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = decode_rows(encode_rows(c_kv, k_pe), c_kv.shape[-1])
    return rows[..., : c_kv.shape[-1]], rows[..., c_kv.shape[-1] :]


def _together(c_kv: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _int8(torch.cat([c_kv, k_pe], -1)).split([c_kv.shape[-1], k_pe.shape[-1]], -1)


#: 名字 → 潜向量与旋转部分各怎么舍入。
ROUNDINGS: Mapping[str, Rounding] = MappingProxyType(
    {
        "float16": lambda c, k: (c.half().float(), k.half().float()),
        "bfloat16": lambda c, k: (c.bfloat16().float(), k.bfloat16().float()),
        "int8": _packed,
        "int8，两部分各一个 scale": lambda c, k: (_int8(c), _int8(k)),
        "int8，合用一个 scale": _together,
    }
)


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """逐种缓存比 logits；每种只算一遍，没有散布。"""
    scenario = QUICK if quick else FULL
    torch.set_num_threads(threads)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    texts = json.loads((CHECKPOINT / "heldout_prompts.json").read_text(encoding="utf-8"))
    ids = torch.tensor([[i for text in texts for i in tokenizer.encode(text).ids][: scenario.prompt_len]])
    model = load_reference(Checkpoint.open(CHECKPOINT), Forms("naive", "sparse"))
    attention, count = mla.mla_attention, ids.shape[1]

    def logits(rounding: Rounding) -> torch.Tensor:
        def rounded(q_nope, q_pe, c_kv, k_pe, *rest, **options):
            return attention(q_nope, q_pe, *rounding(c_kv, k_pe), *rest, **options)

        with mock.patch.object(mla, "mla_attention", rounded), torch.no_grad():
            past, every = torch.zeros(1, dtype=torch.long), torch.arange(count)[None]
            return model(ids, past, every, model.empty_caches(1, count))[0][0]

    want, values = logits(lambda c, k: (c, k)), {}
    for name, rounding in ROUNDINGS.items():
        got = logits(rounding)
        rows = (got - want).norm(dim=-1) / want.norm(dim=-1)
        values[f"{name}.row_error"] = Spread.of([float(rows.median())])
        values[f"{name}.row_error_p99"] = Spread.of([float(rows.quantile(0.99))])
        values[f"{name}.same_argmax"] = Spread.of([float((got.argmax(-1) == want.argmax(-1)).float().mean())])
    ratio = values["int8.row_error"].scaled(1 / values["bfloat16.row_error"].median)
    case = Case(name="demo", values=values, ratios={"int8/bfloat16": ratio})
    return SuiteResult(suite="int8-cache", title=TITLE, scenario=asdict(scenario), cases=[case])
