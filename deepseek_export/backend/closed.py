"""关了的模型：约定还看得到，跑不了。"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import numpy as np

from deepseek_export.backend.base import Caches, Runner
from deepseek_export.errors import DsxError


class ClosedRunner(Runner):
    """代替关掉的 ``runner``，不再握着它。"""

    def __init__(self, runner: Runner) -> None:
        self.contract, self.limits = runner.contract, runner.limits

    def new_caches(self, batch: int, needed: int = 1) -> Caches:
        """见 :meth:`run`。"""
        self._refuse()

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...], caches: Caches
    ) -> dict[str, np.ndarray]:
        """总是报错。

        Raises:
            DsxError: ``DSX-E522``。
        """
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise DsxError("DSX-E522", "close() 过了，权重已经放掉", "再 dsx.load 一次")
