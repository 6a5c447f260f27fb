"""在别的依赖版本上跑测试；日常用 ``make test`` 就够。"""

from __future__ import annotations

import nox

nox.options.sessions = ["lint", "test"]

_TESTS = ("python", "-m", "pytest", "-m", "not slow")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff、mypy、import-linter。"""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")


@nox.session
def test(session: nox.Session) -> None:
    """当前的正式版依赖。"""
    session.install("-e", ".[dev]")
    session.run(*_TESTS, *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """更久地试坏文件：每种几千个，种子由 ``--hypothesis-seed`` 定（缺省 0）；找到的坏法添进 tests/fuzz/seeds。"""
    session.install("-e", ".[dev]")
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
def test_newest_transformers(session: nox.Session) -> None:
    """最新发布的 transformers，即使比测过的上限还新：提前发现它内部模块的变化。"""
    session.install("-e", ".[dev]")
    session.install("--upgrade", "--upgrade-strategy", "eager", "transformers")
    session.run(*_TESTS, *session.posargs, env={"DSX_UNTESTED_TRANSFORMERS": "1"})


@nox.session
def test_old(session: nox.Session) -> None:
    """pyproject.toml 声明的最低版本。"""
    session.install("-e", ".[dev]", "torch==2.11.*", "transformers==5.17.*")
    session.run(*_TESTS, *session.posargs)
