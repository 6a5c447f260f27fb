"""翻译表只解析一次，各次导出互不影响。"""

from __future__ import annotations

import sys

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

from deepseek_export.capture.trace import OPSET
from deepseek_export.capture.translations import parsed_once

pytestmark = pytest.mark.unit


def test_every_export_gets_its_own_copy_of_one_parse():
    with parsed_once():
        first = ONNXRegistry.from_torchlib(opset_version=OPSET)
    with parsed_once():
        second = ONNXRegistry.from_torchlib(opset_version=OPSET)
    assert first.opset_version == second.opset_version == OPSET
    name = next(iter(first.functions))
    assert first.functions[name][0] is second.functions[name][0]
    first.functions[name].clear()
    first.functions["mine"] = []
    assert second.functions[name]
    assert "mine" not in second.functions


def test_the_exporter_is_left_as_it_was():
    before = ONNXRegistry.__dict__["from_torchlib"]
    with parsed_once():
        assert ONNXRegistry.__dict__["from_torchlib"] is not before
    assert ONNXRegistry.__dict__["from_torchlib"] is before


def test_a_pytorch_without_that_table_still_exports(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.onnx._internal.exporter._registration", None)
    with parsed_once() as nothing:
        assert nothing is None
