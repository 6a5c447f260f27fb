"""运行时：主模型与草稿模型的会话、采样、生成、投机解码；在哪里执行由 :mod:`deepseek_export.backend` 决定。"""

from deepseek_export.runtime.generate import Generator
from deepseek_export.runtime.loading import open_session, open_speculative
from deepseek_export.runtime.logprobs import TokenLogprobs
from deepseek_export.runtime.result import GenerationResult
from deepseek_export.runtime.sampling import Sampler, SamplingParams
from deepseek_export.runtime.session import ModelSession
from deepseek_export.runtime.speculation.draft import DraftSession
from deepseek_export.runtime.speculation.floor import MeasuredFloor, SpeculativeFloor
from deepseek_export.runtime.speculation.generator import SpeculativeGenerator
from deepseek_export.runtime.speculation.stats import SpeculationStats
from deepseek_export.runtime.stop import StopStrings
from deepseek_export.runtime.streaming import TextStream
from deepseek_export.runtime.tokenizer import BundleTokenizer, TokenStream

__all__ = [
    "BundleTokenizer",
    "DraftSession",
    "GenerationResult",
    "Generator",
    "MeasuredFloor",
    "ModelSession",
    "Sampler",
    "SamplingParams",
    "SpeculationStats",
    "SpeculativeFloor",
    "SpeculativeGenerator",
    "StopStrings",
    "TextStream",
    "TokenLogprobs",
    "TokenStream",
    "open_session",
    "open_speculative",
]
