"""``DsxForCausalLM``：编译好的 bundle，用起来像一个 transformers 模型。

``generate`` 是 transformers 自己的：logits processor、停止条件、streamer、beam search、assisted decoding、
``pipeline("text-generation")`` 都照常；每一步的前向在 ONNX Runtime 或 TensorRT 会话上、在原地更新的缓存里完成。
"""

from __future__ import annotations

import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from deepseek_export.backend import backend_named
from deepseek_export.bundle import Bundle, BundleWeights, Manifest, read_bundle
from deepseek_export.checkpoint import stop_token_ids
from deepseek_export.errors import DsxError
from deepseek_export.integration.bundle_cache import BundleCache
from deepseek_export.integration.compat import cache_name, install_tested
from deepseek_export.parity.self_check import agreed_note, agrees, is_newer, tested_range
from deepseek_export.progress import Progress
from deepseek_export.runtime import ModelSession, open_session
from deepseek_export.runtime.batching import PAD_ID

#: transformers 的循环把 ``generate`` 自己用的这几样也传给 forward。
_GENERATE_OWN = ("tokenizer", "assistant_tokenizer")
#: 交叉熵忽略的 label。
_IGNORED_LABEL = -100


class DsxConfig(PreTrainedConfig):
    """``generate`` 与 ``pipeline`` 要看的那几个字段；模型的完整配置在 manifest 里。"""

    model_type = "dsx_bundle"

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> DsxConfig:
        """由 manifest 得出。"""
        model = manifest.model
        fields: dict[str, Any] = {
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_hidden_layers,
            "num_attention_heads": model.num_attention_heads,
            "max_position_embeddings": model.max_position_embeddings,
            "bos_token_id": model.bos_token_id,
            "eos_token_id": list(model.eos_token_ids) or None,
            "pad_token_id": model.pad_token_id,
        }
        return cls(**fields)


