"""构建 ``plugins/cpu``，把 ``libdsx_cpu`` 放进包里；只用标准库，因为安装包的构建环境里也要运行它。

    python plugins/cpu/build.py [--fetch | --headers] [--target aarch64]

缺编译器、CMake 或头文件不是错：说明原因，退出码 0，dsx 照常走函数体。编译失败是错，退出码 1。
``--target`` 为另一种处理器交叉编译，放在 build/cpu-<处理器>/out/ 里，不动本机的库；缺什么是错。
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

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
) -> Path:
    """构建并安装。

    Args:
        fetch: 没有头文件时，用 ``apt-get download`` 取钉住的那个 Debian 包，核对 sha256，解到 build/ 里，不改系统。
        directory: CMake 的构建目录；缺省在 build/ 里。
        out: 库放在哪里；缺省是包里，交叉编译的在构建目录的 out/ 里。
        sanitize: 传给 ``-fsanitize=`` 的值。
        target: 为哪种处理器交叉编译，``TARGETS`` 之一；缺省是本机。
        driver: 另构建不经 ONNX Runtime 的 ``dsx_cpu_driver``，留在构建目录里。

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
    directory = directory or (BUILD.with_name(f"cpu-{target}") if target else BUILD)
    out = out or (directory / "out" if target else INSTALLED)
    include = find_header() or (_fetch_header() if fetch else None)
    if include is None:
        raise Unavailable(
            "没有 ONNX Runtime 的 C API 头文件：apt-get install libonnxruntime-dev，或设 ORT_INCLUDE_DIR"
        )
    options = [f"-DORT_INCLUDE_DIR={include}", f"-DDSX_SANITIZE={sanitize}", *toolchain]
    _run("cmake", "-S", SOURCES, "-B", directory, *options, f"-DCMAKE_INSTALL_PREFIX={out}")
    _run("cmake", "--build", directory, "--target", "install", *(["dsx_cpu_driver"] if driver else []))
    return next(out.glob("libdsx_cpu.*"))


def _toolchain(target: str) -> list[str]:
    """本机的编译器在不在；交叉编译的，CMake 的选项。"""
    if target:
        if target not in TARGETS:
            raise Unavailable(f"不会为 {target} 交叉编译，能用：{'、'.join(TARGETS)}")
        file, compiler, package = TARGETS[target]
        if shutil.which(compiler) is None:
            raise Unavailable(f"没有 {compiler}：apt-get install {package}")
        return [f"-DCMAKE_TOOLCHAIN_FILE={SOURCES / file}"]
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        raise Unavailable("没有 C++17 编译器：安装 g++ 或 clang++")
    return []


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
        path = build(arguments.fetch, target=arguments.target)
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
