"""读取一个导出好的 bundle。"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import ValidationError

from deepseek_export.bundle.disk import sha256_file
from deepseek_export.bundle.manifest import SCHEMA_VERSION, Manifest
from deepseek_export.checkpoint import load_model_config
from deepseek_export.errors import DsxError, first_invalid
from deepseek_export.paths import MAX_LARGE_TEXT, check_readable, path_kind, read_text
from deepseek_export.progress import Progress


@dataclass(frozen=True)
class Bundle:
    """一个 bundle 目录及其 manifest。"""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """打开并核对文件是否齐全、大小是否相符（不算哈希，见 :meth:`check_hashes`）。

        Raises:
            DsxError: ``DSX-E402`` 不是 bundle、看不了或缺文件；``DSX-E403`` manifest 读不了、版本不认识或内容不成立；
                ``DSX-E406`` 文件大小不符。
        """
        path = Path(path)
        manifest_path = path / "manifest.json"
        if (kind := path_kind(path, "DSX-E402")) != "directory":
            what = f"{path} 不存在" if kind == "missing" else f"{path} 不是目录"
            raise DsxError("DSX-E402", what, "确认路径；bundle 是 dsx export 产生的目录")
        if path_kind(manifest_path, "DSX-E402") != "file":
            raise DsxError("DSX-E402", f"{path} 里没有 manifest.json", "确认路径；bundle 由 dsx export 产生")
        try:
            data = json.loads(read_text(manifest_path, MAX_LARGE_TEXT))
            version = data.get("schema_version") if isinstance(data, dict) else None
            if version != SCHEMA_VERSION:
                raise DsxError(
                    "DSX-E403",
                    f"{manifest_path} 的 schema_version = {version!r}，这一版 dsx 只认 {SCHEMA_VERSION}",
                    "用当前的 dsx 重新导出",
                )
            manifest = Manifest.model_validate(data)
        except ValidationError as error:
            raise DsxError("DSX-E403", f"{manifest_path}：{first_invalid(error)}", "重新导出") from error
        except OSError as error:
            what = f"打不开 {manifest_path}：{error.strerror}"
            raise DsxError("DSX-E403", what, "检查权限") from error
        except (ValueError, RecursionError) as error:
            what = f"{manifest_path} 不是合法的 JSON：{error}"
            raise DsxError("DSX-E403", what, "重新拷贝或重新导出") from error
        for name in (*manifest.weights.files, *manifest.files):
            if path_kind(path / name, "DSX-E402") != "file":
                raise DsxError("DSX-E402", f"{path} 缺少 {name}", "重新导出，或把整个目录一起拷贝")
            check_readable(path / name, "DSX-E402", "检查权限")
        for name, entry in manifest.files.items():
            file = path / name
            if file.stat().st_size != entry.bytes:
                raise DsxError(
                    "DSX-E406",
                    f"{file} 有 {file.stat().st_size} 字节，manifest 记的是 {entry.bytes}",
                    "文件被截断或改过：重新拷贝或重新导出",
                )
        _check_model(path, manifest)
        return cls(path, manifest)

    @property
    def model_path(self) -> Path:
        """主模型的 ONNX 文件。"""
        return self.path / self.manifest.main.file

    @property
    def draft_paths(self) -> list[Path]:
        """草稿模型的 ONNX 文件，按 MTP 模块的次序。"""
        return [self.path / graph.file for graph in self.manifest.drafts]

    def check_runs_on_onnxruntime(self) -> None:
        """能在 ONNX Runtime 的 CPU 上运行、与 PyTorch 比吗。

        Raises:
            DsxError: ``DSX-E321``，bfloat16 的只能建引擎。
        """
        if self.manifest.dtype == "bfloat16":
            raise DsxError(
                "DSX-E321",
                f"{self.path} 是 bfloat16，ONNX Runtime 的 CPU 没有 bfloat16 的算子",
                "先 dsx build，再在有 GPU 的机器上用 --backend trt（dsx verify 的 model、tokens 两级，dsx generate）；"
                "没有 GPU 就用 --dtype float16 再导出一份来校验：图与 pass 相同",
            )

    def check_hashes(self, progress: Progress) -> None:
        """核对每个文件的 sha256。

        Raises:
            DsxError: ``DSX-E406``。
        """
        files = self.manifest.files
        progress.start("核对 sha256", sum(entry.bytes for entry in files.values()), "bytes")
        for name, entry in files.items():
            if sha256_file(self.path / name) != entry.sha256:
                raise DsxError(
                    "DSX-E406",
                    f"{self.path / name} 的 sha256 与 manifest 不符",
                    "文件被改过：重新拷贝或重新导出",
                )
            progress.advance(entry.bytes, name)


def _check_model(path: Path, manifest: Manifest) -> None:
    """manifest 里的模型就是旁边 config.json 的那一个：取值成不成立，由读检查点的那一套来查。"""
    config = path / "config.json"
    try:
        model = load_model_config(config)
    except DsxError as error:
        raise DsxError("DSX-E403", f"核对模型的配置时：{error.what}", "重新拷贝或重新导出") from error
    for field in fields(model):
        written, found = getattr(manifest.model, field.name), getattr(model, field.name)
        if written != found:
            what = (
                f"{path / 'manifest.json'}：model.{field.name} 是 {written!r}，{config.name} 里却是 {found!r}"
            )
            raise DsxError("DSX-E403", what, "重新拷贝或重新导出")
