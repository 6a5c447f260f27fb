"""编译 ``llama_driver.cpp``：接上 llama.cpp 或 ik_llama.cpp 编译好的库。

两家都从各自的源码用 CMake 编译，静态库、共享库都行；怎么编译见 ``docs/peers.md``。哪一家由头文件看出。
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

#: llama.cpp、ik_llama.cpp 的 CMake 构建目录。
LLAMA_BUILD, IK_BUILD = "DSX_LLAMA_BUILD", "DSX_IK_LLAMA_BUILD"
_SOURCE = Path(__file__).with_name("llama_driver.cpp")
#: 编译驱动最多等几秒。
_COMPILE_S = 600
#: 链接的次序：前面的用后面的；ik_llama.cpp 只有前两个。
_LIBRARIES = ("llama", "ggml", "ggml-cpu", "ggml-base")


@dataclass(frozen=True)
class LlamaBuild:
    """一个编译好的 llama.cpp 或 ik_llama.cpp。

    Attributes:
        directory: CMake 的构建目录。
        source: 它的源码。
        ik: 是 ik_llama.cpp。
    """

    directory: Path
    source: Path
    ik: bool

    @classmethod
    def find(cls, variable: str, *, ik: bool) -> LlamaBuild:
        """环境变量 ``variable`` 指的构建目录。

        Raises:
            FileNotFoundError: 没有设、不是构建目录、没有编译完，或是另一家的。
        """
        given = os.environ.get(variable)
        if not given:
            raise FileNotFoundError(f"没有设 {variable}（怎么编译见 docs/peers.md）")
        directory = Path(given)
        cache = directory / "CMakeCache.txt"
        home = re.search(r"^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$", _text(cache), re.MULTILINE)
        source = Path(home[1]) if home else directory
        header = source / "include/llama.h"
        if not header.is_file():
            raise FileNotFoundError(f"{variable}={given} 不是 llama.cpp 的 CMake 构建目录")
        # 两家的头文件同名：ik_llama.cpp 的上下文另有 mla_attn 一项。
        if ("mla_attn" in _text(header)) != ik:
            wanted, found = ("ik_llama.cpp", "llama.cpp") if ik else ("llama.cpp", "ik_llama.cpp")
            raise FileNotFoundError(f"{variable}={given} 是 {found}，这里要 {wanted}")
        build = cls(directory, source, ik)
        if not build.libraries():
            raise FileNotFoundError(f"{variable}={given} 里没有 libllama：还没有编译完（见 docs/peers.md）")
        return build

    def libraries(self) -> list[Path]:
        """要链接的库，按次序；没有 libllama 就是空的。"""
        found = [path for name in _LIBRARIES if (path := self._library(name)) is not None]
        return found if found and found[0].stem == "libllama" else []

    def compile_driver(self, folder: Path) -> Path:
        """把驱动编译到 ``folder`` 里。

        Raises:
            FileNotFoundError: 没有 C++ 编译器。
            RuntimeError: 编译不过，带编译器的第一行错误。
        """
        compiler = next(
            (name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None
        )
        if compiler is None:
            raise FileNotFoundError("没有 C++ 编译器：安装 g++ 或 clang++")
        out = folder / ("ik-llama-driver" if self.ik else "llama-driver")
        libraries = self.libraries()
        command = [
            *(compiler, "-std=c++17", "-O2", *(["-DPEER_IK"] if self.ik else [])),
            *(f"-I{self.source / name}" for name in ("include", "ggml/include")),
            *(str(_SOURCE), "-o", str(out), "-Wl,--start-group", *map(str, libraries), "-Wl,--end-group"),
            *(f"-Wl,-rpath,{path.parent}" for path in libraries),
            *("-fopenmp", "-pthread", "-ldl"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_COMPILE_S)
        if done.returncode != 0:
            first = next(
                (line for line in done.stderr.splitlines() if "error" in line or "undefined" in line), ""
            )
            raise RuntimeError(f"{_SOURCE.name} 编译不过：{first}")
        return out

    def _library(self, name: str) -> Path | None:
        """``libname`` 在构建目录的哪里。"""
        for suffix in (".so", ".a", ".dylib"):
            if (found := next(self.directory.rglob(f"lib{name}{suffix}"), None)) is not None:
                return found
        return None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
