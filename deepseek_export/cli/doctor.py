"""``dsx doctor``。"""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import click

from deepseek_export.cli.console import console, echo_json, facts, table
from deepseek_export.cli.formatting import Command
from deepseek_export.cli.options import json_option
from deepseek_export.cpu_library import BUILD_COMMAND, find_library
from deepseek_export.disk_cache import DiskCache
from deepseek_export.errors import DsxError
from deepseek_export.machine import cores, cpu_flags, installed, memory_bytes, nvidia
from deepseek_export.units import size
from deepseek_export.version import __version__

#: 处理器 → 列出的 CPU 标志，Linux 的名字；别的处理器一个也不列。
CPU_FLAGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "x86_64": ("avx2", "avx_vnni", "avx512f", "avx512_bf16", "amx_tile"),
        "aarch64": ("asimddp", "i8mm", "bf16"),
    }
)


#: 编译与校验要的一组；只跑 bundle 的人不必有，没有不算毛病，太旧才算。
EXPORT = "export"


class Package(NamedTuple):
    """一个要看版本的包；``extra`` 是 ``None`` 的谁都要有。"""

    name: str
    extra: str | None
    purpose: str


PACKAGES = (
    Package("torch", EXPORT, "参考模型与捕获"),
    Package("onnx", EXPORT, "计算图的读写与检查"),
    Package("onnxruntime", None, "运行 bundle"),
    Package("onnxscript", EXPORT, "torch.export → ONNX"),
    Package("polygraphy", EXPORT, "dsx compare 的文件与复现命令"),
    Package("transformers", "hf", "dsx verify 的基准"),
    Package("tensorrt", "tensorrt", "TensorRT 引擎，在目标 GPU 上建"),
    Package("tensorrt_rtx", "rtx", "TensorRT-RTX 引擎，不用 GPU 也能建"),
    Package("triton", "kernels", "编译插件的 kernel，建引擎时用"),
    Package("cuda_bindings", "kernels", "在 GPU 上运行引擎"),
)


class Target(NamedTuple):
    """一个编译目标；导出只要必需的依赖，哪个目标都一样。

    Attributes:
        purpose: 在哪里跑。
        build: 建引擎另要的包；不建引擎的目标没有。
        build_needs_gpu: 建引擎要不要 GPU。
    """

    purpose: str
    build: tuple[str, ...] = ()
    build_needs_gpu: bool = False


#: 与 passes 的流水线一致由测试保证（导入 passes 会带进 torch）。
TARGETS = {
    "portable": Target("任何 ONNX Runtime"),
    "ort-cpu": Target("ONNX Runtime CPU 的 MoE kernel"),
    "tensorrt": Target("完整的 TensorRT，插件核与原生层", ("tensorrt", "triton"), build_needs_gpu=True),
    "tensorrt-rtx": Target("TensorRT-RTX，插件核与原生层", ("tensorrt_rtx", "triton")),
}
#: 引擎在 GPU 上跑，由它驱动。
_RUN_ENGINE = "cuda_bindings"
_GPU = "GPU"


@click.command("doctor", cls=Command, short_help="看这台机器的环境，或一个 bundle 缺什么插件")
@click.argument("bundle", metavar="[OUT]", required=False, type=click.Path(path_type=Path))
@click.option("--kernels", is_flag=True, help="另把插件的 kernel 为每种 SM 编译一遍，读机器码；要 triton。")
@json_option
@click.pass_context
def command(ctx: click.Context, bundle: Path | None, kernels: bool, as_json: bool) -> None:
    """检查 Python、CPU、内存、GPU、依赖的版本，以及每个目标在这里能做到哪一步；给出 OUT 时另看它的插件。

    不给 OUT 时只读安装信息，问一次 nvidia-smi；给了则逐个列出插件节点、需要的 creator、在已装的 TensorRT 里登记得上没有，缺什么、怎么装，以及
    dsx build 会不会拒绝它。--kernels 不要 GPU：主循环里乘加重不重复、拷贝与计算重不重叠、有没有溢出到本地内存；占峰值的几成是估计。
    运行要的依赖缺少、编译要的装着却太旧、有插件登记不上、这个 bundle 建不了引擎时，退出码是 1。
    """
    found = diagnose()
    if bundle is not None:
        from deepseek_export.cli.bundle_plugins import diagnose_bundle

        found["bundle"] = diagnose_bundle(bundle)
        found["ok"] = found["ok"] and found["bundle"]["ok"]
    if kernels:
        from deepseek_export.cli.kernel_audit import audit_kernels
        from deepseek_export.cli.progress import open_progress

        with open_progress(as_json) as progress:
            found["kernels"] = audit_kernels(progress)
    if as_json:
        echo_json(found)
    else:
        _print(found)
        if kernels:
            from deepseek_export.cli.kernel_audit import print_kernels

            print_kernels(found["kernels"])
        if bundle is not None:
            from deepseek_export.cli.bundle_plugins import print_bundle

            print_bundle(found["bundle"])
    ctx.exit(0 if found["ok"] else 1)


