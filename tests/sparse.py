"""真实形状、不占磁盘的检查点：文件头照写，数据区用 ``truncate`` 留空。"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_export.checkpoint import expected_mtp_tensors, expected_tensors, parse_model_config
from deepseek_export.checkpoint.store import INDEX_NAME


def write_sparse_checkpoint(out: Path, config: Mapping[str, Any], shards: int) -> Path:
    """BF16、带 ``num_nextn_predict_layers`` 个 MTP 模块的检查点，分成 ``shards`` 个文件。"""
    parsed = parse_model_config(dict(config), "write_sparse_checkpoint")
    shapes = expected_tensors(parsed)
    for index in range(parsed.num_mtp_layers):
        shapes |= expected_mtp_tensors(parsed, index)
    names, weight_map = list(shapes), {}
    out.mkdir()
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header, end = {}, 0
        for name in names[len(names) * number // shards : len(names) * (number + 1) // shards]:
            begin, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [begin, end]}
            weight_map[name] = file
        raw = json.dumps(header).encode()
        with (out / file).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            stream.truncate(8 + len(raw) + end)
    (out / "config.json").write_text(json.dumps(dict(config)))
    (out / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return out
