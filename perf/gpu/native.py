"""C++ 启动器（``plugins/tensorrt`` 的 driver.cc 与 program.cc，不需要 TensorRT）：当场编译，与 Python 的逐位相比。"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepseek_export.kernels.program import Program

_SOURCES = Path(__file__).resolve().parents[2] / "plugins/tensorrt"
_FILES = ("launch.cc", "driver.cc", "program.cc")


def build_library(folder: Path) -> Path:
    """编译成 ``folder`` 里的动态库。

    Raises:
        FileNotFoundError: 没有 g++，或没有 triton 带的 cuda.h。
        RuntimeError: 编译失败，带编译器的原话。
    """
    compiler, triton = shutil.which("g++"), find_spec("triton")
    include = None if triton is None or triton.origin is None else Path(triton.origin).parent
    if compiler is None or include is None:
        raise FileNotFoundError("没有 g++，或没有 triton 带的 cuda.h，编译不了 C++ 启动器")
    library = folder / "libdsx_launch.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{include / 'backends/nvidia/include'}"]
    command: list[str | Path] = [
        compiler,
        *flags,
        "-o",
        library,
        *(_SOURCES / name for name in _FILES),
        "-ldl",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-300:])
    return library


def launch(
    library: ctypes.CDLL,
    program: Program,
    shapes: Sequence[Sequence[int]],
    inputs: Sequence[int],
    outputs: Sequence[int],
    workspace: int,
    stream: int,
) -> None:
    """参数同 :meth:`~deepseek_export.kernels.launcher.Launcher.enqueue`。

    Raises:
        RuntimeError: C++ 一侧的说明。
    """
    text, image = program.to_text(), program.image
    library.dsx_launch.restype = ctypes.c_char_p
    dims = [size for shape in shapes for size in shape]
    error = library.dsx_launch(
        text.encode(),
        image,
        ctypes.c_size_t(len(image)),
        ctypes.c_size_t(len(inputs)),
        (ctypes.c_int * len(shapes))(*map(len, shapes)),
        (ctypes.c_int64 * len(dims))(*dims),
        (ctypes.c_void_p * len(inputs))(*inputs),
        (ctypes.c_void_p * len(outputs))(*outputs),
        ctypes.c_void_p(workspace),
        ctypes.c_void_p(stream),
    )
    if error is not None:
        raise RuntimeError(error.decode())


def compare_launchers(card: Any, point: Any, folder: Path) -> dict[str, Any]:
    """同样的输入，两种启动器各执行一次，输出逐位相同。

    Raises:
        FileNotFoundError: 见 :func:`build_library`。
        RuntimeError: 编译或启动失败。
    """
    import torch

    from perf.gpu.sources import Source, scribble, shapes_of

    library = ctypes.CDLL(str(build_library(folder)))
    inputs = point.inputs(Source(card.device))
    runner, outputs = card.runner(point.table(card.sm), inputs), [point.outputs(inputs) for _ in range(2)]
    runner(inputs, outputs[0])
    card.synchronize()
    runner.poison()
    found = [output.clone() for output in outputs[0]]  # 就地改写的，两次的输出是同一块
    for output in outputs[1]:
        scribble(output)
    shapes = shapes_of(runner.program, inputs)
    addresses = [tensor.data_ptr() for tensor in inputs]
    launch(
        library,
        runner.program,
        shapes,
        addresses,
        [tensor.data_ptr() for tensor in outputs[1]],
        runner.workspace.data_ptr(),
        card.stream(),
    )
    card.synchronize()
    return {"ok": all(map(torch.equal, found, outputs[1]))}
