"""重新生成 docs/operators.md：``dsx::`` 算子的契约，由 ops/table.py 得出，tests/unit/test_ops_table.py 核对。"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deepseek_export.engine.plugins import PLUGIN_OPS
from deepseek_export.ops.spec import TYPE_CONSTRAINTS, OpSpec, Port
from deepseek_export.ops.table import DOMAIN, OPS, OPSET_VERSION, PLUGIN_NAMESPACE, PLUGIN_VERSION

PAGE = Path(__file__).resolve().parent.parent / "docs/operators.md"

_HEAD = f"""\
# `dsx::` 算子

由 `deepseek_export/ops/table.py` 生成（`make ops-header`），不要手改。域是 `{DOMAIN}`，opset {OPSET_VERSION}；TensorRT 的命名空间是 `{PLUGIN_NAMESPACE}`，插件版本
`{PLUGIN_VERSION}`。每个节点都带函数体，不装任何插件也能在 ONNX Runtime 上运行。

维度：`B` 行数，`S` 新 token 数，`T` 缓存容量，`H` 头数，`dn`/`dr`/`dv` 是 `qk_nope_head_dim`/`qk_rope_head_dim`/`v_head_dim`，`r` 是 `kv_lora_rank`，`cw` 是缓存一行的宽度，
`N` 是 B*S，`D` 是 `hidden_size`，`E` 是专家数，`I` 是 `moe_intermediate_size`，`k` 是 `num_experts_per_tok`，`K` 是草稿数，`V` 是词表大小。

| 类型变量 | 允许的 dtype |
|---|---|
"""


def page() -> str:
    """全文。"""
    types = [
        f"| `{name}` | {'、'.join(f'`{dtype}`' for dtype in kinds)} |"
        for name, kinds in TYPE_CONSTRAINTS.items()
    ]
    return _HEAD + "\n".join([*types, *(line for spec in OPS.values() for line in _op(spec))]) + "\n"


def _op(spec: OpSpec) -> Iterator[str]:
    plugin = "；TensorRT 里是插件" if spec in PLUGIN_OPS else ""
    yield from ("", f"## `{spec.name}`", "", f"torch 里是 `torch.ops.dsx.{spec.torch_name}`{plugin}。", "")
    yield from (f"> {spec.doc}", "", "| 端口 | 类型 | 形状 |", "|---|---|---|")
    yield from (_port("输入", port) for port in spec.inputs)
    yield from (_port("输出", port) for port in spec.outputs)
    if spec.attributes:
        yield from ("", "属性：" + "，".join(f"`{one.name}`（{one.kind}）" for one in spec.attributes) + "。")


def _port(way: str, port: Port) -> str:
    return f"| {way} `{port.name}` | `{port.type}` | `[{', '.join(port.dims)}]` |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