def diagnose() -> dict[str, Any]:
    """全部检查结果；``--json`` 输出的就是它。"""
    floors = _floors()
    packages = [_package(package, floors.get(_normal(package.name))) for package in PACKAGES]
    status = {package["name"]: package["status"] for package in packages}
    found = nvidia()
    flags = cpu_flags()
    traces = DiskCache("traces").directory
    return {
        "ok": all(p["status"] == "ok" or _does_without(p) for p in packages),
        "dsx": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": {"cores": cores(), "flags": None if flags is None else _shown_flags(flags)},
        "memory_bytes": memory_bytes(),
        "packages": packages,
        "gpu": {
            "driver": found.driver,
            "gpus": [gpu._asdict() for gpu in found.gpus],
            "problem": found.problem,
        },
        "targets": {name: _target(target, status, bool(found.gpus)) for name, target in TARGETS.items()},
        "cpu_library": _cpu_library(),
        "trace_cache": None if traces is None else str(traces),
    }


def _shown_flags(flags: set[str]) -> dict[str, bool]:
    return {flag: flag in flags for flag in CPU_FLAGS.get(platform.machine(), ())}


def _does_without(package: dict[str, Any]) -> bool:
    """没有它，这里的 dsx 照样是好的；编译要的一组可以没有，不可以太旧。"""
    return package["extra"] not in (None, EXPORT) or (package["extra"], package["status"]) == (
        EXPORT,
        "missing",
    )


def _target(target: Target, status: dict[str, str], has_gpu: bool) -> dict[str, Any]:
    """``export``、``build``、``run`` 各缺什么；空的就是做得了。不建引擎的目标，``build`` 是 ``None``，导出了就能跑。"""
    required = [package.name for package in PACKAGES if package.extra in (None, EXPORT)]

    def absent(*names: str) -> list[str]:
        return [name for name in names if status[name] != "ok"]

    export = absent(*required)
    if not target.build:
        return {"export": export, "build": None, "run": absent("onnxruntime")}
    gpu = [] if has_gpu else [_GPU]
    build = [*absent(*target.build), *(gpu if target.build_needs_gpu else [])]
    return {"export": export, "build": build, "run": [*absent(target.build[0], _RUN_ENGINE), *gpu]}


def _target_lines(found: dict[str, Any]) -> str:
    verbs = {"export": "导出", "build": "建引擎", "run": "运行"}
    lacks = {verbs[step]: missing for step, missing in found.items() if missing is not None}
    ready = [verb for verb, missing in lacks.items() if not missing]
    lines = [f"能{'、'.join(ready)}"] if ready else []
    return "；".join([*lines, *(f"{verb}缺 {'、'.join(names)}" for verb, names in lacks.items() if names)])


def _gpu_line(found: dict[str, Any]) -> str:
    if found["problem"] is not None:
        return f"看不了：{found['problem']}"
    if not found["gpus"]:
        return "没有 NVIDIA 驱动" if found["driver"] is None else f"没有，驱动 {found['driver']}"
    gpus = Counter(f"{gpu['name']}（sm{gpu['sm']}，{size(gpu['memory_bytes'])}）" for gpu in found["gpus"])
    shown = "、".join(f"{count} × {name}" if count > 1 else name for name, count in gpus.items())
    return f"{shown}，驱动 {found['driver']}"


