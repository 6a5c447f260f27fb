"""安装时顺便构建 C++ 算子库；构建不了就装成纯 Python，说一行原因。

环境变量 ``DSX_CPU_TARGET`` 给另一种处理器构建 wheel（见 ``plugins/cpu/build.py``）：构建不了就失败，不退成纯 Python。
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILDER = "plugins/cpu/build.py"


class CpuLibraryHook(BuildHookInterface):
    """hatchling 的构建钩子。"""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """构建 wheel（含 editable）之前：构建库，成功才把 wheel 标成与平台有关。"""
        if self.target_name != "wheel" or not (Path(self.root) / BUILDER).is_file():
            return
        spec = importlib.util.spec_from_file_location("dsx_build_cpu", Path(self.root) / BUILDER)
        assert spec is not None
        assert spec.loader is not None
        builder = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(builder)
        target = os.environ.get("DSX_CPU_TARGET", "")
        if target:
            library = builder.build(target=target, say=self.app.display_info)
            build_data["force_include"][str(library)] = f"deepseek_export/_native/{library.name}"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-linux_{target}"
            return
        try:
            builder.build(say=self.app.display_info)
        except builder.Unavailable as reason:
            self.app.display_warning(f"C++ 算子库没有构建：{reason}")
            return
        except subprocess.CalledProcessError as error:
            self.app.display_warning(f"C++ 算子库编译失败，装成纯 Python：{error.output}")
            return
        build_data["artifacts"].append("deepseek_export/_native/libdsx_cpu.*")
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
