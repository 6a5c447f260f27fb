"""一张图的输入输出约定：token 输入、缓存、输出，用 dsx 自己的 dtype 与具名维度写。

维度记号同 ``specs/export``：``B`` 行数，``S`` 新 token 数，``L`` 要几行 logits，``K`` 草稿数，``T`` 缓存容量，``V`` 词表，``D`` hidden。后端把自己的
写法译成 :class:`Port` 交给 :meth:`GraphContract.of`，以后只认这里的名字；会话与草稿因此不知道、也不问后端是哪一个。
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np

from deepseek_export.dtypes import DTYPES
from deepseek_export.errors import DsxError
from deepseek_export.records import BEST_ID, BEST_LOGIT

TOKEN_INPUTS = ("input_ids", "past_lens", "logits_positions")

CacheKind = Literal["latent", "key", "value", "index"]
#: 缓存输入的名字（``<词干>.<层>``）→ 存的是什么；输出叫 ``<词干>_out.<层>``。
CACHE_KINDS: Mapping[str, CacheKind] = MappingProxyType(
    {"kv_cache": "latent", "k_cache": "key", "v_cache": "value", "index_cache": "index"}
)
_CACHE_NAME = re.compile(rf"({'|'.join(CACHE_KINDS)})\.\d+")
_CACHE_DTYPES = ("float32", "float16", "bfloat16", "int8")
_LOGITS_DTYPES = ("float32", "float16", "bfloat16")

#: 缓存以外的端口各维叫什么；常数的大小各图不同，由图给出。
PORT_DIMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "input_ids": ("B", "S"),
        "past_lens": ("B",),
        "logits_positions": ("B", "L"),
        "draft_ids": ("B", "K"),
        "draft_probs": ("B", "K", "V"),
        "uniform": ("B", "K+1"),
        "temperature": ("1",),
        "prev_hidden": ("B", "S", "D"),
        "hidden_in": ("B", "S", "D"),
        "hidden_out": ("B", "S", "D"),
        "logits": ("B", "L", "V"),
        BEST_ID: ("B", "L", "1"),
        BEST_LOGIT: ("B", "L", "1"),
        "hidden": ("B", "S", "D"),
        "draft_id": ("B",),
        "num_accepted": ("B",),
        "next_id": ("B",),
    }
)


@dataclass(frozen=True, slots=True)
class Port:
    """一个输入或输出。

    Attributes:
        name: 名字。
        dtype: dsx 的 dtype 名；表里没有的写后端自己的原话，核对时拒绝。
        dims: 各维：整数、名字，或不知道（``None``）。
    """

    name: str
    dtype: str
    dims: tuple[int | str | None, ...]

    @property
    def numpy(self) -> np.dtype:
        """numpy 的 dtype。"""
        return DTYPES[self.dtype].numpy


@dataclass(frozen=True, slots=True)
class CacheTensor:
    """一个缓存张量 ``[B, heads, T, width]``，按行与位置寻址，原地更新。

    Attributes:
        name, out_name: 输入与输出的名字，绑同一块内存。
        kind: 存的是什么。
        layer: 名字里的编号。
        dtype: 元素类型。
        heads, width: 常数的两维。
    """

    name: str
    out_name: str
    kind: CacheKind
    layer: int
    dtype: np.dtype
    heads: int
    width: int

    @property
    def bytes_per_token(self) -> int:
        """一行每多一个位置多占的字节数。"""
        return self.heads * self.width * self.dtype.itemsize


@dataclass(frozen=True)
class CacheSpec:
    """一张图要的全部缓存；一层可以有几种。"""

    tensors: tuple[CacheTensor, ...]

    @classmethod
    def of(cls, inputs: Iterable[Port], outputs: Iterable[Port]) -> CacheSpec:
        """从图的端口里认出缓存。

        Raises:
            DsxError: ``DSX-E508``，没有缓存、缺少对应的输出、dtype 不支持，或形状不是 ``[B, 常数, T, 常数]``。
        """
        produced = {port.name: port for port in outputs}
        tensors = tuple(_cache_tensor(port, produced) for port in inputs if _CACHE_NAME.fullmatch(port.name))
        if not tensors:
            raise contract_broken(f"模型没有缓存输入（{'、'.join(f'{stem}.{{i}}' for stem in CACHE_KINDS)}）")
        return cls(tensors)

    @property
    def bytes_per_token(self) -> int:
        """一行每多一个位置，全部缓存多占的字节数。"""
        return sum(tensor.bytes_per_token for tensor in self.tensors)


@dataclass(frozen=True)
class GraphContract:
    """一张图的约定。

    Attributes:
        inputs, outputs: 缓存以外的端口，名字 → 端口，次序同图。
        caches: 缓存。
        vocab_size: 词表大小 V；流水线里不是最后的 stage 没有 logits，为 0。
        hidden_size: ``hidden``（或 ``hidden_out``）的宽度 D；没有这个输出、或宽度不是常数，为 ``None``。
    """

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    caches: CacheSpec
    vocab_size: int
    hidden_size: int | None
    _widths: Mapping[str, int] = field(repr=False)

    @classmethod
    def of(cls, inputs: Iterable[Port], outputs: Iterable[Port]) -> GraphContract:
        """把图的端口分成 token、缓存与其余。

        Raises:
            DsxError: ``DSX-E508``，没有缓存、缓存缺少对应的输出、dtype 不支持或形状不是 ``[B, 常数, T, 常数]``；没有 ``logits``（也不是
                给出 ``hidden_out`` 的 stage），或它不是浮点的 ``[B, L, 常数]``。
        """
        given, produced = {port.name: port for port in inputs}, {port.name: port for port in outputs}
        caches = CacheSpec.of(given.values(), produced.values())
        for tensor in caches.tensors:
            del given[tensor.name], produced[tensor.out_name]
        vocab_size = 0 if "hidden_out" in produced else _vocab_size(produced.get("logits"))
        hidden = produced.get("hidden_out") or produced.get("hidden")
        hidden_size = None if hidden is None else _width(hidden)
        widths = {"1": 1, "V": vocab_size, "D": hidden_size or 0}
        return cls(
            MappingProxyType(given),
            MappingProxyType(produced),
            caches,
            vocab_size,
            hidden_size,
            MappingProxyType(widths),
        )

    def check(self, extra: Iterable[str], outputs: Iterable[str]) -> None:
        """输入恰好是 token 三件套、缓存与 ``extra``，并且有 ``outputs`` 这些输出，dtype 都认得。

        Raises:
            DsxError: ``DSX-E508``。
        """
        expected, found = {*TOKEN_INPUTS, *extra}, set(self.inputs)
        if found != expected:
            missing, more = sorted(expected - found), sorted(found - expected)
            raise contract_broken(f"模型的输入不符：缺少 {missing}，多出 {more}")
        wanted = set(outputs)
        if absent := sorted(wanted - set(self.outputs)):
            raise contract_broken(f"模型的输出不符：缺少 {absent}")
        ports = [*self.inputs.values(), *(self.outputs[name] for name in wanted)]
        if strange := {port.name: port.dtype for port in ports if port.dtype not in DTYPES}:
            raise contract_broken(f"dtype 不认识：{strange}")

    def sizes(self, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
        """这一次调用里各个具名维度的大小，从缓存以外的输入量出来。"""
        sizes = dict(self._widths)
        for name, array in inputs.items():
            sizes.update(zip(PORT_DIMS[name], array.shape, strict=True))
        sizes["K+1"] = sizes.get("K", 0) + 1
        return sizes


def shape_of(port: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """缓存以外的端口 ``port`` 在这一次调用里的形状。"""
    return tuple(sizes[dim] for dim in PORT_DIMS[port])


def contract_broken(what: str) -> DsxError:
    """模型的输入输出与 dsx 的约定不符（``DSX-E508``）。"""
    return DsxError("DSX-E508", what, "用 dsx export 重新导出；不是 dsx 导出的 ONNX 不能在这里运行")


def _cache_tensor(port: Port, outputs: Mapping[str, Port]) -> CacheTensor:
    stem, _, layer = port.name.partition(".")
    out_name = f"{stem}_out.{layer}"
    out = outputs.get(out_name)
    if out is None or out.dtype != port.dtype:
        what = "没有" if out is None else f"类型为 {out.dtype}"
        raise contract_broken(f"缓存输入 {port.name}（{port.dtype}）对应的输出 {out_name} {what}")
    if port.dtype not in _CACHE_DTYPES:
        raise contract_broken(f"缓存 {port.name} 的类型 {port.dtype} 不在 {list(_CACHE_DTYPES)} 里")
    heads, width = (port.dims[1], port.dims[3]) if len(port.dims) == 4 else (None, None)
    if not (isinstance(heads, int) and isinstance(width, int)):
        raise contract_broken(f"缓存 {port.name} 的形状 {list(port.dims)} 不是 [B, 常数, T, 常数]")
    return CacheTensor(port.name, out_name, CACHE_KINDS[stem], int(layer), port.numpy, heads, width)


def _vocab_size(logits: Port | None) -> int:
    if logits is None:
        raise contract_broken("模型没有名为 logits 的输出")
    vocab_size = _width(logits)
    if logits.dtype not in _LOGITS_DTYPES or vocab_size is None:
        raise contract_broken(f"logits 是 {logits.dtype}{list(logits.dims)}，应为浮点的 [B, L, 常数]")
    return vocab_size


def _width(port: Port) -> int | None:
    """三维端口最后一维的常数。"""
    last = port.dims[2] if len(port.dims) == 3 else None
    return last if isinstance(last, int) else None
