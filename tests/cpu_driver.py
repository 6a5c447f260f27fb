"""不经 ONNX Runtime 直接跑算子库的各个 kernel：``plugins/cpu/driver.cc``，为 aarch64 交叉编译，在 qemu-user 里跑。

两样都在 Debian 里：``g++-aarch64-linux-gnu`` 与 ``qemu-user``；缺哪个就跳过，说明原因。qemu 只证明对不对，快慢与真的机器无关，所以从不计时。
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from tests.cpu_build import builder
from tools.cpu_node import SCALE

EMULATOR = "qemu-aarch64"
SYSROOT = "/usr/aarch64-linux-gnu"
#: 指令集 → 有它的最老的 CPU（qemu 的名字）：kernel 里混进了更新的指令，在那里就是非法指令。
CPUS: Mapping[str, str] = MappingProxyType(
    {
        "plain": "cortex-a57",
        "neon": "cortex-a57",
        "neon_dotprod": "neoverse-n1",
        "neon_i8mm": "neoverse-v1",
        "neon_bf16": "neoverse-v1",
    }
)
#: 与 C++ 的 Dtype、Form 同次序。
_DTYPES = ("float32", "float16", "bfloat16", "int8")
_FORMS = ("auto", "absorb", "naive")
#: 与 driver.cc 的表同次序。
_ATTENTION, _LINEAR, _EXPERTS, _INDEXER = range(4)
#: 最慢的一次在空闲的机器上几秒；只为不无限等下去。
_SECONDS = 600


@dataclass(frozen=True)
class Request:
    """一次调用。

    Attributes:
        operator: 第几个算子。
        numbers: 参数，次序同 driver.cc。
        inputs: 输入，次序同 driver.cc。
        outputs: 各输出的形状与 dtype。
        threads: 几个线程。
    """

    operator: int
    numbers: tuple[int, ...]
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[tuple[tuple[int, ...], np.dtype], ...]
    threads: int = 1

    def on(self, threads: int) -> Request:
        """同一次调用，换一个线程数。"""
        return replace(self, threads=threads)

    def encoded(self) -> bytes:
        header = (self.operator, self.threads, len(self.numbers), *self.numbers, len(self.inputs))
        parts = [np.array(header, np.int64).tobytes()]
        for array in self.inputs:
            parts += [np.int64(array.nbytes).tobytes(), np.ascontiguousarray(array).tobytes()]
        return b"".join(parts)


@dataclass(frozen=True)
class Driver:
    """构建好的 driver。

    Attributes:
        path: 可执行文件。
        library: 同时构建的算子库。
        emulator: 在前面的命令；本机的程序是空的。
    """

    path: Path
    library: Path
    emulator: tuple[str, ...] = ()

    def start(
        self, *arguments: str, isa: str = "", cpu: str = "max", given: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """跑一次，不看成不成。"""
        environment = os.environ | {"DSX_CPU_ISA": isa, "QEMU_CPU": cpu}
        return subprocess.run(
            [*self.emulator, self.path, *arguments],
            input=given,
            env=environment,
            capture_output=True,
            check=False,
            timeout=_SECONDS,
        )

    def isas(self, cpu: str, *arguments: str) -> list[str]:
        """这种 CPU 上能用的指令集，缺省的在前。"""
        done = self.start(*(arguments or ("--isas",)), cpu=cpu)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip().split(",")

    def run(self, isa: str, requests: Sequence[Request], cpu: str | None = None) -> list[list[np.ndarray]]:
        """在一个进程里逐个做完，各返回它的输出；``cpu`` 缺省是有这个指令集的最老的。"""
        given = b"".join(request.encoded() for request in requests)
        done = self.start(isa=isa, cpu=cpu or CPUS.get(isa, "max"), given=given)
        assert done.returncode == 0, (isa, done.returncode, done.stderr.decode()[-4000:])
        answer, at, found = done.stdout, 0, []
        for request in requests:
            outputs = []
            for shape, dtype in request.outputs:
                (size,) = np.frombuffer(answer, np.int64, 1, at)
                assert size == math.prod(shape) * dtype.itemsize
                raw = np.frombuffer(answer, np.uint8, size, at + 8)
                outputs.append(raw.view(dtype).reshape(shape).copy())
                at += 8 + int(size)
            found.append(outputs)
        assert at == len(answer)
        return found


@functools.cache
def arm_driver(sanitize: str = "") -> Driver:
    """为 aarch64 构建好的 driver，在 qemu 里跑；缺什么就跳过。"""
    for tool, package in ((EMULATOR, "qemu-user"), ("cmake", "cmake")):
        if shutil.which(tool) is None:
            pytest.skip(f"没有 {tool}：apt-get install {package}")
    suffix = "-sanitized" if sanitize else ""
    directory = builder().BUILD.with_name(f"cpu-aarch64{suffix}")
    try:
        library = builder().build(target="aarch64", directory=directory, sanitize=sanitize, driver=True)
    except builder().Unavailable as reason:
        pytest.skip(f"没有为 aarch64 构建算子库：{reason}")
    return Driver(directory / "dsx_cpu_driver", library, (EMULATOR, "-L", SYSROOT))


def attention(inputs: Mapping[str, np.ndarray], form: str = "auto", in_place: bool = True) -> Request:
    """``tools.cpu_node.make_inputs`` 的输入；带着 ``indices``、``counts`` 的是稀疏注意力。"""
    B, S, H, dn = inputs["q_nope"].shape
    dr, r, T = inputs["q_pe"].shape[3], inputs["c_kv"].shape[2], inputs["kv_cache"].shape[2]
    weight = inputs["w_kv_b"]
    dv = len(weight) // H - dn
    # int8 的一行是 r 个码与每块两个字节的 scale。
    block = 2 * r // (weight.shape[1] - r) if weight.dtype == np.int8 else 0
    kinds = [_DTYPES.index(inputs[name].dtype.name) for name in ("q_nope", "kv_cache", "w_kv_b")]
    slots = inputs["indices"].shape[2] if "indices" in inputs else 0
    numbers = (B, S, H, dn, dr, dv, r, T, *kinds, block, _FORMS.index(form), int(in_place), slots)
    names = ("q_nope", "q_pe", "c_kv", "k_pe", "kv_cache", "past_lens", "w_kv_b")
    extra = (inputs["indices"], inputs["counts"]) if slots else ()
    arrays = (*(inputs[name] for name in names), np.array([SCALE], np.float32), *extra)
    outputs = (
        ((B, S, H, dv), inputs["q_nope"].dtype),
        (inputs["kv_cache"].shape, inputs["kv_cache"].dtype),
    )
    return Request(_ATTENTION, numbers, arrays, outputs)


def linear(inputs: Mapping[str, np.ndarray], bits: int, block: int) -> Request:
    """``tests.quant_node.linear_inputs`` 的输入。"""
    *rows, K = inputs["x"].shape
    N = len(inputs["codes"])
    arrays = tuple(inputs.values())
    outputs = (((*rows, N), np.dtype(np.float32)),)
    return Request(_LINEAR, (bits, math.prod(rows), K, N, block), arrays, outputs)


def experts(inputs: Mapping[str, np.ndarray], bits: int, k: int, block: int) -> Request:
    """``tests.quant_node.experts_inputs`` 的输入。"""
    N, D = inputs["x"].shape
    E, inner = inputs["log_weights"].shape[1], inputs["down"].shape[2] * 8 // bits
    outputs = (((N, D), np.dtype(np.float32)),)
    return Request(_EXPERTS, (bits, N, D, inner, E, k, block), tuple(inputs.values()), outputs)


def indexer(inputs: Mapping[str, np.ndarray], topk: int, in_place: bool = True) -> Request:
    """``tests.sparse_node.index_inputs`` 的输入。"""
    B, S, H, di = inputs["q"].shape
    cache = inputs["index_cache"]
    kinds = [_DTYPES.index(inputs[name].dtype.name) for name in ("q", "index_cache")]
    arrays = tuple(inputs[name] for name in ("q", "w", "k", "index_cache", "past_lens"))
    outputs = (
        ((B, S, topk), np.dtype(np.int32)),
        ((B, S), np.dtype(np.int32)),
        (cache.shape, cache.dtype),
    )
    return Request(_INDEXER, (B, S, H, di, cache.shape[2], topk, *kinds, int(in_place)), arrays, outputs)
