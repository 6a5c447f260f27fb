"""int8 的 latent 缓存要付多少误差，与没有采用的写法并列：演示检查点的参考实现，缓存写入之前先舍入，比 float32 缓存的 logits。

    python -m perf.int8_cache

``mla.cache_dtype=int8`` 用的是「int8」一行；旋转部分也只留 8 位的两种，误差大两倍半以上，所以没有采用。
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from unittest import mock

import click
import torch
from tokenizers import Tokenizer

from deepseek_export.checkpoint import Checkpoint
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.ops.int8_cache import decode_rows, encode_rows
from deepseek_export.reference import Forms, load_reference, mla

#: 至多看这么多 token。
TOKENS = 512
Rounding = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


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


@click.command()
def main() -> None:
    """打印各种缓存的 logits 误差。"""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    texts = json.loads((CHECKPOINT / "heldout_prompts.json").read_text(encoding="utf-8"))
    ids = torch.tensor([[i for text in texts for i in tokenizer.encode(text).ids][:TOKENS]])
    model = load_reference(Checkpoint.open(CHECKPOINT), Forms("naive", "sparse"))
    attention, count = mla.mla_attention, ids.shape[1]

    def logits(rounding: Rounding) -> torch.Tensor:
        def rounded(q_nope, q_pe, c_kv, k_pe, *rest, **options):
            return attention(q_nope, q_pe, *rounding(c_kv, k_pe), *rest, **options)

        with mock.patch.object(mla, "mla_attention", rounded), torch.no_grad():
            past, every = torch.zeros(1, dtype=torch.long), torch.arange(count)[None]
            return model(ids, past, every, model.empty_caches(1, count))[0][0]

    want = logits(lambda c, k: (c, k))
    click.echo(f"{count} 个 token，logits 每行的相对误差（中位数、99 分位）与 argmax 相同的比例：")
    for name, rounding in ROUNDINGS.items():
        got = logits(rounding)
        rows = (got - want).norm(dim=-1) / want.norm(dim=-1)
        same = (got.argmax(-1) == want.argmax(-1)).float().mean()
        click.echo(f"{rows.median():.2e}  {rows.quantile(0.99):.2e}  {same:.1%}  {name}")


if __name__ == "__main__":
    main()
