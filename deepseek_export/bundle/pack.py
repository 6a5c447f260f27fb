"""按引用的 bundle、一套 stage → 打包的：原地、原子；一个 bundle 被杀之后能接着写。"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx

from deepseek_export.bundle.bundle import Bundle
from deepseek_export.bundle.by_reference import UNHASHED
from deepseek_export.bundle.compared import COMPARED_FILE
from deepseek_export.bundle.disk import (
    WEIGHTS_FOLDER,
    atomic_directory,
    check_free_space,
    disk_errors,
    hash_files,
    link_or_copy,
    output_lock,
    sha256_file,
    write_json,
)
from deepseek_export.bundle.foreign import check_replaceable, check_stages_replaceable
from deepseek_export.bundle.graph import check_onnx, point_at
from deepseek_export.bundle.packed import WEIGHTS_FILE, write_packed
from deepseek_export.bundle.stages import STAGES_FILE, StageSet
from deepseek_export.bundle.weights import open_referenced
from deepseek_export.errors import DsxError
from deepseek_export.paths import path_kind
from deepseek_export.progress import Progress


def pack_bundle(path: Path | str, progress: Progress | None = None, *, verify_weights: bool = True) -> Bundle:
    """把按引用的 bundle 变成自包含的：结果与一开始就用 ``--weights packed`` 导出的逐字节相同。

    Args:
        path: bundle 目录；成功之后换成打包的，中途失败则保持原样。
        progress: 进度。
        verify_weights: 先读一遍检查点，核对导出时记下的 sha256；``False`` 只抽查每个张量的几处。

    Raises:
        DsxError: ``DSX-E409`` 已经是打包的；``DSX-E401`` 里面有不是 dsx 写的文件，或 ``path`` 是符号链接；``DSX-E408`` 检查点与导出时不同；
            ``DSX-E413`` 导出时没有算 sha256；``DSX-E404`` 磁盘空间不足；``DSX-E411`` 别人正在写；其余见 ``Bundle.open``、``write_packed``。
    """
    path_kind(Path(path), "DSX-E402")  # 看不了的，是读不了它，不是写不了
    with output_lock(path):
        return _pack(Bundle.open(path), progress or Progress(), verify_weights)


def pack_stages(
    path: Path | str, progress: Progress | None = None, *, verify_weights: bool = True
) -> StageSet:
    """一套按引用的 stage 变成自包含的：每个 stage 各打包自己的，全部打包好了才一起换上；被杀之后从头再来。

    Args:
        path: 这套 stage 的目录；成功之后换成打包的，中途失败则保持原样。
        progress, verify_weights: 同 :func:`pack_bundle`。

    Raises:
        DsxError: ``DSX-E741``，不是完整的一套；其余同 :func:`pack_bundle`。
    """
    progress = progress or Progress()
    with output_lock(path, STAGES_FILE) as out:
        stages = StageSet.open(out)
        check_stages_replaceable(out, overwrite=True)
        bundles = [Bundle.open(directory) for directory in stages.directories]
        for bundle in bundles:
            _check_referenced(bundle)
        check_free_space(out, sum(_nbytes(bundle) for bundle in bundles))
        with atomic_directory(out, overwrite=True, marker=STAGES_FILE) as directory:
            with disk_errors(directory):
                shutil.copytree(out, directory, copy_function=link_or_copy, dirs_exist_ok=True)
            items = []
            for item in stages.record.stages:
                progress.start(f"打包 {item.directory}")
                _pack(Bundle.open(directory / item.directory), progress, verify_weights)
                digest = sha256_file(directory / item.directory / "manifest.json")
                items.append(item.model_copy(update={"manifest_sha256": digest}))
            record = stages.record.model_copy(update={"stages": items})
            with disk_errors(directory):
                (directory / STAGES_FILE).unlink()  # 硬链接：不就地改写
                write_json(directory / STAGES_FILE, record.model_dump(mode="json"))
    return StageSet.open(out)


def _check_referenced(bundle: Bundle) -> None:
    if bundle.manifest.weights.mode == "packed":
        raise DsxError("DSX-E409", f"{bundle.path} 的权重已经在自己的文件里", "不必再打包，直接用")


def _nbytes(bundle: Bundle) -> int:
    return sum(recipe.nbytes for recipe in bundle.manifest.weights.recipes.values())


def _pack(bundle: Bundle, progress: Progress, verify_weights: bool) -> Bundle:
    """:func:`pack_bundle`，已经占住。"""
    manifest = bundle.manifest
    _check_referenced(bundle)
    check_replaceable(bundle.path, overwrite=True)
    store, recipes = open_referenced(bundle), manifest.weights.recipes
    check_free_space(bundle.path, _nbytes(bundle))
    if verify_weights:
        bundle.check_weights(progress)
    graphs = {graph.file for graph in manifest.graphs}
    with atomic_directory(bundle.path, overwrite=True) as directory:
        packed = write_packed(directory, recipes, store, progress)
        progress.start("写计算图并检查")
        for name in graphs:
            model = onnx.load(bundle.path / name, load_external_data=False)
            for tensor in model.graph.initializer:
                if tensor.name in packed.slots:
                    point_at(tensor, packed.slots[tensor.name])
            with disk_errors(directory):
                onnx.save(model, directory / name)
            check_onnx(directory / name)
        with disk_errors(directory):
            for source in bundle.path.iterdir():
                if source.is_dir() and source.name != WEIGHTS_FOLDER:
                    # engines/ 里也有权重的硬链接，复制就各成一份检查点那么大的文件。
                    shutil.copytree(source, directory / source.name, copy_function=link_or_copy)
                elif source.is_file() and source.name not in {*graphs, "manifest.json"}:
                    shutil.copyfile(source, directory / source.name)
            (directory / COMPARED_FILE).unlink(missing_ok=True)  # 说的是换下来的那些文件
            # engines/、reports/ 不归 manifest 的 files 管，只对导出时记下的那些文件算哈希。
            kept = {name for name in manifest.files if not name.startswith(f"{WEIGHTS_FOLDER}/")}
            others = [p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()]
            files = hash_files(directory, [name for name in others if name not in kept], progress)
            weights = manifest.weights.model_copy(update={"mode": "packed", "files": [WEIGHTS_FILE]})
            files = dict(sorted((files | {WEIGHTS_FILE: packed.entry}).items()))
            fallbacks = [line for line in manifest.fallbacks if line != UNHASHED]  # 从现在起有了
            entries = [graph.model_copy(update={"by_recipe": []}) for graph in manifest.graphs]
            changes = {"weights": weights, "files": files, "fallbacks": fallbacks, "graphs": entries}
            updated = manifest.model_copy(update=changes)
            write_json(directory / "manifest.json", updated.model_dump(mode="json"))
    return Bundle.open(bundle.path)
