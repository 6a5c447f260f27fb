"""解码一步的时间随上下文怎么走（MLA-6）：baseline、naive、absorb 与 transformers，同一份检查点、同一个进程里交替。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from deepseek_export import api
from deepseek_export.bench.depth import DepthDecoder
from deepseek_export.bench.spread import Spread, interleaved, paired_ratio
from perf.results import Case, SuiteResult
from perf.workspace import Workspace

TITLE = "解码一步的时间与上下文"
#: 系列 → 方案与覆盖项。
SERIES = {
    "baseline": ("baseline", ()),
    "naive": ("mla", ("mla.form=naive",)),
    "absorb": ("mla", ("mla.form=absorb",)),
}
PEER = "transformers"


@dataclass(frozen=True)
class Scenario:
    """固定的场景：V2-Lite 的头，两层，float32。"""

    shape: str = "v2-lite-2"
    batch: int = 1
    contexts: tuple[int, ...] = (256, 1024, 4096, 8192, 16384)
    runs: int = 7


FULL = Scenario()
QUICK = Scenario(contexts=(256, 8192), runs=5)


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """测全部上下文长度。"""
    scenario = QUICK if quick else FULL
    checkpoint = workspace.checkpoint(scenario.shape)
    sessions = {
        name: api.load(workspace.bundle(checkpoint, profile, "float32", overrides), threads).session
        for name, (profile, overrides) in SERIES.items()
    }
    peer = _Transformers(checkpoint, scenario.batch, threads)
    cases = []
    for context in scenario.contexts:
        steps: dict[str, Callable[[], float]] = {
            name: DepthDecoder(session, scenario.batch, context).step for name, session in sessions.items()
        }
        steps[PEER] = peer.at(context)
        values = {f"{name}.step_s": Spread.of(s) for name, s in interleaved(steps, scenario.runs, 2).items()}
        ratios = {
            f"absorb/{other}": paired_ratio(values["absorb.step_s"], values[f"{other}.step_s"])
            for other in ("baseline", "naive", PEER)
        }
        cases.append(
            Case(name=f"context {context}", values=values, ratios=ratios, facts={"context": context})
        )
    return SuiteResult(suite="mla-decode", title=TITLE, scenario=asdict(scenario), cases=cases)


class _Transformers:
    """transformers 自己的模型，缓存同样直接填好。"""

    def __init__(self, checkpoint: Path, batch: int, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._ids = torch.zeros((batch, 1), dtype=torch.long)

    def at(self, context: int) -> Callable[[], float]:
        """每行已有 ``context - 1`` 个 token，再来一个；走完退回原长，退回不计时。"""
        import torch
        from transformers import DynamicCache

        model, ids = self._model, self._ids
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(ids, past_key_values=cache)  # 走一步，缓存就有了真的布局，再换成那么长的随机数
            for layer in cache.layers:
                for name in ("keys", "values"):
                    shape = list(getattr(layer, name).shape)
                    shape[-2] = context - 1
                    setattr(layer, name, torch.randn(shape))
        position = torch.full_like(ids, context - 1)

        def step() -> float:
            with torch.inference_mode():
                began = perf_counter()
                model(ids, past_key_values=cache, position_ids=position)
                seconds = perf_counter() - began
                cache.crop(-1)
            return seconds

        return step
