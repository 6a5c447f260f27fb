"""TensorRT 的两种发行；只有这个文件问是哪一种。

- ``rtx``：``tensorrt_rtx``。没有 GPU 也能为列出的 SM 建引擎；没有 SM90、SM100。
- ``tensorrt``：完整的 TensorRT，只能在目标 GPU 上建引擎。
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from deepseek_export.errors import DsxError
from deepseek_export.kernels.table import SMS, check_sm
from deepseek_export.machine import installed

FlavourName = Literal["rtx", "tensorrt"]


@dataclass(frozen=True, slots=True)
class Flavour:
    """一种发行。

    Attributes:
        name: ``--flavour`` 的值，也是引擎目录名的前半。
        module: Python 包名。
        target: 对应的编译目标。
        extra: 安装时的 extra。
        cross_builds: 没有 GPU 时能否为指定的 SM 建引擎。
        unproven: 建得出引擎、但没有证据说运行得了的 SM。
    """

    name: FlavourName
    module: str
    target: str
    extra: str
    cross_builds: bool
    unproven: frozenset[int] = frozenset()

    @property
    def install(self) -> str:
        """安装它的命令。"""
        return f"pip install -U 'deepseek-export[{self.extra}]'"

    def version(self) -> str | None:
        """已安装的版本；不导入它。"""
        return installed(self.module, f"{self.module}_cu13")


FLAVOURS: Mapping[str, Flavour] = MappingProxyType(
    {
        "rtx": Flavour("rtx", "tensorrt_rtx", "tensorrt-rtx", "rtx", True, frozenset({80})),
        "tensorrt": Flavour("tensorrt", "tensorrt", "tensorrt", "tensorrt", cross_builds=False),
    }
)

_LIBRARY = "libtensorrt_rtx.so"


def choose(name: str | None = None) -> Flavour:
    """要用的发行。

    Args:
        name: ``rtx``、``tensorrt``，或 ``None``（装了哪个用哪个，先看 rtx）。

    Raises:
        DsxError: ``DSX-E910``，没有安装。
    """
    wanted = [FLAVOURS[name]] if name else list(FLAVOURS.values())
    for flavour in wanted:
        if flavour.version() is not None:
            return flavour
    names = "、".join(flavour.module for flavour in wanted)
    raise DsxError("DSX-E910", f"没有安装 {names}", " 或 ".join(flavour.install for flavour in wanted))


@functools.cache
def load(flavour: Flavour) -> Any:
    """导入这种发行的 Python 包，先核对会让进程直接中止的问题。

    Raises:
        DsxError: ``DSX-E910`` 没有安装或导入失败；``DSX-E911`` 缺少不带版本号的库名，又补不上。
    """
    if flavour.name == "rtx":
        ensure_library_link(library_folder())
    try:
        return import_module(flavour.module)
    except ImportError as error:
        raise DsxError("DSX-E910", f"导入 {flavour.module} 失败：{error}", flavour.install) from error


def library_folder() -> Path | None:
    """``tensorrt_rtx`` 的库所在目录；没有安装时为 ``None``。"""
    try:
        files = metadata.files("tensorrt_rtx_cu13_libs") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())).parent for f in files if f.name.startswith(_LIBRARY)), None)


def library_link_missing(folder: Path | None) -> bool:
    """轮子里只有 ``libtensorrt_rtx.so.1``：解析到插件节点时按不带版本号的名字 dlopen，找不到就中止整个进程。"""
    return folder is not None and not (folder / _LIBRARY).exists()


def ensure_library_link(folder: Path | None) -> None:
    """补上缺少的符号链接；已有则不动。

    Raises:
        DsxError: ``DSX-E911``，目录不可写，或没有带版本号的库可指。
    """
    if folder is None or not library_link_missing(folder):
        return
    versioned = sorted(folder.glob(f"{_LIBRARY}.*"))
    todo = f"ln -s {versioned[0].name if versioned else _LIBRARY + '.1'} {folder / _LIBRARY}"
    if not versioned:
        raise DsxError("DSX-E911", f"{folder} 里没有 {_LIBRARY}.*", f"重新安装：{FLAVOURS['rtx'].install}")
    try:
        (folder / _LIBRARY).symlink_to(versioned[0].name)
    except FileExistsError:
        return  # 另一个进程刚补上
    except OSError as error:
        raise DsxError("DSX-E911", f"{folder / _LIBRARY}：{error.strerror}", todo) from error


def parse_arch(text: str) -> int:
    """``sm89``、``89`` → 89。

    Raises:
        DsxError: ``DSX-E912``，写法不对。
    """
    match = re.fullmatch(r"(?:sm_?)?(\d{2,3})", text.strip().lower())
    if match is None:
        raise DsxError("DSX-E912", f"--arch {text!r} 不是 SM 的写法", "写成 sm89，几个用逗号隔开：sm89,sm120")
    return int(match[1])


def check_arch(flavour: Flavour, trt: Any, sm: int) -> None:
    """这种发行、这台机器能不能为 ``sm`` 建引擎，插件有没有它的 kernel。

    Raises:
        DsxError: ``DSX-E912``；``DSX-E901``，完整的 TensorRT 而插件没有这种 SM 的 kernel。
    """
    if flavour.cross_builds:
        known = [known for known in SMS if hasattr(trt.ComputeCapability, f"SM{known}")]
        if sm not in known:
            todo = (
                f"可用的有 {'、'.join(f'sm{known}' for known in known)}；sm90、sm100 用完整的 TensorRT 在目标卡上建"
                "（--flavour tensorrt）"
            )
            what = f"TensorRT-RTX {trt.__version__} 或插件的 kernel 不支持 sm{sm}"
            raise DsxError("DSX-E912", what, todo)
        return
    check_sm(sm)
    current = device_sm()
    if current != sm:
        found = "没有 GPU" if current is None else f"当前的 GPU 是 sm{current}"
        raise DsxError(
            "DSX-E912",
            f"完整的 TensorRT 只能为当前的 GPU 建引擎，要的是 sm{sm}，{found}",
            "在目标 GPU 上建，或用 --flavour rtx 跨卡建",
        )


def select_arch(flavour: Flavour, trt: Any, config: Any, sm: int) -> None:
    """让 ``config`` 为 ``sm`` 建引擎；``sm`` 先过 :func:`check_arch`。"""
    if flavour.cross_builds:
        # 从不用 CURRENT：没有 GPU 时它与插件一起会让进程中止。
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)


def device_sm() -> int | None:
    """当前 GPU 的计算能力；没有驱动或没有 GPU 时为 ``None``。"""
    try:
        from cuda.bindings import driver

        (status,) = driver.cuInit(0)
        if status != driver.CUresult.CUDA_SUCCESS:
            return None
        numbers = []
        for part in ("MAJOR", "MINOR"):
            key = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}")
            status, value = driver.cuDeviceGetAttribute(key, 0)
            if status != driver.CUresult.CUDA_SUCCESS:
                return None
            numbers.append(value)
    except (ImportError, RuntimeError):
        return None  # 没有驱动时 cuda-bindings 抛 RuntimeError 的子类
    return numbers[0] * 10 + numbers[1]


def network_flags(trt: Any) -> int:
    """强类型网络；新版把它作为唯一的方式时没有这个标志。"""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def layer_information(flavour: Flavour, trt: Any, log: list[str], content: memoryview, logger: Any) -> str:
    """引擎的全部层，一行一层；引擎读不回来时为空。

    RTX 没有 GPU 也在详细日志里印出来；完整的 TensorRT 反序列化之后由 inspector 给出同样的文本。
    """
    if flavour.cross_builds:
        return next((text for text in reversed(log) if text.startswith("Layers:")), "")
    engine = trt.Runtime(logger).deserialize_cuda_engine(content)
    if engine is None:
        return ""  # 反序列化失败：没有任何层，由调用方按日志里的原话报告
    inspector = engine.create_engine_inspector()
    information: str = inspector.get_engine_information(trt.LayerInformationFormat.ONELINE)
    return information
