"""一个检查点里哪些权重是 4 位的：由文件头看出来，与 config.json 的声明逐个核对。"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from deepseek_export.checkpoint.int4_config import Int4Config, Int4Layout
from deepseek_export.checkpoint.int4_weights import WEIGHT, Shapes, key_tensor, part_dtypes, stored_parts
from deepseek_export.checkpoint.store import TensorStore
from deepseek_export.errors import DsxError

_PARTS = (
    *(".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx"),
    *(".qweight", ".qzeros", ".scales", ".g_idx"),
)
#: 二维而不是线性层的：词嵌入，与路由（transformers 里是参数，不是 Linear）。
_NOT_LINEAR = ("embed_tokens.weight", ".mlp.gate.weight")


def is_int4(weight: str, layout: Int4Layout | None, store: TensorStore) -> bool:
    """``M.weight`` 在这个检查点里存成 4 位吗。"""
    return layout is not None and weight.endswith(WEIGHT) and key_tensor(weight, layout) in store


def as_stored(shapes: Mapping[str, tuple[int, ...]], config: Int4Config | None, store: TensorStore) -> Shapes:
    """应有的张量 → 检查点里应有的：4 位的权重换成它的几个张量，其余不变。

    Raises:
        DsxError: ``DSX-E650``，见 :func:`~deepseek_export.checkpoint.int4_weights.stored_parts`。
    """
    if config is None:
        return dict(shapes)
    found: Shapes = {}
    for name, shape in shapes.items():
        packed = len(shape) == 2 and is_int4(name, config.layout, store)
        found |= stored_parts(name, shape, config.layout) if packed else {name: shape}
    return found


def int4_dtypes(expected: Iterable[str], config: Int4Config | None) -> dict[str, tuple[str, ...]]:
    """4 位权重的各个张量可以是什么 dtype。"""
    if config is None:
        return {}
    return {name: part_dtypes(name) for name in expected if name.endswith(_PARTS)}


def check_declared(
    path: Path,
    main: Mapping[str, tuple[int, ...]],
    drafts: Mapping[str, tuple[int, ...]],
    config: Int4Config | None,
    store: TensorStore,
) -> None:
    """声明与文件一致：说了不量化的不是 4 位，说了量化的是 4 位。

    Args:
        path: 检查点目录，写进报错。
        main, drafts: 主干与 MTP 层应有的张量，按没有量化的名字；transformers 不读 MTP 层，声明没有说它们也必须量化。
        config: 声明；不是 4 位的检查点为 ``None``。
        store: 检查点张量。

    Raises:
        DsxError: ``DSX-E651``。
    """
    if config is None:
        return
    count = 0
    for name in linear_weights((*main.items(), *drafts.items())):
        packed, declared = is_int4(name, config.layout, store), config.declares(name.removesuffix(WEIGHT))
        count += packed
        if packed and declared is False:
            raise _contradiction(path, name, "声明说不量化，文件里却是 4 位")
        if declared and not packed and name in main:
            raise _contradiction(path, name, "声明说是 4 位，文件里却不是")
    if not count:
        todo = "若权重已经反量化过，从 config.json 里删掉 quantization_config；否则重新下载"
        what = f"{path} 的 config.json 声明 quant_method: {config.layout.method}，文件里却没有 4 位的权重"
        raise DsxError("DSX-E651", what, todo)


def linear_weights(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Iterator[str]:
    """其中线性层的权重。"""
    for name, shape in shapes:
        if len(shape) == 2 and not name.endswith(_NOT_LINEAR):
            yield name


def _contradiction(path: Path, name: str, what: str) -> DsxError:
    return DsxError(
        "DSX-E651",
        f"{path} 的 {name.removesuffix(WEIGHT)}：quantization_config 的{what}",
        "ignore、targets、modules_to_not_convert 与权重要说同一件事：重新下载，或重新量化",
    )
