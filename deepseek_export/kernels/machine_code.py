"""编译好的机器码 → 指令：用 Triton 自带的 ``nvdisasm`` 反汇编，找出主循环（最里层的、张量核指令最多的那个向后跳转）。不需要 GPU。"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from deepseek_export.errors import DsxError

_WARPGROUP = 4
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)$")
_LABEL = re.compile(r"^(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_WGMMA = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
_WAIT = re.compile(r"SB0, 0x([0-9a-f]+)")
#: 一个 warp 的 ``HMMA``：M·N·K。
_HMMA: Mapping[str, int] = MappingProxyType({"HMMA.16816": 16 * 8 * 16, "HMMA.1688": 16 * 8 * 8})
#: ``LDGSTS`` 一条、每个线程搬几个字节；没有写宽度的是 4。
_WIDTHS: Mapping[str, int] = MappingProxyType({".128": 16, ".64": 8})


@dataclass(frozen=True)
class Instruction:
    """一条指令。

    Attributes:
        name: 助记符，带后缀。
        operands: 其余。
    """

    name: str
    operands: str

    @property
    def fmas(self) -> int:
        """一个 warp 执行它，张量核做几次乘加；不是张量核指令为 0。

        ``HGMMA`` 由四个 warp 合做，各记四分之一。
        """
        if match := _WGMMA.match(self.name):
            m, n, k = map(int, match.groups())
            return m * n * k // _WARPGROUP
        return next((size for shape, size in _HMMA.items() if self.name.startswith(shape)), 0)

    @property
    def copied(self) -> int:
        """一个线程执行它，从显存异步地搬几个字节到共享内存。"""
        if not self.name.startswith("LDGSTS"):
            return 0
        return next((size for width, size in _WIDTHS.items() if width in self.name), 4)

    @property
    def spills(self) -> bool:
        """读写本地内存：寄存器放不下的。"""
        return self.name.startswith(("LDL", "STL"))

    @property
    def in_flight(self) -> int | None:
        """等异步拷贝时，允许几组还没有到；不是等待为 ``None``。"""
        if self.name != "DEPBAR.LE":
            return None
        match = _WAIT.search(self.operands)
        return None if match is None else int(match[1], 16)


def disassemble(cubin: bytes) -> list[tuple[str | None, Instruction]]:
    """机器码 → ``(标号, 指令)``；标号是落在这条指令上的那个，没有为 ``None``。

    Raises:
        DsxError: ``DSX-E902``，没有 Triton 自带的 nvdisasm，或它读不了这份机器码。
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        done = subprocess.run(
            [_nvdisasm(), "-c", str(path)], capture_output=True, text=True, check=False, errors="replace"
        )
    if done.returncode:
        raise DsxError("DSX-E902", f"nvdisasm：{done.stderr.strip()[-200:]}", "换一个版本的 triton")
    return list(_parsed(done.stdout.splitlines()))


def main_loop(code: Sequence[tuple[str | None, Instruction]]) -> list[Instruction]:
    """向后跳转围成的各个循环里，有张量核指令的最里层、乘加最多的那个的循环体；一样多取短的。没有这样的循环就是全部。

    外层的不算：流水线的头尾在里层之外，也有张量核指令，加在一起就不是一次迭代了。
    """
    places = {label: index for index, (label, _) in enumerate(code) if label is not None}
    loops: list[tuple[int, int]] = []
    for index, (_, one) in enumerate(code):
        target = _TARGET.search(one.operands) if one.name.startswith("BRA") else None
        start = places.get(target[1], index + 1) if target is not None else index + 1
        if start < index and any(_tensor_weight(inner) for _, inner in code[start : index + 1]):
            loops.append((start, index + 1))
    inside = [
        (start, end)
        for start, end in loops
        if not any(start <= low and high <= end for low, high in loops if (low, high) != (start, end))
    ]
    bodies = [[one for _, one in code[start:end]] for start, end in inside] or [[one for _, one in code]]
    return max(bodies, key=lambda body: (sum(map(_tensor_weight, body)), -len(body)))


def _tensor_weight(one: Instruction) -> int:
    return one.fmas or int(one.name.startswith("UTC") and "MMA" in one.name)


def _parsed(lines: Iterable[str]) -> Iterable[tuple[str | None, Instruction]]:
    label: str | None = None
    for line in lines:
        if match := _LABEL.match(line):
            label = match[1]
        elif match := _LINE.match(line):
            yield label, Instruction(match[2], match[3])
            label = None


def _nvdisasm() -> str:
    try:
        import triton.backends.nvidia as nvidia
    except ImportError as error:
        raise DsxError("DSX-E902", "没有安装 triton", "pip install -U 'deepseek-export[kernels]'") from error
    path = Path(next(iter(nvidia.__path__)), "bin", "nvdisasm")
    if not path.is_file():
        raise DsxError("DSX-E902", f"这个 triton 不带 nvdisasm：{path}", "换一个版本的 triton")
    return str(path)
