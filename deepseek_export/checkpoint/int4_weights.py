"""已发布的 4 位权重在文件里怎么排，怎么还原成码、零点与 scale。

一个线性层 ``W[N, K]`` 存成几个张量（``M`` 是模块名，``G = K / group``）；还原都是 ``w = (码 - 零点) * scale``，码是 0 到 15：

=====================  ==================================================================================================
compressed-tensors     ``M.weight_packed`` [N, K/8] int32，沿 K 每 8 个一个字，低位在前，码是有符号的值加 8；``M.weight_scale``
                       [N, G]；``M.weight_shape`` [2]；不对称的另有 ``M.weight_zero_point`` [N/8, G] int32，沿 N 打包，也加 8；
                       actorder 是 group 的另有 ``M.weight_g_idx`` [K]
AWQ（gemm）            ``M.qweight`` [K, N/8] int32，沿 N 每 8 个一个字，第 i 个半字节是第 0 2 4 6 1 3 5 7 个输出；``M.qzeros``
                       [G, N/8] 同样交错；``M.scales`` [G, N]
GPTQ                   ``M.qweight`` [K/8, N] int32，沿 K 打包；``M.qzeros`` [G, N/8] 沿 N 顺序打包，v1 存的是零点减一；``M.scales``
                       [G, N]；``M.g_idx`` [K]，每个输入维属于哪一组
=====================  ==================================================================================================

依据：compressed-tensors 的 ``pack_to_int32``、AutoAWQ 的 ``AWQ_ORDER`` 与 ``WQLinear_GEMM``、AutoGPTQ 与 GPTQModel 的 ``pack``、
``convert_gptq_v1_to_v2_format``。码、scale 都不超过 11 位有效数字，乘积在 float32 里精确。
"""

from __future__ import annotations

import numpy as np

from deepseek_export.checkpoint.int4_config import Int4Layout
from deepseek_export.checkpoint.store import TensorStore
from deepseek_export.errors import DsxError

Shapes = dict[str, tuple[int, ...]]

WEIGHT = ".weight"
ZERO_POINT = 8
#: 第 i 个半字节放的是第几个输出，只有 AWQ。
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
#: 看有没有它，就知道一个模块是不是 4 位。
_KEY = {"compressed-tensors": ".weight_packed", "awq": ".qweight", "gptq": ".qweight"}
_PER_WORD = 8
_INTEGERS, _FLOATS = ("I32",), ("F16", "BF16", "F32")


def key_tensor(weight: str, layout: Int4Layout) -> str:
    """``M.weight`` → 存着它的码的张量。"""
    return weight.removesuffix(WEIGHT) + _KEY[layout.method]


