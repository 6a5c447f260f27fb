"""重新生成 docs/gpu.md 里解码一步的层数与启动次数：由 graphs/engines/ 的清单与启动表数出，旁边是从前的，``graphs/engine-steps.json`` 里记着。

``--record COMMIT`` 把现在数出的记成从前的。
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import click

from deepseek_export.kernels.grouped_swiglu_launch import grouped_swiglu_launch
from deepseek_export.kernels.index_topk_launch import index_topk_launch
from deepseek_export.kernels.latent_attention_launch import latent_attention_launch
from deepseek_export.kernels.sparse_latent_attention_launch import sparse_latent_attention_launch
from tools.make_engine_graphs import ENGINE_GRAPHS, NAMES, listing_name
from tools.make_graphs import GRAPHS
from tools.make_kernel_audit import PAGE

BEGIN, END = "<!-- 一步：由 tools/make_engine_steps.py 生成 -->", "<!-- 一步：完 -->"
RECORD = GRAPHS / "engine-steps.json"
SM = 89
_HEADER = re.compile(r"^\[(?P<engine>\S+) decode\] (?P<counts>.*)$", re.MULTILINE)
_COUNT = re.compile(r"(?:dsx::)?(\w+)×(\d+)")

_HEAD = """\
解码一步（B=1，S=1）有几层、几次 kernel 启动，由 `graphs/engines/` 里 sm89 的清单数出：插件的一层是启动表里的几次，其余的层各算一次。
"""


class Step(NamedTuple):
    """一个引擎的解码一步。

    Attributes:
        layers: 几层。
        launches: 几次启动。
    """

    layers: int
    launches: int


def plugin_launches() -> Mapping[str, int]:
    """插件 → 解码一步启动几次；形状是 V3 的，次数与宽度无关。"""
    B, T, card = 1, 4096, 142
    q, cache, past = (B, 1, 128, 576), (B, 1, T, 576), (B,)
    experts = [(B, 7168), (B, 8), (B, 8), *[(256, 2048, 7168)] * 2, (256, 7168, 2048)]
    attention = latent_attention_launch(SM, 128, 512, 64, 0.1, "bfloat16")
    sparse = sparse_latent_attention_launch(SM, 128, 512, 64, 2048, 0.1, "bfloat16")
    index = index_topk_launch(SM, 64, 128, 2048, "bfloat16")
    moe = grouped_swiglu_launch(SM, 256, 8, 7168, 2048, "bfloat16")
    found = {
        attention.op: attention.bind([q, cache, past], card),
        sparse.op: sparse.bind([q, cache, (B, 1, 2048), (B, 1)], card),
        index.op: index.bind([(B, 1, 64, 128), (B, 1, 64), (B, 1, T, 128), past], card),
        moe.op: moe.bind(experts, card),
        "QuantizedMoeExperts": moe.bind(experts, card),  # 同样的几步
    }
    return MappingProxyType({op: len(launches) for op, launches in found.items()})


def steps() -> dict[str, Step]:
    """``清单 引擎`` → 一步。"""
    launches, found = plugin_launches(), {}
    for name in NAMES:
        text = (ENGINE_GRAPHS / listing_name(name, SM)).read_text(encoding="utf-8")
        for match in _HEADER.finditer(text):
            counts = {kind: int(number) for kind, number in _COUNT.findall(match["counts"])}
            times = sum(number * launches.get(kind, 1) for kind, number in counts.items())
            found[f"{name} {match['engine']}"] = Step(sum(counts.values()), times)
    return found


def section() -> str:
    """两个标记之间的全文。"""
    return "\n".join([_HEAD, *_rows()])


def _rows() -> Iterator[str]:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    before = {name: Step(*step) for name, step in record["steps"].items()}
    yield f"| 清单 | 引擎 | 层，{record['commit']} | 层，现在 | 启动，{record['commit']} | 启动，现在 |"
    yield "|---|---|---|---|---|---|"
    for name, now in steps().items():
        listing, engine = name.split()
        old = before.get(name)
        layers, launches = ("没有", "没有") if old is None else old
        yield f"| {listing} | `{engine}` | {layers} | {now.layers} | {launches} | {now.launches} |"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--record", metavar="COMMIT", help="把现在数出的记成从前的，写明是哪个提交。")
def main(record: str | None) -> None:
    """改写 docs/gpu.md 的那一节，别的不动。"""
    if record is not None:
        made = {"commit": record, "steps": steps()}
        RECORD.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}\n{section()}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
