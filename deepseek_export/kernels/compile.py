"""提前编译：启动计划 → 带 cubin 的 :class:`~deepseek_export.kernels.program.Program`，不需要 GPU。

编译结果按内容缓存在磁盘上：键是 kernel 源码、Triton 版本、SM、签名、常数与编译选项的 sha256。文件里存着内容的 sha256，
损坏的（被截断、被改过）会被发现、重新编译并覆盖。
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache as memoize
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepseek_export.errors import DsxError
from deepseek_export.kernels.program import CompiledKernel, Launch, Program, Variant
from deepseek_export.kernels.table import KernelSpec, LaunchPlan, check_sm

logger = logging.getLogger(__name__)

_ALIGNED = [["tt.divisibility", 16]]
_ENTRY_PARAMETERS = re.compile(r"\.visible \.entry \w+\((.*?)\)", re.DOTALL)


def default_cache() -> Path:
    """缺省的缓存目录：``$XDG_CACHE_HOME/dsx/kernels``。"""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dsx" / "kernels"


def compile_plan(plan: LaunchPlan, cache: Path | None = None) -> Program:
    """编译计划里的每个 kernel。

    Args:
        plan: :mod:`~deepseek_export.kernels.table` 给出的计划。
        cache: 缓存目录；``None`` 用 :func:`default_cache`。

    Raises:
        DsxError: 见 :func:`compile_kernel`。
    """
    variants = []
    for variant in plan.variants:
        launches = tuple(
            Launch(compile_kernel(launch.kernel, plan.sm, cache), launch.grid, launch.arguments)
            for launch in variant.launches
        )
        variants.append(Variant(variant.when, variant.workspace, launches))
    return Program(plan.op, plan.sm, plan.inputs, plan.outputs, tuple(variants))


def compile_kernel(spec: KernelSpec, sm: int, cache: Path | None = None) -> CompiledKernel:
    """编译一个 kernel，或从缓存取出。

    Args:
        spec: 编译什么。
        sm: 计算能力，例如 90。
        cache: 缓存目录；``None`` 用 :func:`default_cache`。

    Raises:
        DsxError: ``DSX-E901`` 没有这种 SM；``DSX-E902`` 没有 Triton；``DSX-E904`` kernel 超出这种 SM 的共享内存；
            ``DSX-E905`` 缓存目录不可用。
    """
    limits = check_sm(sm)
    path = (cache or default_cache()) / f"{cache_key(spec, sm)}.kernel"
    kernel = _read(path)
    if kernel is None:
        kernel = _compile(spec, sm)
        _write(path, kernel)
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


def _triton_version() -> str:
    if find_spec("triton") is None:
        raise DsxError("DSX-E902", "没有安装 triton", "pip install -U 'deepseek-export[kernels]'")
    return version("triton")


@memoize
def _source_digest(module: str) -> str:
    path = Path(__file__).with_name(f"{module}.py")
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
    match = _ENTRY_PARAMETERS.search(compiled.asm["ptx"])
    assert match is not None
    scratch_count = match[1].count(".param") - len(spec.signature)
    threads = metadata.num_warps * metadata.target.warp_size
    return CompiledKernel(metadata.name, compiled.asm["cubin"], threads, metadata.shared, scratch_count)


@contextlib.contextmanager
def _cache_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what, todo = f"{path.parent}：{error.strerror}", "检查权限与空间，或用 XDG_CACHE_HOME 换一个位置"
        raise DsxError("DSX-E905", what, todo) from error


def _read(path: Path) -> CompiledKernel | None:
    with _cache_errors(path):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
    digest, payload = content[:32], content[32:]
    if hashlib.sha256(payload).digest() != digest:
        logger.warning("kernel 缓存 %s 已损坏，重新编译", path)
        return None
    header, _, cubin = payload.partition(b"\n")
    return CompiledKernel(cubin=cubin, **json.loads(header))


def _write(path: Path, kernel: CompiledKernel) -> None:
    header = {name: value for name, value in asdict(kernel).items() if name != "cubin"}
    payload = json.dumps(header).encode() + b"\n" + kernel.cubin
    # 先写旁边的临时文件再改名：并发的编译、被杀的进程都不会留下半个文件。
    with _cache_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(payload).digest() + payload)
        os.replace(file.name, path)