def _cpu_library() -> dict[str, Any]:
    """算子库的位置与指令集；用不了时是原因，不影响退出码：模型照样走函数体。"""
    try:
        library = find_library()
    except DsxError as error:
        return {"path": None, "isa": None, "isas": [], "problem": f"{error.code} {error.what}"}
    if library is None:
        return {"path": None, "isa": None, "isas": [], "problem": None}
    return {"path": str(library.path), "isa": library.isa, "isas": list(library.isas), "problem": None}


def _library_line(library: dict[str, Any]) -> str:
    if library["problem"] is not None:
        return f"用不了：{library['problem']}"
    if library["path"] is None:
        return f"没有（{BUILD_COMMAND} 构建）；dsx 算子走 ONNX 函数体"
    return f"有：{library['isa']}；这台机器能用 {'、'.join(library['isas'])}"


def _package(package: Package, floor: str | None) -> dict[str, Any]:
    names = [package.name]
    if package.name.startswith("tensorrt"):
        names.append(f"{package.name}_cu13")  # 轮子名字带着 CUDA 的版本
    version = installed(*names)
    old = version is not None and floor is not None and _numbers(version) < _numbers(floor)
    status = "missing" if version is None else "old" if old else "ok"
    return {**package._asdict(), "version": version, "required": floor, "status": status}


def _floors() -> dict[str, str]:
    """pyproject.toml 里写的最低版本，取自安装信息。"""
    try:
        requires = metadata.requires("deepseek-export") or []
    except metadata.PackageNotFoundError:
        return {}
    found = {}
    for line in requires:
        if re.search(r"""extra == ['"]dev['"]""", line):
            continue  # 开发用的下限比用户的高
        match = re.match(r"([\w.-]+)[^;]*>=\s*([\d.]+)", line)
        if match:
            found[_normal(match[1].removesuffix("-cu13"))] = match[2]
    return found


def _normal(name: str) -> str:
    return name.lower().replace("-", "_")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _print(found: dict[str, Any]) -> None:
    out = console()
    flags = found["cpu"]["flags"]
    shown = (
        "未知" if flags is None else "  ".join(f"{name} {'有' if on else '无'}" for name, on in flags.items())
    )
    memory = found["memory_bytes"]
    out.print(
        facts(
            f"dsx {found['dsx']}",
            [
                ("Python", found["python"]),
                ("平台", found["platform"]),
                ("CPU", "；".join(filter(None, (f"{found['cpu']['cores']} 核", shown)))),
                ("内存", "未知" if memory is None else size(memory)),
                ("GPU", _gpu_line(found["gpu"])),
                ("C++ 算子库", _library_line(found["cpu_library"])),
                ("捕获缓存", found["trace_cache"] or "关（DSX_NO_CACHE）"),
            ],
        )
    )
    out.print()
    made = table("依赖", "包", "版本", "要求", "状态", "用途", "安装", optional=("用途", "要求"))
    states = {"ok": ("正常", "green"), "old": ("太旧", "bold red"), "missing": ("没有", "dim")}
    for package in found["packages"]:
        text, style = states[package["status"]]
        if package["status"] == "missing" and package["extra"] is None:
            text, style = "缺少", "bold red"
        install = "" if package["status"] == "ok" else _install(package)
        floor = f"≥ {package['required']}" if package["required"] else "-"
        made.add_row(
            package["name"], package["version"] or "-", floor, text, package["purpose"], install, style=style
        )
    out.print(made)
    out.print()
    made = table("编译目标", "目标", "在哪里跑", "这里", optional=("在哪里跑",))
    for name, target in TARGETS.items():
        made.add_row(name, target.purpose, _target_lines(found["targets"][name]))
    out.print(made)


def _install(package: dict[str, Any]) -> str:
    extra = f"[{package['extra']}]" if package["extra"] else ""
    return f"pip install -U 'deepseek-export{extra}'"
