"""真的 ``kill -9`` 一个正在写权重的 ``dsx export``，再跑一次。"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from deepseek_export.checkpoint.synthetic import write_checkpoint
from tests.integration.cli import DSX, TINY, dsx_process, environment

pytestmark = [pytest.mark.integration, pytest.mark.slow]

#: 词嵌入与 lm_head 转成 float32 各 1 GiB：写完第一个就会记一笔日志，杀在第二个中间。
BIG = {**TINY, "vocab_size": 1 << 18, "hidden_size": 1024, "num_hidden_layers": 1}
KILL_AT = (1 << 30) + (200 << 20)


def leftovers(out: Path) -> list[Path]:
    """``out`` 的临时目录。"""
    return sorted(out.parent.glob(f".{out.name}.tmp-*"))


def kill_while_writing(checkpoint: Path, out: Path) -> None:
    """写过 KILL_AT 字节时 SIGKILL。"""
    process = subprocess.Popen([*DSX, "export", str(checkpoint), "-o", str(out)], env=environment())
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        files = [folder / "weights/model.safetensors" for folder in leftovers(out)]
        if any(file.exists() and file.stat().st_size > KILL_AT for file in files):
            process.kill()
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL


def test_export_killed_while_writing_is_continued(tmp_path: Path):
    """EXPORT-24：被杀之后没有 OUT，只有一个带日志的临时目录；再跑一次得到与没被杀过的相同的哈希，不留临时目录。"""
    checkpoint = write_checkpoint(tmp_path / "ckpt", BIG, sparse=True)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert dsx_process("export", checkpoint, "-o", whole).returncode == 0
    kill_while_writing(checkpoint, killed)
    assert not killed.exists()
    (folder,) = leftovers(killed)
    assert json.loads((folder / ".resume.json").read_text())["bytes"] > 1 << 30
    process = dsx_process("export", checkpoint, "-o", killed)
    assert process.returncode == 0, process.stderr
    assert leftovers(killed) == []
    manifests = [json.loads((out / "manifest.json").read_text()) for out in (whole, killed)]
    assert manifests[0]["files"] == manifests[1]["files"]
