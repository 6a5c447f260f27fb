"""把好的 bundle 改坏，以及照抄打印出来的命令。"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from deepseek_export.bundle import Bundle
from deepseek_export.bundle.disk import sha256_file

#: 改一个已经拷贝好的 bundle 目录。
Change = Callable[[Path], None]


def tampered(bundle: Bundle, tmp_path: Path, change: Change) -> Bundle:
    """拷贝一份 bundle，改模型或权重，再把 manifest 的哈希补对（模拟编译器的缺陷，而不是文件损坏）。"""
    target = tmp_path / "bad"
    shutil.copytree(bundle.path, target)
    change(target)
    manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    for name in manifest["files"]:
        path = target / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (target / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")
    return Bundle.open(target)


def edit_model(change: Callable[[onnx.ModelProto], object], file: str = "model.onnx") -> Change:
    """改图。"""

    def apply(folder: Path) -> None:
        model = onnx.load(folder / file, load_external_data=False)
        change(model)
        onnx.save(model, folder / file)

    return apply


def edit_weight(
    bundle: Bundle, name: str, change: Callable[[np.ndarray], np.ndarray], file: str = "model.onnx"
) -> Change:
    """改权重文件里的一个张量；``file`` 是用到它的图。"""

    def apply(folder: Path) -> None:
        model = onnx.load(bundle.path / file, load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.name == name)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        where = {entry.key: entry.value for entry in tensor.external_data}
        with (folder / where["location"]).open("r+b") as stream:
            stream.seek(int(where["offset"]))
            array = np.frombuffer(stream.read(int(where["length"])), dtype).reshape(tuple(tensor.dims)).copy()
            stream.seek(int(where["offset"]))
            stream.write(np.ascontiguousarray(change(array)).tobytes())

    return apply


def find_node(model: onnx.ModelProto, op: str, scope: str) -> onnx.NodeProto:
    """``scope`` 之下第一个 ``op`` 节点。"""
    return next(n for n in model.graph.node if n.op_type == op and n.name.startswith(scope))


def set_float(node: onnx.NodeProto, name: str, value: float) -> None:
    """改一个浮点属性。"""
    next(attribute for attribute in node.attribute if attribute.name == name).f = value


def run_polygraphy(command: str) -> subprocess.CompletedProcess[str]:
    """把命令原样交给 shell；``polygraphy`` 用当前 Python 环境里的那一个。"""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return subprocess.run(
        command, shell=True, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
    )
