"""int8 的 latent 缓存还原成浮点，写成标准算子；与 :func:`~deepseek_export.ops.int8_cache.decode_rows` 逐位相同。

TensorRT 的 prefill 用它：展开 K、V 的矩阵乘、原生注意力都要浮点。编译器把它融成一层。
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from deepseek_export.ops.int8_cache import SCALE_BYTES, exponent_powers
from deepseek_export.passes.emitter import Emitter, dtype_of

_POWERS = "f32_powers_of_two"


def restore_latent(emit: Emitter, rows: gs.Tensor, r: int, dr: int, like: gs.Tensor) -> gs.Variable:
    """缓存里的行 [B, P, cw] int8 → [B, P, r+dr]，dtype 同 ``like``。

    Args:
        emit: 生成到哪里。
        rows: 行，末尾补过零。
        r, dr: 前面几个是 latent 的码，之后两段各几个字节是旋转部分的。
        like: 结果的 dtype 与它相同。
    """
    wide = emit("Cast", [rows], "mla/codes", np.float32, to=TensorProto.FLOAT)
    pieces = {"latent_codes": r, "k_pe_high": dr, "k_pe_low": dr}
    pieces |= {f"scale_{index}": 1 for index in range(SCALE_BYTES)}
    if (rest := int(rows.shape[-1]) - sum(pieces.values())) > 0:
        pieces["padding"] = rest
    names = [f"mla/{name}" for name in pieces]
    codes, high, low, *scales = emit.split(wide, list(pieces.values()), names, axis=2)
    k_pe = _two_bytes(emit, high, low, "mla/k_pe_codes")
    parts = []
    for name, values, bytes_ in (("latent", codes, scales[:3]), ("k_pe", k_pe, scales[3:SCALE_BYTES])):
        factor = _scale(emit, bytes_, f"mla/{name}_scale")
        parts.append(emit("Mul", [values, factor], f"mla/{name}_restored", np.float32))
    restored = emit("Concat", parts, "mla/latent_restored_all", np.float32, axis=-1)
    return emit("Cast", [restored], "mla/latent_cast", like, to=dtype_of(like).onnx)


def _two_bytes(emit: Emitter, high: gs.Tensor, low: gs.Tensor, name: str) -> gs.Variable:
    upper = emit("Mul", [high, emit.float0d(256.0)], f"{name}_high", np.float32)
    return emit("Add", [upper, low], name, np.float32)


def _scale(emit: Emitter, parts: list[gs.Variable], name: str) -> gs.Variable:
    """三个字节（高、低、e）→ ``(256 · 高 + 低) · 2^e``。"""
    high, low, exponent = parts
    factor = _two_bytes(emit, high, low, f"{name}_factor")
    place = emit("Add", [exponent, emit.float0d(128.0)], f"{name}_place", np.float32)
    place = emit("Cast", [place], f"{name}_index", np.int64, to=TensorProto.INT64)
    powers = emit.array(_POWERS, np.array(exponent_powers(), np.float32))
    power = emit("Gather", [powers, place], f"{name}_power", np.float32, axis=0)
    return emit("Mul", [factor, power], name, np.float32)
