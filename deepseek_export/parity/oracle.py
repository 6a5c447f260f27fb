"""对照的基准：transformers 自己的模型；没装 transformers 时退到 dsx 参考模型，并在报告里写明。"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch

from deepseek_export.bundle import Manifest
from deepseek_export.checkpoint import Checkpoint, expected_tensors
from deepseek_export.checkpoint.bind import bind_recipes
from deepseek_export.checkpoint.families import FAMILIES
from deepseek_export.checkpoint.recipe import Recipe, load_array
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.errors import DsxError
from deepseek_export.parity.keys import index_int8, narrow_cache
from deepseek_export.parity.measures import measure
from deepseek_export.parity.self_check import agreed_note, agrees, is_newer, release, shrunk, tested_range
from deepseek_export.parity.tolerances import TOLERANCES
from deepseek_export.paths import read_text
from deepseek_export.reference import Forms, load_reference
from deepseek_export.reference.mla import AttentionForm
from deepseek_export.reference.weights import Rounding, torch_dtype
from deepseek_export.version import MAX_TRANSFORMERS, MIN_TRANSFORMERS


class Oracle(Protocol):
    """基准要会的两件事。"""

    name: str

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """一条序列的全部 logits，[len, V] float32。"""

    def greedy(self, ids: Sequence[int], steps: int) -> list[int]:
        """greedy 续写 ``steps`` 个 token，不因 EOS 停。"""


class TransformersOracle:
    """transformers 里实现这个家族的模型，直接读同一个检查点。

    FP8、4 位的检查点例外：transformers 读它们要另装 accelerate、compressed-tensors 等，FP8 在 CPU 上还反量化成 bfloat16，比不出 float32
    的误差；所以把权重反量化好再交给它。
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str) -> None:
        import transformers

        self.name = f"transformers {transformers.__version__}"
        # 都用 eager：softmax 用 float32，与 DeepSeek 原版一致；缺省的 grouped_mm 还要求步长是 16 字节的倍数。
        options: dict[str, Any] = {
            "dtype": torch_dtype(dtype),
            "attn_implementation": "eager",
            "experts_implementation": "eager",
            "local_files_only": True,
        }
        with _quiet(transformers):
            config = _transformers_config(transformers, checkpoint)
            if checkpoint.config.weight_block_size is None and checkpoint.config.int4 is None:
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    checkpoint.path, config=config, **options
                )
            else:
                model_class: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
                state = _dequantized(checkpoint)
                model = model_class.from_pretrained(None, config=config, state_dict=state, **options)
        self._model: Any = model.eval()
        # transformers 5.24 前后把 past_key_values 改名为 cache，参数与输出字段同名。
        parameters = inspect.signature(self._model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self._model(torch.tensor([list(ids)])).logits[0].float().numpy()

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], steps: int) -> list[int]:
        out = self._model(torch.tensor([list(ids)]), use_cache=True)
        tokens = [int(out.logits[0, -1].argmax())]
        while len(tokens) < steps:
            past = {self._cache_name: out[self._cache_name]}
            out = self._model(torch.tensor([[tokens[-1]]]), use_cache=True, **past)
            tokens.append(int(out.logits[0, -1].argmax()))
        return tokens


def _transformers_config(transformers: Any, checkpoint: Checkpoint) -> Any:
    """检查点的配置，不带量化；家族在 transformers 里由别的 model_type 实现时（kimi_k2 就是 deepseek_v3）换成那一个。"""
    data = json.loads(read_text(checkpoint.path / "config.json"))
    data.pop("quantization_config", None)
    kind = FAMILIES[checkpoint.config.family].transformers_type
    return transformers.CONFIG_MAPPING[kind].from_dict(data | {"model_type": kind})


