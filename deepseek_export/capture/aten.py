"""追踪得到的 PyTorch 程序：可以用真权重逐节点执行，每个节点的值对得上 ONNX 图里的值。"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind


@dataclass(frozen=True)
class AtenProgram:
    """一个块的 PyTorch 程序，已分解到 exporter 逐个翻译的 aten 节点。

    Attributes:
        program: 程序。
        values: 节点名 → 追踪结果里的值名。exporter 用节点名给值命名；它为翻译而添的中间值（``val_3``）没有对应的节点。
    """

    program: torch.export.ExportedProgram
    values: Mapping[str, str]

    @classmethod
    def of(cls, program: torch.export.ExportedProgram, names: Mapping[str, str]) -> AtenProgram:
        """建立对应。

        Args:
            program: exporter 翻译的程序。
            names: exporter 起的值名 → 追踪结果里的值名。
        """
        nodes = program.graph.nodes
        return cls(program, {n.name: names[own] for n in nodes if (own := _value_name(n)) in names})

    @torch.no_grad()
    def evaluate(self, known: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """从 ``known`` 算到 ``outputs``。

        Args:
            known: 值名 → 张量；可以是输入（含权重），也可以是中间值，后者的上游就不再执行。
            outputs: 要算出的值。

        Returns:
            沿途每个值（含 ``known``），名字是追踪结果里的值名。
        """
        interpreter = torch.fx.Interpreter(self.program.graph_module)
        nodes = {node.name: node for node in self.program.graph.nodes}
        named = {nodes[node]: value for node, value in self.values.items()}
        env = interpreter.env
        env.update({node: known[value] for node, value in named.items() if value in known})
        for spec in self.program.graph_signature.input_specs:
            if spec.kind in (InputKind.CONSTANT_TENSOR, InputKind.BUFFER):
                env[nodes[spec.arg.name]] = self.program.constants[str(spec.target)]
        pending = [node for node, value in named.items() if value in outputs]
        needed: set[torch.fx.Node] = set()
        while pending:
            node = pending.pop()
            if node not in env and node not in needed:
                needed.add(node)
                pending += node.all_input_nodes
        for node in self.program.graph.nodes:
            if node in needed:
                env[node] = interpreter.run_node(node)
        return {value: env[node] for node, value in named.items() if isinstance(env.get(node), Tensor)}


def _value_name(node: torch.fx.Node) -> str:
    """exporter 给这个节点的值起的名字；``split`` 的各段由 torchlib 命名，其余就是节点名。"""
    if node.target is operator.getitem:
        source, index = node.args
        assert isinstance(source, torch.fx.Node)
        if source.name.startswith("split"):
            return f"{source.name}_split_{index}"
    return node.name
