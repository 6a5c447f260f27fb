"""CONTRIBUTING 里加一个家族的走法：照着做，真的走得到校验通过。"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.integration.cli import dsx
from tools.make_checkpoint import main as make_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.slow]

GUIDE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


def _block(section: str, language: str) -> str:
    (found,) = re.findall(rf"^ *```{language}\n(.*?)^ *```", section, re.MULTILINE | re.DOTALL)
    return found


def test_from_a_published_config_to_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """“加一个模型家族”里的 config.json（厂商的字段名）与三条命令，逐条照做。"""
    text = GUIDE.read_text(encoding="utf-8")
    section = text.partition("## 加一个模型家族\n")[2].partition("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    Path("sarvam.json").write_text(_block(section, "json"), encoding="utf-8")
    for line in _block(section, "bash").splitlines():
        arguments = shlex.split(line)
        if arguments[0] == "dsx":
            done = dsx(*arguments[1:])
            assert done.returncode == 0, done.stderr
        else:
            assert arguments[:3] == ["python", "-m", "tools.make_checkpoint"]
            made = CliRunner().invoke(make_checkpoint, arguments[3:])
            assert made.exit_code == 0, made.output
    assert "全部通过" in done.stdout
    assert "对 transformers" in done.stdout
