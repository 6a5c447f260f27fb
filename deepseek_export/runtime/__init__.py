"""运行时：在 ONNX Runtime 上跑导出的模型，带原地更新的缓存、采样与生成。"""

from deepseek_export.runtime.cache import CacheBuffers, CacheSpec, CacheTensor
from deepseek_export.runtime.draft import DraftSession
from deepseek_export.runtime.generate import Generator
from deepseek_export.runtime.loading import Backend, bundle_for, open_session, open_speculative
from deepseek_export.runtime.result import FinishReason, GenerationResult
from deepseek_export.runtime.sampling import Sampler, SamplingParams
from deepseek_export.runtime.session import ModelSession
from deepseek_export.runtime.speculation import MeasuredFloor, SpeculationStats, SpeculativeFloor
from deepseek_export.runtime.speculative import SpeculativeGenerator
from deepseek_export.runtime.tokenizer import BundleTokenizer, TokenStream

__all__ = [
    "Backend",
    "BundleTokenizer",
    "CacheBuffers",
    "CacheSpec",
    "CacheTensor",
    "DraftSession",
    "FinishReason",
    "GenerationResult",
    "Generator",
    "MeasuredFloor",
    "ModelSession",
    "Sampler",
    "SamplingParams",
    "SpeculationStats",
    "SpeculativeFloor",
    "SpeculativeGenerator",
    "TokenStream",
    "bundle_for",
    "open_session",
    "open_speculative",
]
