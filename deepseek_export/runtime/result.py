"""一次生成的结果与计时。"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepseek_export.runtime.logprobs import TokenLogprobs
from deepseek_export.runtime.speculation.stats import SpeculationStats

FinishReason = Literal["eos", "length", "stop"]


@dataclass(frozen=True)
class GenerationResult:
    """批内各行按输入顺序排列。

    Attributes:
        token_ids: 每行新生成的 token，含结束的 eos，不含提示词。
        text: 每行解码后的文本（去掉特殊 token，到停止串之前）；没有 tokenizer 时为 ``None``。
        prompt_lens: 每行提示词的长度。
        finish_reasons: ``eos`` 遇到结束符；``stop`` 遇到停止串；``length`` 到了 max_new_tokens 或模型的最大长度。
        prefill_s: 从开始到拿到每行第一份 logits 的秒数。
        decode_s: 其余的秒数，含采样和 on_token 回调。
        speculation: 投机解码的统计；普通解码为 ``None``。
        notes: 要告诉用户的话，例如中途停止了投机、放不下 max_new_tokens 个。
        logprobs: 每行每个新 token 的对数概率，与 ``token_ids`` 对应；没有要就是 ``None``。
    """

    token_ids: list[list[int]]
    text: list[str] | None
    prompt_lens: list[int]
    finish_reasons: list[FinishReason]
    prefill_s: float
    decode_s: float
    speculation: SpeculationStats | None = None
    notes: tuple[str, ...] = ()
    logprobs: list[list[TokenLogprobs]] | None = None

    @property
    def prompt_tokens(self) -> int:
        """提示词 token 总数。"""
        return sum(self.prompt_lens)

    @property
    def new_tokens(self) -> int:
        """新生成的 token 总数。"""
        return sum(len(ids) for ids in self.token_ids)

    @property
    def decode_tokens(self) -> int:
        """由 decode 步产出的 token 数：每行的第一个来自 prefill，不算。"""
        return sum(max(len(ids) - 1, 0) for ids in self.token_ids)

    @property
    def decode_tokens_per_s(self) -> float:
        """decode 吞吐：``decode_tokens`` 除以 ``decode_s``，整批合计。"""
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else 0.0
