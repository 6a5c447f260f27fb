"""构建 ``plugins/cpu``，把 ``libdsx_cpu`` 放进包里；只用标准库，因为安装包的构建环境里也要运行它。

    python plugins/cpu/build.py [--fetch | --headers] [--target aarch64]

编译好的库按源码、头文件、编译器与处理器存进 dsx 的磁盘缓存（``DSX_HOME``，缺省 ``~/.cache/dsx``），另一个检出、``make clean`` 之后都不必
再编译；``DSX_NO_CACHE=1`` 不读不写。

缺编译器、CMake 或头文件不是错：说明原因，退出码 0，dsx 照常走函数体。编译失败是错，退出码 1。
``--target`` 为另一种处理器交叉编译，放在 build/cpu-<处理器>/out/ 里，不动本机的库；缺什么是错。
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "plugins/cpu"
INSTALLED = ROOT / "deepseek_export/_native"
BUILD = ROOT / "build/cpu"
HEADER = "onnxruntime_cxx_api.h"
#: 能交叉编译的处理器：CMake 的工具链文件，它用的编译器，编译器的 Debian 包。
TARGETS = {"aarch64": ("aarch64-linux-gnu.cmake", "aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")}
#: 发布的 wheel 用的头文件：1.21.0，正是库登记时用的接口版本；取来的逐个核对 sha256。自己给的头文件可以更新。
PINNED = {
    "onnxruntime_c_api.h": "7783e9664bdb0b1b36145b5c8587dd1bc9a399aa000edf2e3dd03003cafc6882",
    "onnxruntime_cxx_api.h": "b3b27d6a6fced0725e3f188379cca008b1d7a456997684756374d4b388f2cf05",
    "onnxruntime_cxx_inline.h": "7f448e994c732eacd9e49900365fefa8f1ac998a6d6eb78e5f4aab1b8d9d8900",
    "onnxruntime_float16.h": "6c4db3d1954b266c4febe413351af86cac922e3448538e7e452e51d646e56a4a",
}
PINNED_VERSION = "1.21.0"
PINNED_PACKAGE = f"libonnxruntime-dev={PINNED_VERSION}*"  # 各发行版的后缀不同，内容反正要核对
_LIBRARY = "libdsx_cpu.so"  # CMake 的 MODULE 在 macOS 上也是 .so
#: make 与 ninja 编译一个文件时说的那一行。
_COMPILING = re.compile(r"\[\s*([\d/]+%?)\] Building CXX object (?:\S*/)?(\S+?)\.o\b")
_SYSTEM_INCLUDES = (
    "/usr/include/onnxruntime",
    "/usr/local/include/onnxruntime",
    "/usr/include/onnxruntime/core/session",
    "/usr/local/include/onnxruntime/core/session",
)


class Unavailable(Exception):
    """这台机器上构建不了；文字是原因与怎么办。"""


def build(
    fetch: bool = False,
    *,
    directory: Path | None = None,
    out: Path | None = None,
    sanitize: str = "",
    target: str = "",
    driver: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """构建并安装。

    Args:
        fetch: 没有头文件时，用 ``apt-get download`` 取钉住的那个 Debian 包，核对 sha256，解到 build/ 里，不改系统。
        directory: CMake 的构建目录；缺省在 build/ 里。
        out: 库放在哪里；缺省是包里，交叉编译的在构建目录的 out/ 里。
        sanitize: 传给 ``-fsanitize=`` 的值。
        target: 为哪种处理器交叉编译，``TARGETS`` 之一；缺省是本机。
        driver: 另构建不经 ONNX Runtime 的 ``dsx_cpu_driver``，留在构建目录里。
        say: 进度，一次一行。

    Returns:
        库的路径。

    Raises:
        Unavailable: 缺编译器、CMake 或头文件；没有这种处理器的工具链。
        subprocess.CalledProcessError: 编译失败，``output`` 是编译器的输出。
    """
    if platform.system() == "Windows":
        raise Unavailable("C++ 算子库还没有移植到 Windows")
    if shutil.which("cmake") is None:
        raise Unavailable("没有 cmake：安装 3.20 以上的 CMake")
    toolchain = _toolchain(target)
    stored = directory is None and not sanitize and not driver
    directory = directory or (BUILD.with_name(f"cpu-{target}") if target else BUILD)
    out = out or (directory / "out" if target else INSTALLED)
    include = find_header() or (_fetch_header() if fetch else None)
    if include is None:
        raise Unavailable(
            "没有 ONNX Runtime 的 C API 头文件：apt-get install libonnxruntime-dev，或设 ORT_INCLUDE_DIR"
        )
    key = _key(include, target) if stored else None
    if key is not None and (content := _cache().get(key)) is not None:
        say("C++ 算子库没有变，取编译过的那一份")
        return _placed(content, out / _LIBRARY)
    cores = _cores()
    say(f"编译 C++ 算子库：{cores} 个核，两核上约半分钟")
    options = [f"-DORT_INCLUDE_DIR={include}", f"-DDSX_SANITIZE={sanitize}", *toolchain]
    _run("cmake", "-S", SOURCES, "-B", directory, *options, f"-DCMAKE_INSTALL_PREFIX={out}")
    targets = ["install", *(["dsx_cpu_driver"] if driver else [])]
    _compile(["cmake", "--build", str(directory), "--parallel", str(cores), "--target", *targets], say)
    if key is not None:
        _cache().put(key, (out / _LIBRARY).read_bytes())
    return out / _LIBRARY


def _cache() -> Any:
    """dsx 的磁盘缓存：同一个地方，同样核对内容。它只用标准库，依赖都没装也能导入。"""
    sys.path.insert(0, str(ROOT))
    try:
        from deepseek_export.disk_cache import DiskCache
    finally:
        sys.path.remove(str(ROOT))
    return DiskCache("cpu-library", 8)


def _key(include: Path, target: str) -> str:
    """决定库的内容的全部：系统、处理器、编译器、选项、头文件、源码。"""
    compiler = TARGETS[target][1] if target else _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    kind = [platform.system(), *platform.libc_ver(), target or platform.machine()]
    digest = hashlib.sha256()
    for part in (*kind, version, os.environ.get("CXXFLAGS", ""), os.environ.get("LDFLAGS", "")):
        digest.update(part.encode() + b"\0")
    sources = [path for path in SOURCES.iterdir() if path.suffix in (".cc", ".h", ".txt", ".cmake")]
    for path in [*sorted(sources), *(include / name for name in PINNED)]:
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _placed(content: bytes, path: Path) -> Path:
    """把库放好；整个换上去，正在用旧的那一份的进程不受影响。"""
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_bytes(content)
        os.replace(scratch, path)
    return path


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compile(command: Sequence[str], say: Callable[[str], None]) -> None:
    """编译，编译到哪个文件就说哪个。

    Raises:
        subprocess.CalledProcessError: 编译失败，``output`` 是编译器的输出。
    """
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if found := _COMPILING.match(line):
                say(f"  {found[1]:>6} {found[2]}")
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command), "".join(lines))


def _toolchain(target: str) -> list[str]:
    """本机的编译器在不在；交叉编译的，CMake 的选项。"""
    if target:
        if target not in TARGETS:
            raise Unavailable(f"不会为 {target} 交叉编译，能用：{'、'.join(TARGETS)}")
        file, compiler, package = TARGETS[target]
        if shutil.which(compiler) is None:
            raise Unavailable(f"没有 {compiler}：apt-get install {package}")
        return [f"-DCMAKE_TOOLCHAIN_FILE={SOURCES / file}"]
    _compiler()
    return []


def _compiler() -> str:
    """本机的 C++ 编译器。"""
    names = (os.environ.get("CXX") or "c++", "g++", "clang++")
    found = next((name for name in names if shutil.which(name)), None)
    if found is None:
        raise Unavailable("没有 C++17 编译器：安装 g++ 或 clang++")
    return found


def find_header() -> Path | None:
    """头文件所在的目录：``ORT_INCLUDE_DIR``，或系统的常用位置，或上次取来的。"""
    return next((path for path in _candidates() if (path / HEADER).is_file()), None)


def pinned_header() -> Path:
    """钉住的头文件所在的目录，给发布的 wheel 用；本机没有就取一份。

    Raises:
        Unavailable: ``ORT_INCLUDE_DIR`` 里的不是钉住的那一版；没有设它，而本机没有，也取不到。
    """
    found = next((path for path in _candidates() if _is_pinned(path)), None)
    if found is None and (given := os.environ.get("ORT_INCLUDE_DIR")):
        raise Unavailable(
            f"ORT_INCLUDE_DIR={given} 里不是钉住的 ONNX Runtime {PINNED_VERSION} 头文件：换一个，或不设它"
        )
    found = found or _fetch_header()
    if found is None:
        raise Unavailable(
            f"没有钉住的 ONNX Runtime {PINNED_VERSION} 头文件，apt-get download {PINNED_PACKAGE} 也取不到："
            f"把 ORT_INCLUDE_DIR 指向 {PINNED_VERSION} 的头文件"
        )
    return found


def _candidates() -> list[Path]:
    given = os.environ.get("ORT_INCLUDE_DIR")
    return [Path(path) for path in ([given] if given else [*_SYSTEM_INCLUDES, str(_fetched())])]


def _is_pinned(folder: Path) -> bool:
    """每个用得到的头文件都在，内容就是钉住的。"""
    paths = [folder / name for name in PINNED]
    if not all(path.is_file() for path in paths):
        return False
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths] == list(PINNED.values())


def _fetched() -> Path:
    return ROOT / "build/onnxruntime-headers/usr/include/onnxruntime"


def _fetch_header() -> Path | None:
    """取钉住的头文件包并核对；没有 apt、没有网络、没有这一版都返回 ``None``，内容对不上则抛出 ``Unavailable``。"""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return None
    folder = _fetched().parents[2]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _run("apt-get", "download", PINNED_PACKAGE, cwd=folder)
        for package in folder.glob("libonnxruntime-dev*.deb"):
            _run("dpkg-deb", "-x", package, folder)
            package.unlink()
    except subprocess.CalledProcessError:
        return None
    if not _is_pinned(_fetched()):
        raise Unavailable(f"{PINNED_PACKAGE} 取来了，内容却不是钉住的那一份：{_fetched()}")
    return _fetched()


def _run(*command: str | Path, cwd: Path | None = None) -> None:
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main() -> int:
    """命令行入口。"""
    parser = argparse.ArgumentParser(description="构建 C++ 算子库，放进 deepseek_export/_native/。")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--fetch", action="store_true", help="没有头文件时试着取一份，解到 build/ 里")
    what.add_argument("--headers", action="store_true", help="不构建，只印出钉住的头文件在哪里；没有就取")
    parser.add_argument("--target", default="", help="交叉编译给哪种处理器：" + "、".join(TARGETS))
    arguments = parser.parse_args()
    if arguments.headers:
        try:
            print(pinned_header())
        except Unavailable as reason:
            print(reason, file=sys.stderr)
            return 1
        return 0
    try:
        path = build(arguments.fetch, target=arguments.target, say=lambda line: print(line, file=sys.stderr))
    except Unavailable as reason:
        if arguments.target:
            print(f"{arguments.target} 的 C++ 算子库没有构建：{reason}", file=sys.stderr)
            return 1
        print(f"C++ 算子库没有构建：{reason}。dsx 照常可用，注意力走函数体。")
        return 0
    except subprocess.CalledProcessError as error:
        print(error.output, file=sys.stderr)
        print("C++ 算子库编译失败", file=sys.stderr)
        return 1
    print(f"C++ 算子库：{path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
