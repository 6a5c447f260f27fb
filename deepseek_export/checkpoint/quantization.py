"""config.json 的 ``quantization_config``：DeepSeek 发布的 FP8 分块格式；4 位的另见 ``int4_config.py``，其余一律拒绝。

格式：Linear 权重是 E4M3，旁边的 ``<名字>_scale_inv`` 是 float32，每个 scale 管 ``weight_block_size`` 那么大的一块
（边上的块可以不满），``w = fp8 * scale_inv``。哪些张量是 FP8 由文件头说了算，见 ``Checkpoint.open``。
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from deepseek_export.checkpoint.fields import Fields, shown
from deepseek_export.checkpoint.int4_config import INT4_METHODS
from deepseek_export.errors import DsxError

FP8_DTYPE = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"

_CODE = "DSX-E108"
_MAX_BLOCK = 1 << 16
# 可以出现的字段与允许的取值；缺失与 null 等同。activation_scheme、scale_fmt 说的是激活怎么量化，与反量化权重无关。
_ALLOWED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "quant_method": ("fp8",),
        "fmt": ("e4m3",),
        "activation_scheme": ("dynamic",),
        "scale_fmt": ("ue8m0", "float"),
    }
)
_NAME_LISTS = ("modules_to_not_convert", "ignored_layers")


def parse_quantization(f: Fields) -> tuple[int, int] | None:
    """读 ``quantization_config``。

    Args:
        f: 整个 config.json。

    Returns:
        FP8 的块大小（行、列）；没有量化、或是 4 位的为 ``None``。

    Raises:
        DsxError: ``DSX-E108``，不是认识的量化方式，或其中有不认识的字段、取值。
    """
    data = f.data.get("quantization_config")
    if data is None:
        return None
    where = f"{f.where} 的 quantization_config"
    if isinstance(data, dict) and data.get("quant_method") in INT4_METHODS:
        return None
    if not isinstance(data, dict) or data.get("quant_method") not in _ALLOWED["quant_method"]:
        method = data.get("quant_method") if isinstance(data, dict) else data
        todo = (
            f"换用 FP8 分块（quant_method: fp8）、4 位（{'、'.join(INT4_METHODS)}）、BF16、FP16 或 FP32 的检查点，"
            "或先反量化再导出"
        )
        raise DsxError(_CODE, f"{where}.quant_method 是 {shown(method)}", todo)
    q = Fields(data, where)
    q.refuse_unknown({*_ALLOWED, *_NAME_LISTS, "weight_block_size"}, _CODE)
    for key, allowed in _ALLOWED.items():
        q.must_equal(key, *allowed, code=_CODE)
    for key in _NAME_LISTS:
        names = data.get(key)
        if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
            raise q.bad(key, "字符串列表", _CODE)
    return _block_size(q)


def _block_size(q: Fields) -> tuple[int, int]:
    value: Any = q.data.get("weight_block_size")
    if isinstance(value, list) and len(value) == 2:
        rows, columns = value
        if all(type(size) is int and 1 <= size <= _MAX_BLOCK for size in value):
            return rows, columns
    raise q.bad("weight_block_size", f"两个 1 到 {_MAX_BLOCK} 的整数（行、列），例如 [128, 128]", _CODE)
