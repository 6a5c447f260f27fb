"""从模型对象导出：写成一个临时的检查点目录，之后与从目录导出走同一条路。

权重由 transformers 自己的 ``save_pretrained`` 逐个写出，内存里没有第二份；磁盘上多占一份权重，导出结束（或出错）就删。
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file

from deepseek_export.bundle.disk import check_free_space, disk_errors
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.checkpoint.store import INDEX_NAME, SINGLE_NAME
from deepseek_export.errors import DsxError
from deepseek_export.integration.compat import require_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextlib.contextmanager
def saved_checkpoint(
    model: PreTrainedModel, beside: Path, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[Path]:
    """把模型写成检查点目录，离开时删掉。

    Args:
        model: 支持的模型对象；``apply`` 过的也行，state_dict 本来就没变。装着 MTP 的，MTP 层从它的来源原样补上。
        beside: 临时目录建在它旁边，与输出在同一个文件系统上（系统的临时目录可能在内存里）。
        tokenizer: 一并写进去；不给的话 bundle 没有 tokenizer。

    Yields:
        检查点目录。

    Raises:
        DsxError: ``DSX-E803`` 模型类；``DSX-E810`` 有参数不在内存里；``DSX-E404`` / ``DSX-E405`` 磁盘。
    """
    require_model(model)
    absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if absent:
        raise DsxError(
            "DSX-E810",
            f"{len(absent)} 个参数在 meta 设备上，例如 {absent[0]}",
            "先把权重加载进来，或直接从检查点目录导出",
        )
    parent = beside.absolute().parent
    with disk_errors(beside):
        parent.mkdir(parents=True, exist_ok=True)
        check_free_space(parent, sum(tensor.nbytes for tensor in model.state_dict().values()))
        temporary = tempfile.TemporaryDirectory(prefix=f".{beside.name}.model-", dir=parent)
    with temporary as directory:
        with disk_errors(beside):
            model.save_pretrained(directory)
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)
            if (draft := getattr(model, "dsx_mtp", None)) is not None:
                _add_mtp(Path(directory), Checkpoint.open(draft.source))
        yield Path(directory)


def _add_mtp(directory: Path, source: Checkpoint) -> None:
    """把 ``source`` 的 MTP 张量写成另一个分片：transformers 保存的只有主干。"""
    name = "mtp.safetensors"
    index = directory / INDEX_NAME
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    else:
        with safe_open(directory / SINGLE_NAME, framework="pt") as file:
            weight_map = dict.fromkeys(file.keys(), SINGLE_NAME)
    tensors = {}
    for tensor in source.mtp_tensors:
        with safe_open(source.store[tensor].file, framework="pt") as file:
            tensors[tensor] = file.get_tensor(tensor)
    save_file(tensors, directory / name)
    weight_map |= dict.fromkeys(source.mtp_tensors, name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