def _dequantized(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """主干的全部张量，float32，名字与形状同检查点。"""
    recipes = {
        name: Recipe(op="copy", sources=(name,), shape=shape, dtype="float32")
        for name, shape in expected_tensors(checkpoint.config).items()
    }
    return {
        name: torch.from_numpy(load_array(name, recipe, checkpoint.store))
        for name, recipe in bind_recipes(recipes, checkpoint).items()
    }


class ReferenceOracle:
    """dsx 参考模型（expanded 注意力、每个专家都跑：与被验证的图走不同的算法）。"""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str,
        quantized: Mapping[str, Rounding] = MappingProxyType({}),
        attention: AttentionForm = "expanded",
        cache_dtype: str | None = None,
        index_int8: bool = False,
    ) -> None:
        self.name = "dsx reference" + ("（同样的量化权重）" if quantized else "")
        forms = Forms(attention, "dense", index_int8=index_int8)
        self._model = load_reference(checkpoint, forms, dtype, quantized)  # type: ignore[arg-type]
        self._cache_dtype = torch_dtype(cache_dtype or dtype)

    @classmethod
    def for_bundle(
        cls, checkpoint: Checkpoint, manifest: Manifest, rounding: Mapping[str, Rounding]
    ) -> ReferenceOracle:
        """与 bundle 同样的权重（含量化）与缓存 dtype；缓存窄的，舍入的是同样的 latent，注意力取另一种形式。"""
        narrow = narrow_cache(manifest)
        attention: AttentionForm = "expanded"
        if narrow is not None:
            attention = "absorb" if manifest.profile.mla.form == "naive" else "naive"
        return cls(checkpoint, manifest.dtype, rounding, attention, narrow, index_int8(manifest))

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        tokens, past = torch.tensor([list(ids)]), torch.zeros(1, dtype=torch.int64)
        caches = self._model.empty_caches(1, len(ids), self._cache_dtype)
        logits, _, _ = self._model(tokens, past, torch.arange(len(ids))[None], caches)
        return logits[0].float().numpy()

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], steps: int) -> list[int]:
        model, tokens = self._model, list(ids)
        caches = model.empty_caches(1, len(ids) + steps, self._cache_dtype)
        new, past = list(ids), 0
        while len(tokens) < len(ids) + steps:
            last = torch.tensor([[len(new) - 1]])
            logits, _, caches = model(torch.tensor([new]), torch.tensor([past]), last, caches)
            past += len(new)
            new = [int(logits[0, 0].argmax())]
            tokens += new
        return tokens[len(ids) :]


def make_oracle(checkpoint: Checkpoint, dtype: str) -> tuple[Oracle, list[str]]:
    """选基准。

    Returns:
        基准，以及要写进报告的说明（没装 transformers，或者装的比测过的新而自检一致）。

    Raises:
        DsxError: ``DSX-E603``，transformers 太旧，或者比测过的新而自检不一致。
    """
    try:
        import transformers
    except ImportError:
        note = "没有安装 transformers：model 与 tokens 层以 dsx 参考模型为准（pip install 'deepseek-export[hf]'）"
        return ReferenceOracle(checkpoint, dtype), [note]
    if release(transformers.__version__) < MIN_TRANSFORMERS:
        raise DsxError(
            "DSX-E603",
            f"装的是 transformers {transformers.__version__}，测过 {tested_range()}",
            "pip install -U transformers",
        )
    notes = []
    if is_newer(transformers.__version__):
        _check_newer(transformers, checkpoint)
        notes = [agreed_note(transformers.__version__, f"{checkpoint.config.family} 的小模型")]
    return TransformersOracle(checkpoint, dtype), notes


def _check_newer(transformers: Any, checkpoint: Checkpoint) -> None:
    """没测过的 transformers 与参考模型在结构相同的小模型上比一次。"""
    with _quiet(transformers):
        config = shrunk(_transformers_config(transformers, checkpoint))
    family = {"model_type": checkpoint.config.family}
    if difference := agrees("oracle", config, lambda: small_difference(config | family)):
        raise DsxError(
            "DSX-E603",
            f"装的是 transformers {transformers.__version__}，测过 {tested_range()}；"
            f"{checkpoint.config.family} 的小模型上与参考模型不同：{difference}",
            f"换到测过的版本：pip install 'transformers<{MAX_TRANSFORMERS[0]}.{MAX_TRANSFORMERS[1] + 1}'",
        )


def small_difference(config: Mapping[str, Any]) -> str | None:
    """这个 transformers 与参考模型在小模型上差在哪里；从读检查点到 greedy 续写，读不了也算。

    Args:
        config: 小模型的 ``config.json``，见 :func:`~deepseek_export.parity.self_check.shrunk`，``model_type`` 是检查点的。
    """
    ids = [1 + 7 * i % (config["vocab_size"] - 1) for i in range(12)]
    with tempfile.TemporaryDirectory() as scratch:
        small = Checkpoint.open(write_checkpoint(Path(scratch) / "small", config, dtype="float32"))
        reference = ReferenceOracle(small, "float32")
        try:
            theirs = TransformersOracle(small, "float32")
            measured = measure(theirs.logits(ids), reference.logits(ids))
            same = theirs.greedy(ids, 4) == reference.greedy(ids, 4)
        except DsxError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    if not TOLERANCES["logits", "float32"].accepts(measured):
        return f"logits 差 {measured.max_abs:.2g}，在位置 {measured.coordinate}"
    return None if same else "greedy 续写的 token"


@contextlib.contextmanager
def _quiet(transformers):
    """加载时的进度条与提示会混进 dsx 自己的输出。"""
    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
