"""照着 config.pbtxt 执行的替身：隐式状态归它，一步一步的输入归客户端。"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import text_format


def definitions() -> ModuleType:
    """Triton 自己的 protobuf 定义；直接读那个文件，不导入整个客户端（它要 grpcio）。"""
    found = importlib.util.find_spec("tritonclient")
    assert found is not None
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0]) / "grpc/model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("triton_model_config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_MODULE = definitions()
_NUMPY = {"TYPE_FP32": np.float32, "TYPE_FP16": np.float16, "TYPE_INT64": np.int64, "TYPE_INT8": np.int8}


def read_config(model: Path) -> Any:
    """``config.pbtxt``；不认得的字段、写错的值在这里就过不去。"""
    return text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), _MODULE.ModelConfig())


def type_name(number: int) -> str:
    """``TYPE_FP32`` 之类。"""
    name: str = _MODULE.DataType.Name(number)
    return name


class Sequence:
    """一个序列：每一步送 ``input`` 里列的，收 ``output`` 里列的。"""

    def __init__(self, model: Path) -> None:
        self.config = read_config(model)
        self._session = onnxruntime.InferenceSession(model / "1" / self.config.default_model_filename)
        self._state = {
            state.input_name: np.zeros((1, *state.dims), _NUMPY[type_name(state.data_type)])
            for state in self.config.sequence_batching.state
        }

    def step(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """一次请求。"""
        assert set(inputs) == {port.name for port in self.config.input}
        for port in self.config.input:
            given, dims = inputs[port.name], list(port.dims)
            if port.HasField("reshape"):
                dims = list(port.reshape.shape)
            assert given.dtype == _NUMPY[type_name(port.data_type)]
            assert len(given.shape) == 1 + len(dims)
            assert all(dim in (-1, size) for dim, size in zip(dims, given.shape[1:], strict=True))
        states = self.config.sequence_batching.state
        names = [port.name for port in self.config.output] + [state.output_name for state in states]
        got = dict(zip(names, self._session.run(names, {**inputs, **self._state}), strict=True))
        self._state = {state.input_name: got[state.output_name] for state in states}
        return {port.name: got[port.name] for port in self.config.output}
