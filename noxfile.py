"""在别的依赖版本上跑测试；日常用 ``make test`` 就够。"""

from __future__ import annotations

import re
from pathlib import Path

import nox

nox.options.sessions = ["lint", "test"]

#: 平常的一套：锁住的版本。
_LOCKED = ("-c", "constraints.txt", "-e", ".[dev]")
_TESTS = ("python", "-m", "pytest", "-m", "not slow")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff、mypy、import-linter。"""
    session.install(*_LOCKED)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")


@nox.session
def test(session: nox.Session) -> None:
    """锁住的依赖。"""
    session.install(*_LOCKED)
    session.run(*_TESTS, *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """更久地试坏文件：每种几千个，种子由 ``--hypothesis-seed`` 定（缺省 0）；找到的坏法添进 tests/fuzz/seeds。"""
    session.install(*_LOCKED)
    seed = session.posargs or ["--hypothesis-seed=0"]
    session.run("python", "-m", "pytest", "tests/fuzz", *seed, env={"DSX_FUZZ_EXAMPLES": "3000"})


@nox.session
def test_nightly_onnx(session: nox.Session) -> None:
    """onnx 的每周预览版：提前发现 IR 与 opset 的变化。"""
    session.install("-e", ".[dev]")
    session.run("pip", "uninstall", "-y", "onnx")
    session.install("--pre", "onnx-weekly")
    session.run(*_TESTS, *session.posargs)


@nox.session
def test_old(session: nox.Session) -> None:
    """pyproject.toml 声明的最低版本。"""
    session.install("-e", ".[dev]", "torch==2.11.*", "transformers==5.17.*")
    session.run(*_TESTS, *session.posargs)


@nox.session
def transformers_tests(session: nox.Session) -> None:
    """transformers 自己的 deepseek_v2、deepseek_v3 建模与生成测试，打开 ``apply`` 跑：``nox -s transformers_tests -- CHECKOUT``。

    CHECKOUT 是 transformers 的 git 检出，标签与装着的版本相同。sdist 不行：它只带 ``tests/`` 顶层的几个 mixin，
    没有 ``tests/models``、``tests/generation``。检出里的东西只读，一个字节也不进本仓库。
    """
    if not session.posargs:
        session.error(
            "给出 transformers 的检出：nox -s transformers_tests -- CHECKOUT（sdist 里没有这些测试）"
        )
    checkout, *rest = session.posargs
    root = Path(checkout).resolve()
    folders = [f"tests/models/{family}" for family in ("deepseek_v2", "deepseek_v3")]
    absent = [folder for folder in (*folders, "tests/generation") if not (root / folder).is_dir()]
    if absent:
        session.error(f"{root} 里没有 {'、'.join(absent)}")
    session.install(*_LOCKED, "parameterized", "accelerate")
    show = "from importlib.metadata import version; print(version('transformers'))"
    installed = str(session.run("python", "-c", show, silent=True)).strip()
    source = (root / "src/transformers/__init__.py").read_text(encoding="utf-8")
    declared = re.search(r'__version__ = "([^"]+)"', source)
    if declared is None or declared.group(1) != installed:
        session.error(f"检出是 {declared and declared.group(1)}，装着的是 {installed}：换到同一个标签")
    plugin = Path(__file__).parent / "tools/transformers_tests"
    session.chdir(root)
    for profile in ("mla+moe", "mla+moe mla.form=absorb"):
        env = {"DSX_APPLY": profile, "PYTHONPATH": str(plugin)}
        session.run("python", "-m", "pytest", "-p", "apply_everywhere", *folders, *rest, env=env)