class DsxForCausalLM(PreTrainedModel, GenerationMixin):
    """一个加载好的 bundle；用 :meth:`from_pretrained` 得到。

    Attributes:
        bundle: 打开的 bundle。
        session: 主模型的会话。
    """

    config_class = DsxConfig
    main_input_name = "input_ids"

    def __init__(self, config: DsxConfig, bundle: Bundle, session: ModelSession) -> None:
        super().__init__(config)
        self.bundle, self.session = bundle, session
        if (bundle.path / "generation_config.json").is_file():
            self.generation_config = GenerationConfig.from_pretrained(bundle.path)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: Path | str,
        *,
        threads: int | None = None,
        backend: str = "ort",
        verify_weights: bool | None = None,
    ) -> DsxForCausalLM:
        """打开 ``dsx export`` 的输出目录。

        Args:
            path: bundle 目录。
            threads: 线程数；缺省由 ONNX Runtime 决定。
            backend: ``ort`` 是 ONNX Runtime CPU；``trt`` 是 ``dsx build`` 为当前 GPU 建的引擎，缓存在显存里。
            verify_weights: 先读一遍哪些权重，核对 sha256，同 :func:`deepseek_export.load`。

        Raises:
            DsxError: 4xx bundle 有问题；``DSX-E802`` transformers 比测过的新，自检不一致；``DSX-E121`` 结束生成的 token 不能用；``DSX-E918`` / ``DSX-E920`` 没有 GPU 或引擎；``DSX-E507`` / ``DSX-E508`` 模型加载失败；``DSX-E115`` / ``DSX-E116`` 权重有问题。
        """
        chosen = backend_named(backend)

        def read(opened: Bundle) -> DsxForCausalLM:
            opened.confirm_weights(verify_weights, Progress())
            bundle = chosen.prepared(opened)
            with bundle.steady():
                # transformers 读同一个文件，却不报坏在哪里
                stop_token_ids(bundle.path, bundle.manifest.model)
                session = open_session(chosen, bundle, BundleWeights(bundle), threads)
                model = cls(DsxConfig.from_manifest(bundle.manifest), bundle, session).eval()
                model._check_newer()
                return model

        return read_bundle(path, read)

    def _check_newer(self) -> None:
        """transformers 比测过的新：它的 ``generate`` 与不带缓存、逐步取最大的 forward 走得一样吗。"""
        version = metadata.version("transformers")
        if not is_newer(version):
            return
        if difference := agrees("generate", {"model_type": DsxConfig.model_type}, self._difference):
            what = f"装的是 {version}，测过 {tested_range()}；generate 自检不一致：{difference}"
            raise DsxError("DSX-E802", what, install_tested())
        warnings.warn(agreed_note(version, "generate"), stacklevel=3)

    def _difference(self) -> str | None:
        """一条左填充的 prompt，greedy 三步。"""
        ids = torch.tensor([[0, 1, 2, 1]])
        mask = torch.tensor([[0, 1, 1, 1]])
        try:
            out = self.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=3, pad_token_id=0)
            for count in range(ids.shape[1], out.shape[1]):
                longer = torch.ones(1, count, dtype=mask.dtype)
                longer[:, : mask.shape[1]] = mask
                logits: Any = self.forward(out[:, :count], attention_mask=longer, use_cache=False).logits
                if int(logits[0, -1].argmax()) != int(out[0, count]):
                    return f"第 {count - ids.shape[1] + 1} 个 token"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    @property
    def device(self) -> torch.device:
        """会话的输入输出都在主机上。"""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """logits 的 dtype；图内的计算 dtype 见 manifest。"""
        return torch.float32

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """bundle 本身就是一个目录，没有可另存的权重。

        Raises:
            DsxError: ``DSX-E809``，总是。
        """
        raise DsxError("DSX-E809", "DsxForCausalLM 没有 save_pretrained", f"直接复制目录 {self.bundle.path}")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: BundleCache | None = None,
        past_key_values: BundleCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        labels: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids: [B, S]。
            attention_mask: [B, 已有列数 + S]，0 是填充；填充可以在任何位置。
            position_ids: 只能是由 ``attention_mask`` 数出来的那个，图自己会算。
            cache, past_key_values: 同一个东西，名字随 transformers 的版本；不给就新建。
            inputs_embeds: 不支持。
            use_cache: ``False`` 时不返回缓存。
            logits_to_keep: 同 transformers：0 是全部，正数是末尾几列，张量是列号。
            return_dict: 总返回对象。
            labels: [B, S]，-100 不计；有它就算 transformers 的因果语言模型 loss，没有梯度。
            others: 别的参数只要不是空的就拒绝。``output_hidden_states`` 也是：图只给得出最终 norm 之后的那一层。

        Returns:
            logits [B, L, V] float32；填充列的 logits 没有意义。给了 ``labels`` 还有 ``loss``。

        Raises:
            DsxError: ``DSX-E808`` 输入不支持；``DSX-E506`` 超过最大长度；``DSX-E509`` token id 越界。
        """
        self._refuse_others(others)
        held = cache if cache is not None else past_key_values
        if input_ids is None or inputs_embeds is not None:
            raise _unsupported("inputs_embeds：词嵌入在图里", "给 input_ids")
        if held is not None and not isinstance(held, BundleCache):
            raise _unsupported(
                f"{type(held).__name__}：bundle 用自己的原地缓存", "不给缓存，或给上一次返回的那个"
            )
        held = BundleCache(self.session) if held is None else held
        ids = input_ids.cpu().numpy()
        buffers = held.allocate(len(ids))
        valid = _new_columns(attention_mask, held.valid, ids.shape)
        index = held.lens[:, None] + valid.cumsum(1) - 1
        if position_ids is not None:
            _check_positions(position_ids, index, valid)
        kept = _kept_columns(logits_to_keep, ids.shape[1])
        if labels is not None:
            _check_labels(labels, valid, kept)
        wanted = np.maximum(index - held.lens[:, None], 0)[:, kept]
        logits = self._run(ids, valid, wanted, held.lens, buffers)
        held.append(valid)
        for note in self.session.notes:
            warnings.warn(note, RuntimeWarning, stacklevel=2)
        output = CausalLMOutputWithPast(logits=torch.from_numpy(logits).to(input_ids.device))
        if labels is not None:
            output["loss"] = self.loss_function(output.logits, labels, vocab_size=self.session.vocab_size)
        if use_cache is not False:
            output[cache_name()] = held
        return output

    def _refuse_others(self, others: dict[str, Any]) -> None:
        asked = {"output_hidden_states": self.config.output_hidden_states} | others
        for name, value in asked.items():
            if name in _GENERATE_OWN or value is None or value is False:
                continue
            if name == "output_hidden_states":
                raise _unsupported(
                    f"{name}：图只给得出最终 norm 之后的 hidden，没有各层的", "去掉它，或用源模型"
                )
            raise _unsupported(f"{name}：bundle 的 forward 没有这个参数", "去掉它")

    def _run(self, ids, valid, wanted, past, buffers) -> np.ndarray:
        """真正的 token 挤到左边、分块跑完；返回 ``wanted`` [B, L]（挤过之后的列号）处的 logits [B, L, V]。"""
        counts = valid.sum(1)
        width = max(int(counts.max()), 1)
        order = np.argsort(~valid, axis=1, kind="stable")
        packed = np.where(
            np.arange(ids.shape[1]) < counts[:, None], np.take_along_axis(ids, order, 1), PAD_ID
        )
        out = np.zeros((*wanted.shape, self.session.vocab_size), np.float32)
        limit = self.session.limits.logits_rows
        chunk = self.session.limits.prefill_chunk if limit is None or wanted.shape[1] <= limit else limit
        for start in range(0, width, chunk):
            part = packed[:, start : min(start + chunk, width)]
            lens = past + np.minimum(start, counts)
            buffers.ensure(int(lens.max()) + part.shape[1])
            here = (wanted >= start) & (wanted < start + part.shape[1])
            columns = np.flatnonzero(here.any(0))
            # 这一块没有要的列时也得取一列：L 至少是 1。
            asked = columns if columns.size else np.arange(1)
            positions = np.clip(wanted[:, asked] - start, 0, part.shape[1] - 1)
            got = self.session.run(part, lens, positions, buffers)
            out[:, asked] = np.where(here[:, asked, None], got, out[:, asked])
        return out

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """``generate`` 的缓存换成 bundle 的。"""
        if generation_config.cache_implementation is not None:
            raise _unsupported(
                f"cache_implementation={generation_config.cache_implementation!r}：bundle 用自己的原地缓存",
                "去掉 cache_implementation",
            )
        if generation_config.use_cache is not False and model_kwargs.get(cache_name()) is None:
            model_kwargs[cache_name()] = BundleCache(self.session)


def _new_columns(mask: Tensor | None, cached: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """这次的 [B, S] 列里哪些是真正的 token。"""
    if mask is None:
        return np.ones(shape, np.bool_)
    got = mask.cpu().numpy()
    past = cached.shape[1]
    if got.shape != (shape[0], past + shape[1]):
        raise _unsupported(
            f"attention_mask 的形状是 {list(got.shape)}，应为 [{shape[0]}, {past + shape[1]}]",
            "给二维的 0/1 遮罩，已缓存的列也要算上",
        )
    if not np.array_equal(got[:, :past] != 0, cached):
        raise _unsupported("attention_mask 改了已经缓存的列", "缓存按当时的遮罩写好了；要换遮罩就重新开始")
    return got[:, past:] != 0


def _check_positions(position_ids: Tensor, index: np.ndarray, valid: np.ndarray) -> None:
    got = np.broadcast_to(position_ids.cpu().numpy(), index.shape)
    if not np.array_equal(got[valid], index[valid]):
        raise _unsupported("position_ids 与 attention_mask 数出来的位置不同", "不给 position_ids")


def _check_labels(labels: Tensor, valid: np.ndarray, kept: np.ndarray) -> None:
    """loss 要用到的每一列都得有真的 logits：第 i 列预测第 i+1 列的 label。"""
    if labels.shape != valid.shape:
        raise _unsupported(
            f"labels 的形状是 {list(labels.shape)}，应为 {list(valid.shape)}", "与 input_ids 同形"
        )
    if len(kept) != valid.shape[1]:
        raise _unsupported("labels 与 logits_to_keep 一起给：loss 要全部的 logits", "去掉其中一个")
    counted = labels.cpu().numpy()[:, 1:] != _IGNORED_LABEL
    row, column = np.nonzero(counted & ~valid[:, :-1])
    if row.size:
        raise _unsupported(
            f"第 {row[0]} 行第 {column[0] + 1} 列的 label 要由填充列预测，那里的 logits 没有意义",
            f"把填充列与左填充之后第一列的 label 设成 {_IGNORED_LABEL}",
        )


def _kept_columns(logits_to_keep: int | Tensor, columns: int) -> np.ndarray:
    every = np.arange(columns)
    if isinstance(logits_to_keep, Tensor):
        return every[logits_to_keep.cpu().numpy()]
    return every[-logits_to_keep:] if logits_to_keep else every


def _unsupported(what: str, todo: str) -> DsxError:
    return DsxError("DSX-E808", what, todo)


# 登记之后 pipeline 才认得这个类；配置类是自己的，不影响 transformers 已有的模型。
AutoModelForCausalLM.register(DsxConfig, DsxForCausalLM)
