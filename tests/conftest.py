"""各测试共用的夹具；重的依赖只在用到时导入。"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deepseek_export.errors import ERRORS
from tests.raised_codes import RaisedCodes
from tests.threads import engine_threads, left_behind

# 测试里的矩阵都很小，多线程只会互相等待：test_reference 从 77 秒降到 17 秒。须在导入 torch 之前设置。
os.environ.setdefault("OMP_NUM_THREADS", "1")
# 每个 worker 占一个核，它开的进程也是：ONNX Runtime 的线程空转着等，两个 worker 各开两个，就是四个抢两个核。
if (_worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})
# 磁盘缓存放在检出目录里：各个 worker 与子进程里的 dsx 共用，又不碰用户自己的。
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parent.parent / "build/test-cache")
os.environ.pop("DSX_HOME", None)  # 它比 XDG_CACHE_HOME 优先


#: 背后要导出一个 bundle 的夹具。
EXPORTING = {"exported", "trained_bundle", "v3_bundle"}


def pytest_configure(config: pytest.Config) -> None:
    """整套测试都通过之后，再看每个错误码是不是都触发过。"""
    config.pluginmanager.register(RaisedCodes(config, ERRORS, Path(__file__).parent), "raised-codes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """用到导出的夹具的标成 ``heavy``；直接导出的自己标。"""
    for item in items:
        if EXPORTING & set(getattr(item, "fixturenames", ())):
            item.add_marker("heavy")


@pytest.fixture(scope="session", autouse=True)
def _torch_export_is_not_covered():
    """覆盖率的追踪器让 ``torch.export`` 与 ``torch.onnx.export`` 慢 75%，而里面几乎全是 PyTorch 自己的代码：期间停下。"""
    import torch

    def uncovered(call):
        @functools.wraps(call)
        def run(*arguments, **options):
            tracer = sys.gettrace()
            sys.settrace(None)
            try:
                return call(*arguments, **options)
            finally:
                sys.settrace(tracer)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "export", uncovered(torch.export.export))
        patch.setattr(torch.onnx, "export", uncovered(torch.onnx.export))
        yield


@pytest.fixture(scope="module", autouse=True)
def _engines_are_closed() -> Iterator[None]:
    """一个文件里的测试做完，它开的服务引擎都停了。"""
    before = engine_threads()
    yield
    assert not left_behind(before), "有没有关的服务引擎"


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable[[str], tuple[Any, Any]]:
    """变体名 → (transformers 模型, 它存成的 :class:`Checkpoint`)，各建一次。"""
    from deepseek_export.checkpoint import Checkpoint
    from tests.models import build_model, save_checkpoint

    @functools.cache
    def build(variant: str):
        model = build_model(variant)
        return model, Checkpoint.open(save_checkpoint(model, tmp_path_factory.mktemp(variant)))

    return build


@pytest.fixture(scope="session")
def trained_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """随包附带、训练过的检查点的 mla+moe，导出一次；只读。"""
    import deepseek_export
    from deepseek_export.cli.demo import CHECKPOINT

    return deepseek_export.export(CHECKPOINT, tmp_path_factory.mktemp("demo") / "OUT", "mla+moe").path


@pytest.fixture(scope="session")
def bodies() -> Callable[..., Any]:
    """函数体：``bodies("mla", form, dtype, cache_dtype)``、``bodies("gate", 变体)``、``bodies("experts", dtype)``。"""
    from deepseek_export.capture import bodies as module
    from tests.models import model_config

    def build(kind: str, *arguments):
        if kind == "gate":
            return module.moe_gate_body(model_config(*arguments))
        config = model_config("v3")
        if kind == "experts":
            return module.moe_experts_body(config, *arguments)
        return module.mla_attention_body(config, *arguments)

    return build


@pytest.fixture(scope="session")
def exported(saved, tmp_path_factory) -> Callable[..., Any]:
    """``exported(变体, 方案, 目标="portable", dtype="float32", overrides=())`` → :class:`Bundle`，相同参数只导出一次。"""
    import deepseek_export

    @functools.cache
    def build(variant: str, profile: str, target: str = "portable", dtype: str = "float32", overrides=()):
        _, checkpoint = saved(variant)
        out = tmp_path_factory.mktemp("bundle") / "out"
        options = {"target": target, "dtype": dtype, "overrides": overrides}
        return deepseek_export.export(checkpoint.path, out, profile, **options)

    return build


@pytest.fixture(scope="session")
def library() -> Any:
    """构建好的 C++ 算子库；没有就跳过并说明原因。"""
    from tests.cpu_build import built_library

    return built_library()


@pytest.fixture(scope="session")
def v3_checkpoint(saved) -> Any:
    """deepseek_v3 检查点的目录（奇数尺寸，yarn）。"""
    return saved("v3-yarn")[1].path


@pytest.fixture(scope="session")
def v3_bundle(exported) -> Any:
    """上面那个检查点的 ``mla+moe`` portable float32 bundle；只读，要改先拷贝。"""
    return exported("v3-yarn", "mla+moe")
