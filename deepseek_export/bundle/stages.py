"""一套 stage：同一个 bundle 在层的边上切成的几个 bundle，以及把它们合在一起的 ``stages.json``。

每个 stage 自己就是一个 bundle（``stage.0/``、``stage.1/``……），可以单独拷到另一台机器；``stages.json`` 记着整个模型的约定、每个 stage 的层与
manifest 的 sha256，所以拿混了的两套在加载之前就拒绝。分词器、配置在最外面各有一份，给发起生成的那一端用。不导入 onnx；写的一半是 :mod:`.split`。
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepseek_export.bundle.bundle import Bundle
from deepseek_export.bundle.disk import sha256_file
from deepseek_export.bundle.manifest import BundleFile, FileEntry, Manifest
from deepseek_export.errors import DsxError, first_invalid
from deepseek_export.paths import MAX_LARGE_TEXT, path_kind, read_text
from deepseek_export.progress import Progress

#: 有这个文件的目录是一套 stage。
STAGES_FILE = "stages.json"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StageItem(_Entry):
    """一个 stage。

    Attributes:
        directory: 相对这套 stage 的目录。
        layers: 解码层的编号，连着的；不含草稿模块的。
        weight_bytes: 它的图用到的权重，字节；与别的 stage 共有的各算一次。
        manifest_sha256: 它的 ``manifest.json`` 的 sha256。
    """

    directory: BundleFile
    layers: list[int]
    weight_bytes: int
    manifest_sha256: str


class StagesFile(_Entry):
    """``stages.json`` 的内容。

    Attributes:
        whole: 切开之前的 manifest：输入输出、模型、方案、缓存都是整个模型的；权重与文件不在这里，各 stage 自己有。
        stages: 按先后。
        files: 最外面的其余文件。
    """

    schema_version: Literal[1] = 1
    dsx_version: str
    whole: Manifest
    stages: list[StageItem] = Field(min_length=1)
    files: dict[BundleFile, FileEntry]


@dataclass(frozen=True)
class StageSet:
    """打开了的一套 stage。

    Attributes:
        path: 目录。
        record: ``stages.json``。
    """

    path: Path
    record: StagesFile

    @classmethod
    def open(cls, path: Path | str) -> StageSet:
        """打开，核对最外面的文件与每个 stage 的 manifest；stage 里面的文件由打开它的进程核对。

        Raises:
            DsxError: ``DSX-E741``，不是一套 stage、缺了 stage、文件被改过，或混进了另一套的。
        """
        path = Path(path)
        file = path / STAGES_FILE
        if not is_stage_set(path):
            raise _broken(f"{path} 里没有 {STAGES_FILE}")
        try:
            record = StagesFile.model_validate_json(read_text(file, MAX_LARGE_TEXT))
        except ValidationError as error:
            raise _broken(f"{file}：{first_invalid(error)}") from error
        except (OSError, ValueError) as error:
            raise _broken(f"{file} 读不了：{error}") from error
        sums = {name: entry.sha256 for name, entry in record.files.items()}
        sums |= {f"{item.directory}/manifest.json": item.manifest_sha256 for item in record.stages}
        for name, wanted in sums.items():
            if path_kind(path / name, "DSX-E741") != "file":
                raise _broken(f"{path} 缺少 {name}")
            if sha256_file(path / name) != wanted:
                raise _broken(f"{path / name} 与 {STAGES_FILE} 记的不同：被改过，或来自另一次切分")
        return cls(path, record)

    @property
    def bundle(self) -> Bundle:
        """整个模型：manifest 是切开之前的，目录里有配置与分词器，没有图与权重。"""
        return Bundle(self.path, self.record.whole)

    @property
    def directories(self) -> tuple[Path, ...]:
        """各 stage 的目录。"""
        return tuple(self.path / item.directory for item in self.record.stages)

    def check_weights(self, progress: Progress) -> None:
        """核对每个 stage 的全部文件与权重的 sha256。

        Raises:
            DsxError: 见 :meth:`Bundle.open` 与 :meth:`Bundle.check_weights`。
        """
        for directory in self.directories:
            Bundle.open(directory).check_weights(progress)

    def confirm_weights(self, verify: bool | None, progress: Progress) -> None:
        """每个 stage 的 :meth:`Bundle.confirm_weights`；没有要读的 stage 不打开，留给它自己的进程。

        Raises:
            DsxError: 见 :meth:`Bundle.open` 与 :meth:`Bundle.check_weights`。
        """
        for directory in self.directories if verify is not False else ():
            manifest = Manifest.model_validate_json(read_text(directory / "manifest.json", MAX_LARGE_TEXT))
            if verify or manifest.published:
                Bundle.open(directory).confirm_weights(verify, progress)


def is_stage_set(path: Path | str) -> bool:
    """``path`` 是不是一套 stage 的目录。"""
    try:
        return (Path(path) / STAGES_FILE).is_file()
    except (OSError, ValueError):  # 看不了的、名字不成立的：照普通的 bundle 打开，由它来说
        return False


def requested_cuts(stages: int | str, layers: int) -> int | list[tuple[int, int]]:
    """``--stages`` 的值：几个，或各段的 ``[begin, end)``。

    Args:
        stages: ``4``，或 ``"0-14,15-29"``。
        layers: 模型有几层。

    Raises:
        DsxError: ``DSX-E740``。
    """
    text = str(stages).strip()
    if not (text.isascii() and text.isdigit()):
        return parse_cuts(text, layers)
    wanted = int(text[:9])
    if not 1 <= wanted <= layers:
        raise DsxError("DSX-E740", f"--stages {text}，模型有 {layers} 层", f"取 1 到 {layers}")
    return wanted


def parse_cuts(text: str, layers: int) -> list[tuple[int, int]]:
    """``0-14,15-29,30-60`` → ``[(0, 15), (15, 30), (30, 61)]``。

    Args:
        text: 各段的首尾层号，含两端；一层可以只写一个数。
        layers: 一共几层；各段要连着，恰好铺满。

    Raises:
        DsxError: ``DSX-E740``。
    """
    found, expected = [], 0
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        last = last or first
        if not (first.isascii() and first.isdigit() and last.isascii() and last.isdigit()):
            raise _bad_cut(text, f"{part.strip()!r} 不是层号", layers)
        begin, end = int(first[:9]), int(last[:9]) + 1
        if begin != expected or end <= begin:
            raise _bad_cut(text, f"{part.strip()!r} 应从第 {expected} 层开始", layers)
        found.append((begin, end))
        expected = end
    if expected != layers:
        raise _bad_cut(text, f"到第 {expected - 1} 层为止", layers)
    return found


def _bad_cut(text: str, what: str, layers: int) -> DsxError:
    todo = f"写个数（--stages 4），或连着的几段（--stages 0-{max(layers // 2 - 1, 0)},{layers // 2}-{layers - 1}）"
    return DsxError(
        "DSX-E740", f"--stages {text}：{what}；模型有 {layers} 层，编号从 0 到 {layers - 1}", todo
    )


def _broken(what: str) -> DsxError:
    return DsxError("DSX-E741", what, "确认路径；一套 stage 由 dsx split 产生，要整个目录一起拷贝")
