"""一个追踪好的块放在模型的哪里：它的端口、中间值、节点各叫什么。

拼接（:mod:`~deepseek_export.capture.stitch`）按它实例化；对齐校验按它把 PyTorch 的中间值对回图里的值。
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deepseek_export.capture import names
from deepseek_export.capture.trace import TracedGraph

#: 块的端口里直接用契约名、不加前缀的值。
SHARED_VALUES = {
    *(
        names.INPUT_IDS,
        names.PAST_LENS,
        names.LOGITS_POSITIONS,
        names.LOGITS,
        names.HIDDEN,
        names.PREV_HIDDEN,
    ),
    *(names.DRAFT_IDS, names.DRAFT_PROBS, names.UNIFORM, names.TEMPERATURE),
    *(names.NUM_ACCEPTED, names.NEXT_ID, names.DRAFT_ID),
}

EMBED_PORTS = {"x": names.EMBED_X, "cos": names.EMBED_COS, "sin": names.EMBED_SIN}


@dataclass(frozen=True)
class Place:
    """一个块的一处实例。

    Attributes:
        block: 追踪好的块。
        prefix: 名字的前缀，例如 ``layers.3``。
        ports: 块的端口 → 模型里的值名。
    """

    block: TracedGraph
    prefix: str
    ports: Mapping[str, str]

    @property
    def weights(self) -> list[str]:
        """块的输入里是权重的那些，名字是块里的参数名。"""
        return [name for name in self.block.inputs if name not in self.ports and name not in SHARED_VALUES]

    def value(self, name: str) -> str:
        """块里的值名（权重与常量除外）→ 模型里的值名。"""
        return self.ports.get(name) or (name if name in SHARED_VALUES else f"{self.prefix}/{name}")

    def node(self, index: int) -> str:
        """块的第 ``index`` 个节点在模型里的名字。"""
        scope = ".".join(filter(None, (self.prefix, self.block.scopes[index])))
        return f"{scope}/{self.block.nodes[index].op_type}_{index}"


def layer_ports(layer: int, caches: Iterable[str], chooser: int | None = None) -> dict[str, str]:
    """主模型一层的端口；``chooser`` 是替这一层挑 key 的那一层（可以是它自己），没有稀疏注意力则为 ``None``。"""
    ports = {
        "x_in": names.layer_output(layer - 1),
        "cos": names.EMBED_COS,
        "sin": names.EMBED_SIN,
        "attn_residual": names.attn_residual(layer),
        "x": names.layer_output(layer),
    }
    if chooser is not None:
        ports |= names.selection(chooser)
    return ports | _cache_ports(layer, caches)


def mtp_ports(layer: int, caches: Iterable[str]) -> dict[str, str]:
    """MTP 模块的端口；``layer`` 接在主干之后，缓存在它自己的图里编号 0。"""
    ports = {
        "embedding": names.EMBED_X,
        "cos": names.EMBED_COS,
        "sin": names.EMBED_SIN,
        "combined": names.COMBINED,
        "attn_residual": names.attn_residual(layer),
        "x": names.layer_output(layer),
    }
    return ports | _cache_ports(0, caches)


def head_ports(layers: int) -> dict[str, str]:
    """主模型输出头的端口；``layers`` 是层数。"""
    return {"x_in": names.layer_output(layers - 1)}


def _cache_ports(index: int, caches: Iterable[str]) -> dict[str, str]:
    ports: dict[str, str] = {}
    for cache in caches:
        ports |= {cache: names.cache_input(cache, index), f"{cache}_out": names.cache_output(cache, index)}
    return ports
