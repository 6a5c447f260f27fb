"""构建 ``plugins/cpu``，把 ``libdsx_cpu`` 放进包里；只用标准库，因为安装包的构建环境里也要运行它。

    python plugins/cpu/build.py [--fetch]

缺编译器、CMake 或头文件不是错：说明原因，退出码 0，dsx 照常走函数体。编译失败是错，退出码 1。
"""

from __future__ import annotations

import argparse
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
_SYSTEM_INCLUDES = (
    "/usr/include/onnxruntime",
    "/usr/local/include/onnxruntime",
    "/usr/include/onnxruntime/core/session",
    "/usr/local/include/onnxruntime/core/session",
)


class Unavailable(Exception):
    """这台机器上构建不了；文字是原因与怎么办。"""


def build(fetch: bool = False, *, directory: Path = BUILD, out: Path = INSTALLED, sanitize: str = "") -> Path:
    """构建并安装。

    Args:
        fetch: 没有头文件时，用 ``apt-get download`` 取 Debian / Ubuntu 的头文件包，解到 build/ 里，不改系统。
        directory: CMake 的构建目录。
        out: 库放在哪里。
        sanitize: 传给 ``-fsanitize=`` 的值。

    Returns:
        库的路径。

    Raises:
        Unavailable: 缺编译器、CMake 或头文件。
        subprocess.CalledProcessError: 编译失败，``output`` 是编译器的输出。
    """
    if platform.system() == "Windows":
        raise Unavailable("C++ 算子库还没有移植到 Windows")
    if shutil.which("cmake") is None:
        raise Unavailable("没有 cmake：安装 3.20 以上的 CMake")
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        raise Unavailable("没有 C++17 编译器：安装 g++ 或 clang++")
    include = find_header() or (_fetch_header() if fetch else None)
    if include is None:
        raise Unavailable(
            "没有 ONNX Runtime 的 C API 头文件：apt-get install libonnxruntime-dev，或设 ORT_INCLUDE_DIR"
        )
    options = [f"-DORT_INCLUDE_DIR={include}", f"-DDSX_SANITIZE={sanitize}"]
    _run("cmake", "-S", SOURCES, "-B", directory, *options, f"-DCMAKE_INSTALL_PREFIX={out}")
    _run("cmake", "--build", directory, "--target", "install")
    return next(out.glob("libdsx_cpu.*"))


def find_header() -> Path | None:
    """头文件所在的目录：``ORT_INCLUDE_DIR``，或系统的常用位置，或上次取来的。"""
    given = os.environ.get("ORT_INCLUDE_DIR")
    candidates = [given] if given else [*_SYSTEM_INCLUDES, str(_fetched())]
    return next((Path(path) for path in candidates if (Path(path) / HEADER).is_file()), None)


def _fetched() -> Path:
    return ROOT / "build/onnxruntime-headers/usr/include/onnxruntime"


def _fetch_header() -> Path | None:
    """取头文件包；没有 apt、没有网络、没有这个包都返回 ``None``。"""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return None
    folder = _fetched().parents[2]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _run("apt-get", "download", "libonnxruntime-dev", cwd=folder)
        for package in folder.glob("libonnxruntime-dev*.deb"):
            _run("dpkg-deb", "-x", package, folder)
            package.unlink()
    except subprocess.CalledProcessError:
        return None
    return find_header()


def _run(*command: str | Path, cwd: Path | None = None) -> None:
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main() -> int:
    """命令行入口。"""
    parser = argparse.ArgumentParser(description="构建 C++ 算子库，放进 deepseek_export/_native/。")
    parser.add_argument("--fetch", action="store_true", help="没有头文件时试着取一份，解到 build/ 里")
    arguments = parser.parse_args()
    try:
        path = build(arguments.fetch)
    except Unavailable as reason:
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
