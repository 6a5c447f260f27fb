"""在这张卡上再跑一遍真正的引擎，``--bundle`` 才有：``python -m perf.gpu.engine BUNDLE FOLDER``，由 :mod:`perf.gpu.accept` 启动。"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from perf.gpu import lines

#: TensorRT 的 Python 包，与 ``deepseek_export.engine.flavour`` 的次序一致。
_PACKAGES = ("tensorrt_rtx", "tensorrt")
_NEW_TOKENS = 64


def run_engine(bundle: Path) -> dict[str, Any]:
    """没有这个 SM 的引擎就先建，再逐层校验、生成一段。

    Args:
        bundle: ``dsx build`` 收的 bundle。

    Returns:
        跑不成是 ``{"verified": False, "error": 原因}``；否则是发行、plan 大小、校验结果与每秒 token 数。
    """
    if not any(find_spec(name) for name in _PACKAGES):
        return {"verified": False, "error": f"没有安装 {' 或 '.join(_PACKAGES)}"}
    import deepseek_export as dsx
    from deepseek_export.backend.tensorrt.cuda import require_gpu
    from deepseek_export.backend.tensorrt.engine import find_engine
    from deepseek_export.bundle import Bundle
    from deepseek_export.engine.build import build_engine
    from deepseek_export.engine.derived import buildable_bundle
    from deepseek_export.engine.flavour import FLAVOURS, choose
    from deepseek_export.engine.shapes import ProfileShapes
    from deepseek_export.errors import DsxError

    try:
        flavour = choose()
        opened, sm = buildable_bundle(Bundle.open(bundle), flavour), require_gpu()
        try:
            _, record = find_engine(opened, sm)
        except DsxError:
            shapes = ProfileShapes.parse("", opened.manifest.model.max_position_embeddings)
            record = build_engine(opened, sm, flavour, shapes).record
        report = dsx.verify(bundle, backend="trt")
        found = dsx.load(bundle, backend="trt").generate([[1, 2, 3]], _NEW_TOKENS, ignore_eos=True)
    except DsxError as error:
        return {"verified": False, "error": f"{error.code} {error.what}"}
    return {
        "bundle": str(bundle),
        "flavour": FLAVOURS[record.flavour].module,
        "version": record.version,
        "plan_bytes": {name: entry.bytes for name, entry in record.plans.items()},
        "verified": report.passed,
        "first_failure": None if report.passed else str(report.first_failure),
        "decode_tokens_s": round(found.decode_tokens_per_s, 1),
    }


def main(bundle: Path, folder: Path) -> int:
    """结果写一行；没有校验过，退出码是 1。"""
    found = run_engine(bundle)
    status = "ok" if found["verified"] else "failed"
    lines.append(folder / lines.ROWS, {"phase": "engine", "item": "engine", "status": status, **found})
    return int(status != "ok")


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