def stored_parts(weight: str, shape: tuple[int, ...], layout: Int4Layout) -> Shapes:
    """``M.weight`` [N, K] → 存成哪几个张量，各是什么形状。

    Raises:
        DsxError: ``DSX-E650``，宽度不是组的倍数，或行数不能按字打包。
    """
    rows, width = shape
    module, groups = weight.removesuffix(WEIGHT), width // layout.group
    along_rows = layout.method != "compressed-tensors" or not layout.symmetric
    if width % layout.group or (along_rows and rows % _PER_WORD):
        raise DsxError(
            "DSX-E650",
            f"{module} 的权重是 {list(shape)}，不能按每 {layout.group} 个一组、每字 {_PER_WORD} 个打包",
            "确认 config.json 与权重是同一个模型；除不尽的组 dsx 不读",
        )
    if layout.method == "compressed-tensors":
        parts: Shapes = {
            ".weight_packed": (rows, width // _PER_WORD),
            ".weight_scale": (rows, groups),
            ".weight_shape": (2,),
        }
        if not layout.symmetric:
            parts[".weight_zero_point"] = (rows // _PER_WORD, groups)
        if layout.act_order:
            parts[".weight_g_idx"] = (width,)
    else:
        awq = layout.method == "awq"
        parts = {
            ".qweight": (width, rows // _PER_WORD) if awq else (width // _PER_WORD, rows),
            ".qzeros": (groups, rows // _PER_WORD),
            ".scales": (groups, rows),
        }
        if not awq:
            parts[".g_idx"] = (width,)
    return {module + suffix: part for suffix, part in parts.items()}


def part_dtypes(name: str) -> tuple[str, ...]:
    """:func:`stored_parts` 的一个张量可以是什么 dtype（safetensors 的写法）。"""
    if name.endswith(".weight_shape"):
        return ("I32", "I64")
    return _FLOATS if name.endswith(("scale", "scales")) else _INTEGERS


def weight_shape(weight: str, layout: Int4Layout, store: TensorStore) -> tuple[int, int]:
    """还原之后的 [N, K]，由文件头算出。"""
    first, second = store[key_tensor(weight, layout)].shape
    if layout.method == "compressed-tensors":
        return first, second * _PER_WORD
    return (second * _PER_WORD, first) if layout.method == "awq" else (second, first * _PER_WORD)


def in_order(weight: str, layout: Int4Layout, store: TensorStore) -> bool:
    """每个输入维依次属于第 ``k // group`` 组吗；没有 ``g_idx`` 的总是。"""
    order = _group_index(weight, layout, store)
    return order is None or np.array_equal(order, np.arange(len(order)) // layout.group)


class Int4Weight:
    """一个 4 位的权重，逐行还原。

    scale、零点与（沿输入维存的）码整个读进来，是还原成 float32 的八分之一；其余逐行读。
    """

    def __init__(self, weight: str, layout: Int4Layout, store: TensorStore) -> None:
        """读 scale 与零点，核对内容。

        Args:
            weight: ``M.weight``。
            layout: 怎么排。
            store: 检查点张量，形状已经核对过。

        Raises:
            DsxError: ``DSX-E652`` 内容自相矛盾；``DSX-E115`` scale 有 NaN/Inf。
        """
        self.weight, self.layout, self._store = weight, layout, store
        self.shape = weight_shape(weight, layout, store)
        self._module = weight.removesuffix(WEIGHT)
        self._check_shape()
        self.scales = self._read_scales()
        self.zeros = self._read_zeros()
        self._order = self._read_order()
        self._columns: np.ndarray | None = None

    def codes(self, start: int, stop: int) -> np.ndarray:
        """[行, K] uint8，0 到 15。"""
        if self.layout.method == "compressed-tensors":
            return _nibbles(self._store.read_rows(f"{self._module}.weight_packed", start, stop))
        if self._columns is None:
            self._columns = self._whole(".qweight")
        if self.layout.method == "gptq":
            return _nibbles(self._columns[:, start:stop].T)
        first, last = start // _PER_WORD, -(-stop // _PER_WORD)
        codes = _deinterleaved(_nibbles(self._columns[:, first:last]))
        return np.ascontiguousarray(codes[:, start - first * _PER_WORD : stop - first * _PER_WORD].T)

    def values(self, start: int, stop: int) -> np.ndarray:
        """[行, K] float32，还原之后的权重。"""
        steps = self.codes(start, stop).astype(np.float32)
        zeros, scales = self.zeros[start:stop].astype(np.float32), self.scales[start:stop].astype(np.float32)
        if self._order is not None:
            return (steps - zeros[:, self._order]) * scales[:, self._order]
        blocks = steps.reshape(stop - start, -1, self.layout.group)
        blocks -= zeros[:, :, None]
        blocks *= scales[:, :, None]
        return blocks.reshape(stop - start, -1)

    def steps(self, start: int, stop: int) -> np.ndarray:
        """[行, K] int8，码减去零点；只用于组依次排列的。"""
        steps = self.codes(start, stop).astype(np.int8).reshape(stop - start, -1, self.layout.group)
        return (steps - self.zeros[start:stop, :, None]).reshape(stop - start, -1)

    def _whole(self, suffix: str) -> np.ndarray:
        name = self._module + suffix
        return self._store.read_rows(name, 0, self._store[name].shape[0])

    def _check_shape(self) -> None:
        if self.layout.method != "compressed-tensors":
            return
        stated = [int(size) for size in self._whole(".weight_shape")]
        if stated != list(self.shape):
            raise self._broken(f"weight_shape 写的是 {stated}，按打包的码应为 {list(self.shape)}")

    def _read_scales(self) -> np.ndarray:
        """[N, G]，检查点里的 dtype。"""
        if self.layout.method == "compressed-tensors":
            name, scales = ".weight_scale", self._whole(".weight_scale")
        else:
            name, scales = ".scales", np.ascontiguousarray(self._whole(".scales").T)
        if not np.isfinite(scales.astype(np.float32)).all():
            what = f"张量 {self._module}{name} 里有 NaN 或 Inf"
            raise DsxError("DSX-E115", what, "检查点坏了：重新下载，或回到产生它的量化步骤查 NaN")
        return scales

    def _read_zeros(self) -> np.ndarray:
        """[N, G] int8，0 到 15。"""
        layout, rows = self.layout, self.shape[0]
        if layout.method == "compressed-tensors":
            if layout.symmetric:
                return np.full((rows, self.shape[1] // layout.group), ZERO_POINT, np.int8)
            return _nibbles(self._whole(".weight_zero_point").T).T.astype(np.int8)
        zeros = _nibbles(self._whole(".qzeros"))
        if layout.method == "awq":
            return _deinterleaved(zeros).T.astype(np.int8)
        if layout.minus_one and (zeros == 15).any():
            raise self._broken("qzeros 里有 15：GPTQ v1 存零点减一，它可以是 16 也可以是 0，各家读法不同")
        found = zeros.T.astype(np.int8) + np.int8(layout.minus_one)
        if layout.symmetric and (found != ZERO_POINT).any():
            raise self._broken("config.json 写着 sym=true，qzeros 里却有不是 8 的零点")
        return found

    def _read_order(self) -> np.ndarray | None:
        """每个输入维属于哪一组；依次排列的为 ``None``。"""
        order = _group_index(self.weight, self.layout, self._store)
        if order is None:
            return None
        groups = self.shape[1] // self.layout.group
        if order.size and not (order.min() >= 0 and order.max() < groups):
            raise self._broken(f"g_idx 在 {order.min()} 到 {order.max()} 之间，组只有 {groups} 个")
        if np.array_equal(order, np.arange(len(order)) // self.layout.group):
            return None
        if not self.layout.act_order:
            raise self._broken("config.json 没有写 desc_act，g_idx 却不是依次排列的")
        return order

    def _broken(self, what: str) -> DsxError:
        return DsxError("DSX-E652", f"{self._module}：{what}", "重新下载，或重新量化这个检查点")


def _group_index(weight: str, layout: Int4Layout, store: TensorStore) -> np.ndarray | None:
    name = weight.removesuffix(WEIGHT) + (".g_idx" if layout.method == "gptq" else ".weight_g_idx")
    present = layout.method == "gptq" or (layout.method == "compressed-tensors" and layout.act_order)
    return store.read_rows(name, 0, store[name].shape[0]) if present else None


def _nibbles(words: np.ndarray) -> np.ndarray:
    """[行, 列] int32 → [行, 8*列] uint8，低位在前。"""
    raw = np.ascontiguousarray(words).view(np.uint8)
    return np.stack([raw & 15, raw >> 4], axis=-1).reshape(words.shape[0], -1)


def _deinterleaved(nibbles: np.ndarray) -> np.ndarray:
    """AWQ 每个字里的 8 个换回输出的次序。"""
    return nibbles.reshape(len(nibbles), -1, _PER_WORD)[:, :, np.argsort(AWQ_ORDER)].reshape(len(nibbles), -1)
