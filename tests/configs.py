"""发布的 config.json，与改它、要求它被拒绝的办法。"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from deepseek_export.checkpoint import parse_model_config
from deepseek_export.errors import DsxError

# V3、V2 是官方 config.json 的内容，V3 去掉了 FP8 的 quantization_config；其余家族只留推理用得到的字段。Sarvam-105B、A.X-K1 的原文没有
# 核对过：取值来自 transformers 的配置类，Sarvam 的字段名来自厂商随检查点发布的配置类。
_PUBLISHED = json.loads((Path(__file__).parents[1] / "tools/published_configs.json").read_text())
V3, V2_LITE, V2 = (_PUBLISHED[name] for name in ("V3", "V2_LITE", "V2"))
KIMI, GLM, YOUTU, MINICPM = (_PUBLISHED[name] for name in ("KIMI_K2", "GLM_4_7_FLASH", "YOUTU", "MINICPM3"))
SARVAM, AXK1 = _PUBLISHED["SARVAM_105B"], _PUBLISHED["AX_K1"]


def yarn_scaling(mscale: float) -> dict[str, Any]:
    return {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    }


def edit(base: dict[str, Any], *drop: str, **changes: Any) -> dict[str, Any]:
    data = copy.deepcopy(dict(base)) | changes
    return {key: value for key, value in data.items() if key not in drop}


def refused(code: str, data: dict[str, Any]) -> DsxError:
    with pytest.raises(DsxError) as err:
        parse_model_config(data, "测试")
    assert err.value.code == code, err.value
    return err.value
