"""按引用的权重：不写权重文件，initializer 直接指进检查点自己的 safetensors。

指得进去的（原样、dtype 相同）写明文件与偏移；其余（叠放专家、转 dtype、反量化）指向说明文件 :data:`BY_RECIPE_FILE`，加载时按
manifest 里的配方逐个生成。那个文件装不下它们声明的长度，所以绕过 dsx 直接打开时 ONNX Runtime 会报错，而不是读到别的东西。

检查点的文件以硬链接放进 ``weights/``：ONNX Runtime 拒绝指向目录外的符号链接，硬链接则与普通文件无异，检查点挪走之后 bundle 也还能用。
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from deepseek_export.bundle.disk import WEIGHTS_FOLDER
from deepseek_export.bundle.graph import Slot
from deepseek_export.bundle.manifest import FileEntry
from deepseek_export.checkpoint import TensorStore
from deepseek_export.checkpoint.hub import published_sha256
from deepseek_export.checkpoint.quantization import FP8_DTYPE
from deepseek_export.checkpoint.recipe import Recipe, materialize
from deepseek_export.checkpoint.store import INDEX_NAME
from deepseek_export.dtypes import DTYPES
from deepseek_export.errors import DsxError

BY_RECIPE_FILE = f"{WEIGHTS_FOLDER}/by-recipe.txt"

#: 导出时没有算检查点的 sha256 的，记进 ``fallbacks``。
UNHASHED = "没有算检查点文件的 sha256（--no-hash-weights）：以后证明不了它没有变，verify、compare、pack、build 要加 --no-verify-weights"

#: 至多这么大的权重导出时就读一遍。
_SMALL_BYTES = 1 << 20

_BY_RECIPE_TEXT = """\
指向这个文件的 initializer 没有现成的字节：dsx 加载时按 manifest.json 里 weights.recipes 的配方，从旁边的 safetensors 生成。
绕过 dsx 直接加载会报“超出文件长度”；要一个不依赖 dsx 的文件夹，先运行 dsx pack。
"""
#: 换个文件系统、没有权限、文件系统不支持、链接数用完。
_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EMLINK}


def reference_slots(recipes: Mapping[str, Recipe], store: TensorStore) -> dict[str, Slot]:
    """每个 initializer 指向哪里。

    Args:
        recipes: initializer 名 → 配方，已经过 ``bind_recipes``。
        store: 检查点张量。
    """
    return {name: _slot(recipe, store) for name, recipe in recipes.items()}


def _slot(recipe: Recipe, store: TensorStore) -> Slot:
    if recipe.op == "copy" and recipe.int4 is None:
        spec = store[recipe.sources[0]]
        dtype = FP8_DTYPE if recipe.keeps_bytes else DTYPES[recipe.dtype].safetensors
        if (spec.dtype, spec.shape) == (dtype, recipe.shape):
            return Slot(f"{WEIGHTS_FOLDER}/{spec.file.name}", spec.offset, spec.nbytes)
    return Slot(BY_RECIPE_FILE, 0, recipe.nbytes)


def check_small(recipes: Mapping[str, Recipe], store: TensorStore) -> None:
    """不大的权重（norm、bias）导出时就查 NaN 与溢出；大的要读一遍整个检查点，留到打包、加载或执行。

    Raises:
        DsxError: ``DSX-E115`` / ``DSX-E116``，同打包时。
    """
    for name, recipe in recipes.items():
        if recipe.nbytes <= _SMALL_BYTES:
            for _ in materialize(name, recipe, store):
                pass


def link_file(file: Path, folder: Path) -> None:
    """把一个检查点文件硬链接进 ``folder``，名字不变；是符号链接（HF 缓存）就链到真文件。

    Raises:
        DsxError: ``DSX-E407``，链接不了，多半是不在同一个文件系统。
    """
    try:
        os.link(file.resolve(), folder / file.name)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        raise DsxError(
            "DSX-E407",
            f"{file} 链接到 {folder}：{error.strerror}",
            "把输出放到检查点所在的文件系统，并确认检查点文件归自己所有；或改用 --weights packed",
        ) from error


def published_entries(store: TensorStore, directory: Path) -> dict[str, FileEntry]:
    """链接好的文件里，下载记录说得出 sha256 的：不必读。

    Args:
        store: 检查点张量，链接之前的。
        directory: bundle 目录。
    """
    found = {}
    for file in store.files:
        if (sha256 := published_sha256(file)) is not None:
            name = f"{WEIGHTS_FOLDER}/{file.name}"
            nbytes = (directory / name).stat().st_size
            found[name] = FileEntry(bytes=nbytes, sha256=sha256, sha256_from="hub")
    return found


def link_checkpoint(store: TensorStore, directory: Path) -> list[str]:
    """把检查点的全部 safetensors 硬链接进 bundle，连同索引与说明文件。

    Args:
        store: 检查点张量。
        directory: bundle 目录；里面若有别人写了一半的 ``weights/``，先删掉。

    Returns:
        硬链接的文件，相对 ``directory`` 的路径。

    Raises:
        DsxError: ``DSX-E407``，链接不了，多半是不在同一个文件系统。
    """
    folder = directory / WEIGHTS_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in store.files:
        link_file(file, folder)
    if (store.directory / INDEX_NAME).is_file():
        shutil.copyfile(store.directory / INDEX_NAME, folder / INDEX_NAME)
    (directory / BY_RECIPE_FILE).write_text(_BY_RECIPE_TEXT, encoding="utf-8")
    return [f"{WEIGHTS_FOLDER}/{file.name}" for file in store.files]
