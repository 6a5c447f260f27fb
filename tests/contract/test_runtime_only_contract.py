"""specs/runtime 的 RUNTIME-11：只跑 bundle 的人不必有 torch 与 onnx。"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import deepseek_export
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.extras import EXPORT_PACKAGES
from tests.contract.test_mtp_contract import SMALL
from tests.raised_codes import saw

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

PROMPT = [5, 9, 23, 100, 7]
#: 只有编译与校验才要的包。
COMPILERS = (*EXPORT_PACKAGES, "transformers")
_WITHOUT = f"""
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {COMPILERS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """带草稿模型的 bundle，打包的与按引用的各一份。"""
    folder = tmp_path_factory.mktemp("runtime-only")
    checkpoint = write_checkpoint(folder / "ck", SMALL, dtype="float32", mtp=True)
    return {
        mode: deepseek_export.export(checkpoint, folder / mode, "full", weights=mode).path  # type: ignore[arg-type]
        for mode in ("packed", "reference")
    }


def without_compilers(script: str, *arguments: str, fails: bool = False) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT + script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == fails, done.stderr
    return done.stderr if fails else done.stdout


@pytest.mark.parametrize("mode", ["packed", "reference"])
def test_loading_and_generating_need_no_compiler(bundles: dict[str, Path], mode: str) -> None:
    """RUNTIME-11：Python 的 load、generate，普通与投机。"""
    want = deepseek_export.load(bundles[mode]).generate([PROMPT], max_new_tokens=8).token_ids
    script = f"""
import deepseek_export as dsx
model = dsx.load(sys.argv[1])
assert model.speculative is not None
for speculative in (False, True):
    print(model.generate([{PROMPT}], max_new_tokens=8, speculative=speculative).token_ids)
"""
    assert without_compilers(script, str(bundles[mode])).splitlines() == [str(want)] * 2


def test_the_command_line_needs_no_compiler(bundles: dict[str, Path]) -> None:
    """RUNTIME-11：``dsx generate``。"""
    script = "from deepseek_export.cli.main import main\nmain(sys.argv[1:])"
    ids = ",".join(map(str, PROMPT))
    out = without_compilers(
        script, "generate", str(bundles["packed"]), "--ids", ids, "--max-new-tokens", "4", "--json"
    )
    want = deepseek_export.load(bundles["packed"]).generate([PROMPT], max_new_tokens=4).token_ids
    assert str(want[0]).replace(" ", "") in out.replace(" ", "").replace("\n", "")


@pytest.mark.parametrize("command", ["inspect", "bench", "plan"])
def test_reading_and_measuring_need_no_compiler(
    bundles: dict[str, Path], command: str, tmp_path: Path
) -> None:
    """RUNTIME-11：``dsx inspect``、``bench``、``plan`` 与它们的网页。"""
    script = "from deepseek_export.cli.main import main\nmain(sys.argv[1:])"
    small = ["--prompt-len", "4", "--new-tokens", "2", "--depth", "16", "--runs", "1"]
    options = {"bench": small, "plan": ["--gpu", "h100"]}.get(command, [])
    source = bundles["packed"].with_name("ck") if command == "plan" else bundles["packed"]
    page = tmp_path / "page.html"
    out = without_compilers(script, command, str(source), *options, "--html", str(page))
    assert out.splitlines()[-1] == f"网页    {page}"
    assert "<svg" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["export", "verify", "compare", "pack", "build"])
def test_what_needs_the_compiler_says_how_to_get_it(bundles: dict[str, Path], command: str) -> None:
    """RUNTIME-11：要编译依赖的命令按码拒绝，列出缺的包与怎么装。"""
    arguments = {"export": ["-o", str(bundles["packed"].with_name("new"))], "build": ["--arch", "sm89"]}
    script = "from deepseek_export.cli.main import main\nmain(sys.argv[1:])"
    source = bundles["packed"].with_name("ck") if command == "export" else bundles["reference"]
    error = without_compilers(script, command, str(source), *arguments.get(command, []), fails=True)
    assert "DSX-E720" in error
    saw("DSX-E720")
    assert "torch" in error
    assert "deepseek-export[export]" in error
    assert "Traceback" not in error
