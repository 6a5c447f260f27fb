"""提前编译：启动表 → 带 cubin 的 :data:`~deepseek_export.kernels.program.Program`，不需要 GPU。

编译结果按内容存进 :class:`~deepseek_export.disk_cache.DiskCache`：键是 kernel 源码（连同内联进来的）、Triton 版本、SM、签名、常数与编译选项的
sha256；损坏的条目当作没有，重新编译。
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from dataclasses import asdict
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepseek_export.disk_cache import DiskCache
from deepseek_export.errors import DsxError
from deepseek_export.kernels.program import POINTER_ALIGNMENT, CompiledKernel, LaunchTable, Program
from deepseek_export.kernels.table import KernelSpec, check_sm

logger = logging.getLogger(__name__)

CACHE = DiskCache("kernels")

_ALIGNED = [["tt.divisibility", POINTER_ALIGNMENT]]
_INLINED = re.compile(r"^from deepseek_export\.kernels\.(\w+) import", re.MULTILINE)
_ENTRY = re.compile(r"\.visible \.entry \w+\((.*?)\)", re.DOTALL)
#: Triton 类型 → PTX 形参类型；指针都是 ``u64``。
_PTX_TYPES = {"i32": "u32", "fp32": "f32"}


def compile_table(table: LaunchTable[KernelSpec]) -> Program:
    """编译启动表里的每个 kernel。

    Raises:
        DsxError: 见 :func:`compile_kernel`。
    """
    return table.map(lambda spec: compile_kernel(spec, table.sm))


def compile_kernel(spec: KernelSpec, sm: int) -> CompiledKernel:
    """编译一个 kernel，或从缓存取出。

    Args:
        spec: 编译什么。
        sm: 计算能力，例如 90。

    Raises:
        DsxError: ``DSX-E901`` 没有这种 SM；``DSX-E902`` 没有 Triton；``DSX-E904`` kernel 超出这种 SM 的共享内存。
    """
    limits, key = check_sm(sm), cache_key(spec, sm)
    stored = CACHE.get(key)
    if stored is None:
        kernel = _compile(spec, sm)
        CACHE.put(key, _pack(kernel))
    else:
        kernel = _unpack(stored)
    if kernel.shared > limits.shared:
        raise DsxError(
            "DSX-E904",
            f"{spec.function} 在 sm{sm} 上要 {kernel.shared} 字节共享内存，上限是 {limits.shared}",
            "这组形状在这种卡上没有合适的块；不用插件时 TensorRT 会内联函数体",
        )
    return kernel


def cache_key(spec: KernelSpec, sm: int) -> str:
    """缓存的键：决定编译结果的一切。

    Raises:
        DsxError: ``DSX-E902``。
    """
    parts = [
        _source_digest(spec.module),
        _triton_version(),
        sm,
        spec.function,
        spec.signature,
        spec.constants,
    ]
    text = json.dumps([*parts, spec.num_warps, spec.num_stages])
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def toolkit_version(sm: int) -> str:
    """编译 ``sm`` 的机器码的 ptxas 属于哪一版 CUDA，例如 ``13.4``；Triton 按 SM 带了新旧两个。

    Raises:
        DsxError: ``DSX-E902``。
    """
    _triton_version()
    from triton.backends.nvidia.compiler import get_ptxas

    found: str = get_ptxas(sm).version
    return found


def _triton_version() -> str:
    if find_spec("triton") is None:
        raise DsxError("DSX-E902", "没有安装 triton", "pip install -U 'deepseek-export[kernels]'")
    return version("triton")


def _source_digest(module: str) -> str:
    """源码，连同它导入的别的 kernel 模块：里面的函数内联进来，改了机器码也变。"""
    text = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    parts = [text, *map(_source_digest, sorted(set(_INLINED.findall(text))))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _compile(spec: KernelSpec, sm: int) -> CompiledKernel:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function: Any = getattr(import_module(f"deepseek_export.kernels.{spec.module}"), spec.function)
    constants = dict(spec.constants)
    runtime = dict(spec.signature)
    signature = {name: runtime.get(name, "constexpr") for name in function.arg_names}
    aligned = {(index,): _ALIGNED for index, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(function, signature, constants, aligned)
    # 编译器随版本改过乘加融合的缺省值，写明才可复现。
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True}
    logger.info("编译 %s sm%d %s", spec.function, sm, constants)
    with tempfile.TemporaryDirectory() as scratch, knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = scratch  # 只留 dsx 自己的缓存，不在用户目录里另存一份
        knobs.compilation.disable_line_info = True  # 行号信息里有源码的绝对路径，机器码会因安装位置而不同
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    metadata = compiled.metadata
    # dsx 的插件不为 kernel 准备 scratch；哪天编译器要用，必须在这里停下，而不是运行时越界。
    for kind in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, kind, 0):
            raise RuntimeError(f"{spec.function} 需要 {kind}={getattr(metadata, kind)}")
    scratch_count = _check_parameters(spec, compiled.asm["ptx"])
    threads = metadata.num_warps * metadata.target.warp_size
    return CompiledKernel(metadata.name, compiled.asm["cubin"], threads, metadata.shared, scratch_count)


def _check_parameters(spec: KernelSpec, ptx: str) -> int:
    """入口的形参就是签名加末尾的 scratch 指针；返回 scratch 指针的个数。启动时没有别的机会发现次序不对。"""
    entry = _ENTRY.search(ptx)
    found = re.findall(r"\.param \.(\w+)", entry[1]) if entry else []
    want = [_PTX_TYPES.get(kind, "u64") for _, kind in spec.signature]
    scratch = found[len(want) :]
    if found[: len(want)] != want or set(scratch) - {"u64"}:
        raise RuntimeError(f"{spec.function} 的入口形参是 {found}，应以 {want} 开头，之后只有 scratch 指针")
    return len(scratch)


def _pack(kernel: CompiledKernel) -> bytes:
    header = {name: value for name, value in asdict(kernel).items() if name != "cubin"}
    return json.dumps(header).encode() + b"\n" + kernel.cubin


def _unpack(content: bytes) -> CompiledKernel:
    header, _, cubin = content.partition(b"\n")
    return CompiledKernel(cubin=cubin, **json.loads(header))
