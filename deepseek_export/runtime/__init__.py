"""运行时：在 ONNX Runtime 上跑导出的模型，带原地更新的缓存、采样与生成。"""

from deepseek_export.runtime.cache import CacheBuffers, CacheSpec, CacheTensor
from deepseek_export.runtime.generate import Generator
from deepseek_export.runtime.result import FinishReason, GenerationResult
from deepseek_export.runtime.sampling import Sampler, SamplingParams
from deepseek_export.runtime.session import ModelSession
from deepseek_export.runtime.tokenizer import BundleTokenizer, TokenStream

__all__ = [
    "BundleTokenizer",
    "CacheBuffers",
    "CacheSpec",
    "CacheTensor",
    "FinishReason",
    "GenerationResult",
    "Generator",
    "ModelSession",
    "Sampler",
    "SamplingParams",
    "TokenStream",
]
