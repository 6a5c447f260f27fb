"""``perf.gpu.phase`` 的替身：同样的步骤，卡换成 CPU 上的参考实现，驱动换成 ``tests.fake_gpu`` 的。

环境变量 ``FAKE_CARD`` 是 ``步名=毛病`` 的列表，逗号隔开：``signal`` 第二项时被信号杀死，``hang`` 第二项时不再动，
``wrong`` 结果不对，``memory`` 显存不够。
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from deepseek_export.ops.index_topk import index_topk
from deepseek_export.ops.latent_attention import latent_attention
from deepseek_export.ops.latent_cache_update import latent_cache_update
from deepseek_export.ops.moe_experts import moe_experts
from deepseek_export.ops.quantized_linear import quantized_linear
from deepseek_export.ops.quantized_moe_experts import quantized_moe_experts
from deepseek_export.ops.sparse_latent_attention import sparse_latent_attention
from perf.gpu import card, native, phase
from perf.gpu.coded_points import CODES, unpacked
from perf.gpu.sources import LATENT, SCALE

_FREE = 64 << 20
_ENOUGH = 8 << 30


def _latent(table, q, cache, past):
    return (latent_attention(q, cache.nan_to_num(0), past, SCALE, LATENT),)


def _update(table, *inputs):
    return (latent_cache_update(*inputs),)


def _sparse(table, q, cache, indices, counts):
    return (sparse_latent_attention(q, cache.nan_to_num(0), indices, counts, SCALE, LATENT),)


def _select(table, *inputs):
    topk = int(table.outputs[0].dims[-1])
    return index_topk(*inputs, topk)


def _experts(table, *inputs):
    return (moe_experts(*inputs),)


def _coded(op, table, *inputs):
    """参考实现由启动表自己的常数得知码怎么写；int4 的码拆成一字节一个。"""
    constants = next(dict(one.constants) for one in table.kernels if "BITS" in dict(one.constants))
    form = next(one for one in CODES.values() if dict(one.constants()).items() <= constants.items())
    inputs = [unpacked(one, form) if one.dtype == torch.int8 else one for one in inputs]
    return (op(*inputs, constants["SCALED"], constants["TALL"], constants["E4M3"]),)


_REFERENCES = {
    "LatentAttention": _latent,
    "LatentCacheUpdate": _update,
    "SparseLatentAttention": _sparse,
    "IndexTopK": _select,
    "MoeExperts": _experts,
    "QuantizedMoeExperts": partial(_coded, quantized_moe_experts),
    "QuantizedLinear": partial(_coded, quantized_linear),
}


class _Runner:
    def __init__(self, table: Any, trouble: str) -> None:
        self._table, self._trouble = table, trouble

    def poison(self) -> None:
        pass

    def intact(self) -> bool:
        return True

    def __call__(self, inputs, outputs) -> None:
        found = _REFERENCES[self._table.op](self._table, *inputs)
        for output, value in zip(outputs, found, strict=True):
            output.copy_(value)
            if self._trouble == "wrong":
                output.add_(1)


class FakeCard(card.Card):
    """一张没有的卡。"""

    device = "cpu"
    name, trouble = "", ""

    @staticmethod
    def missing() -> str | None:
        return os.environ.get("FAKE_MISSING")

    def __init__(self) -> None:
        self.sm, self._items = 90, 0

    def facts(self) -> dict[str, Any]:
        return {"card": "Fake", "sm": 90, "multiprocessors": 132, "memory_bytes": _FREE, "versions": {}}

    def free(self) -> int:
        self._items += 1
        if self._items == 2 and self.trouble == "signal":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self._items == 2 and self.trouble == "hang":
            time.sleep(600)
        return _ENOUGH if self.name == "ceilings" else _FREE

    def compile(self, tables) -> int:
        return len({spec for table in tables for spec in table.kernels})

    def runner(self, table, inputs):
        if self.trouble == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return _Runner(table, self.trouble)

    def graph(self, call):
        return call

    def synchronize(self) -> None:
        pass

    def seconds(self, call) -> list[float]:
        return [1e-3, 1e-3, 2e-3]


def _fake_driver() -> None:
    from tests.fake_gpu import FakeDriver, Status

    class Driver(FakeDriver):
        """录制时的拷贝只记不做，重放时才做：真的驱动也是这样。"""

        def cuMemcpyDtoDAsync(self, target, source, nbytes, stream):
            if self.recording is None:
                return super().cuMemcpyDtoDAsync(target, source, nbytes, stream)
            self.recording.append(lambda: ctypes.memmove(target, source, nbytes))
            return (Status.CUDA_SUCCESS,)

    sys.modules["cuda.bindings"] = SimpleNamespace(driver=Driver())  # type: ignore[assignment]


if __name__ == "__main__":
    FakeCard.name = sys.argv[1]
    troubles = dict(pair.split("=") for pair in os.environ.get("FAKE_CARD", "").split(",") if pair)
    FakeCard.trouble = troubles.get(FakeCard.name, "")
    card.Card = FakeCard  # type: ignore[misc]
    native.compare_launchers = lambda *_: {"ok": True}
    if FakeCard.name == "runtime":
        _fake_driver()
    sys.exit(phase.main(sys.argv[1], Path(sys.argv[2])))
