"""``dsx serve``、``dsx batch`` 的 ``--stages``、``--replicas``：该切开的先切开，给得不对的先说。"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from deepseek_export.errors import DsxError
from deepseek_export.progress import Progress

_MOST = 1024


def staged(source: Path, stages: str | None, progress: Progress) -> Path:
    """要切成几个 stage 的，切好了的目录：``OUT`` 旁边的 ``OUT.stages-N``，已经有了的直接用。

    放在旁边而不是缓存里：各台机器要在同样的路径看得到它，看得到 OUT 的就看得到它；打包的权重要再拷一份，也该看得见占在哪里。

    Args:
        source: bundle 或一套 stage。
        stages: 同 ``dsx split --stages``；``None`` 不切。
        progress: 进度。

    Raises:
        DsxError: ``DSX-E753``，``source`` 已经是一套 stage，而段数不是要的；旁边的那套由别的 bundle 切成；其余见 :func:`~deepseek_export.api.split`。
    """
    if stages is None:
        return source
    # 到这里才导入：看帮助不必等它们。
    from deepseek_export import api
    from deepseek_export.bundle import Bundle
    from deepseek_export.bundle.stages import StageSet, is_stage_set

    if is_stage_set(source):
        made = len(StageSet.open(source).record.stages)
        if stages != str(made):
            todo = f"去掉 --stages，或 --stages {made}；要别的切法就给切开之前的 bundle"
            raise DsxError("DSX-E753", f"{source} 已经切成 {made} 个 stage，而 --stages 是 {stages}", todo)
        return source
    bundle, out = Bundle.open(source), stages_beside(source, stages)
    if not is_stage_set(out):
        progress.note(f"把 {source} 切成 stage，放在 {out}；下次直接用")
        return api.split(source, out, stages, progress=progress).path
    whole, now = StageSet.open(out).record.whole, bundle.manifest
    if any(getattr(whole, key) != getattr(now, key) for key in ("source", "profile", "target", "dtype")):
        todo = f"dsx split {source} --stages {stages} -o {out} --overwrite"
        raise DsxError("DSX-E753", f"{out} 不是由现在的 {source} 切成的", todo)
    return out


def stages_beside(source: Path, stages: str) -> Path:
    """切成 ``stages`` 的放在哪里。"""
    found = source.absolute()
    return found.with_name(f"{found.name}.stages-{re.sub('[^0-9-]', '_', stages)}")


def replica_range(text: str) -> tuple[int, int]:
    """``2`` 是恰好两个，``1-4`` 随请求多少在一到四个之间。

    Raises:
        DsxError: ``DSX-E753``，写得不对。
    """
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    if match:
        low = int(match[1])
        high = int(match[2] or low)
        if 1 <= low <= high <= _MOST:
            return low, high
    raise DsxError("DSX-E753", f"--replicas {text!r}", f"写个数（2），或范围（1-4），在 1 到 {_MOST} 之间")


def check_replicas(replicas: object, ray: str | None, stages: str | None, sources: Iterable[Path]) -> None:
    """副本要 Ray；给了 Ray，要有东西给它起。

    Args:
        replicas: ``--replicas``。
        ray: ``--ray``。
        stages: ``--stages``。
        sources: 要加载的目录。

    Raises:
        DsxError: ``DSX-E753``，给了 ``--replicas`` 而没有 ``--ray``，或反过来，而没有一个目录是切开的。
    """
    from deepseek_export.bundle.stages import is_stage_set

    if replicas is not None and ray is None:
        todo = "加 --ray auto（已经在跑的），或 --ray local（在本机上起一个）；或去掉 --replicas"
        raise DsxError("DSX-E753", f"给了 --replicas {replicas}，而没有 --ray", todo)
    if ray is None or replicas is not None or stages is not None or any(map(is_stage_set, sources)):
        return
    todo = "加 --replicas N 起几个副本，或 --stages N 切开；或去掉 --ray"
    raise DsxError("DSX-E753", f"给了 --ray {ray}，而 OUT 没有切开：没有东西给 Ray 起", todo)
