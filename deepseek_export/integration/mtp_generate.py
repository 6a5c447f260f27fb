"""``generate`` 用上 MTP：起草、一次验证、每行各收各的，batch 任意；greedy 的输出与不用 MTP 时逐 token 相同。

transformers 自己的 assisted decoding 只支持 batch 1，因为各行接受的草稿个数不同而缓存是一列列的。这里不要求对齐：没被接受的列
留在缓存里、用 ``attention_mask`` 遮住，位置由遮罩数出来；所有行都没接受的末尾几列才裁掉。logits processor 与停止条件逐行调用，
看到的前缀与普通解码完全相同。
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation import GenerationMode

from deepseek_export.errors import DsxError
from deepseek_export.integration.attention import check_implementation
from deepseek_export.integration.compat import cache_name
from deepseek_export.integration.mtp import MtpDraft, MtpStats, column_positions, new_draft_cache

#: 这些参数给了就不走 MTP：要么改变解码的方式，要么逐行调用时含义会变。
_PLAIN_OPTIONS = (
    "custom_generate",
    "inputs_embeds",
    "negative_prompt_ids",
    "position_ids",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
)
_PLAIN_SETTINGS = (
    "cache_implementation",
    "guidance_scale",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "prefill_chunk_size",
    "return_dict_in_generate",
    "stop_strings",  # transformers 把 tokenizer 丢在 custom_generate 之外，停止条件建不起来
    "watermarking_config",
)
#: batch 大于 1 时，普通解码里先停的行会被填充、没有 EOS 时却继续生成；自定义的处理器也可能记着行号。
_SINGLE_ROW_OPTIONS = ("logits_processor", "stopping_criteria", "max_time")


def mtp_generate(model: Any, draft: MtpDraft, *args: Any, use_mtp: bool | None = None, **kwargs: Any) -> Any:
    """装在模型上的 ``generate``；参数同 transformers。

    Args:
        model: 主模型。
        draft: 草稿器。
        *args, **kwargs: 原样交给 transformers 的 ``generate``。
        use_mtp: ``None`` 表示能用就用：greedy 走 MTP，其余（采样、beam search……）照旧；``False`` 不用；``True`` 一定要用。

    Raises:
        DsxError: ``DSX-E807``，``use_mtp=True`` 而这种用法不能走 MTP；``DSX-E804``，``apply`` 之后模型换了设备、dtype
            或 attention 实现，或挂上了 MTP 会绕过的 hook。
    """
    plain = functools.partial(type(model).generate, model)
    reason = None if use_mtp is False else _obstacle(model, plain, args, kwargs)
    if use_mtp is False or (use_mtp is None and reason):
        return plain(*args, **kwargs)
    if reason:
        raise DsxError("DSX-E807", f"use_mtp=True，但 {reason}", "去掉 use_mtp=True：这种用法走普通解码")
    _check_still_usable(model, draft)
    decode = functools.partial(_decode, draft=draft, streamer=kwargs.get("streamer"))
    return plain(*args, custom_generate=decode, **kwargs)


def _check_still_usable(model: Any, draft: MtpDraft) -> None:
    """``apply`` 之后模型可能变了：MTP 模块不在 state_dict 里，不跟着变；主模型的 ``model`` 与 ``lm_head`` 由这里直接调用。"""
    check_implementation(model.config)
    weight, own = model.get_input_embeddings().weight, draft.module.eh_proj.weight
    if (weight.device, weight.dtype) != (own.device, own.dtype):
        raise DsxError(
            "DSX-E804",
            f"apply 之后模型换成了 {weight.dtype}（{weight.device}），MTP 模块还是 {own.dtype}（{own.device}）",
            "再 apply 一次",
        )
    if "forward" in vars(model) or model._forward_hooks or model._forward_pre_hooks:
        raise DsxError(
            "DSX-E804",
            f"{type(model).__name__} 上挂着 hook，或 forward 被包装过；MTP 直接调用 model.model 与 lm_head，会绕过它",
            "取下 hook，挂到 model.model 或 lm_head 上，或 generate(use_mtp=False)",
        )


def _obstacle(model: Any, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """为什么这次不能走 MTP；能走就是 ``None``。"""
    bound = inspect.signature(plain).bind_partial(*args, **kwargs).arguments
    options = {**bound.pop("kwargs", {}), **bound}
    settings = copy.deepcopy(model.generation_config)
    given = options.get("generation_config")
    for source in (given.to_dict() if given is not None else {}, options):
        for name, value in source.items():
            if value is not None and hasattr(settings, name):
                setattr(settings, name, value)
    mode = settings.get_generation_mode(options.get("assistant_model"))
    if mode != GenerationMode.GREEDY_SEARCH:
        return f"解码方式是 {mode.value}，MTP 只验证 greedy"
    if settings.use_cache is False:
        return "use_cache=False，MTP 要用缓存"
    held = options.get(cache_name())
    if held is not None and type(held) is not DynamicCache:
        return f"给了 {type(held).__name__}，MTP 要能裁掉末尾几列的 DynamicCache"
    if held is not None and held.get_seq_length() > 0:
        return "续用的缓存里没有 MTP 要的 hidden"
    for name in _PLAIN_OPTIONS:
        if options.get(name) is not None:
            return f"给了 {name}"
    for name in _PLAIN_SETTINGS:
        if getattr(settings, name, None) not in (None, False, "dynamic"):
            return f"设了 {name}"
    ids = options.get("inputs", options.get("input_ids"))
    for name in _SINGLE_ROW_OPTIONS:
        given_here = options.get(name) is not None or getattr(settings, name, None) is not None
        if given_here and ids is not None and len(ids) > 1:
            return f"batch 大于 1 而给了 {name}"
    return None


def _decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    draft: MtpDraft,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor:
    """transformers 的 ``custom_generate``：参数已由 ``generate`` 准备好；返回 [B, 最长的一行]。"""
    cache, draft_cache = model_kwargs[cache_name()], new_draft_cache()
    mask = model_kwargs.get("attention_mask")
    valid = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.dtype)
    rows = _Rows(input_ids, logits_processor, stopping_criteria, streamer, generation_config)
    stats = draft.stats = MtpStats(main_calls=1)

    hidden = _main(model, input_ids, valid, cache)
    chosen, accepted = rows.accept(model.lm_head(hidden[:, -1:]), input_ids[:, :0])
    # 每列的下一个 token：prompt 左移一格，末尾是刚选出来的。
    following = torch.cat([input_ids[:, 1:], chosen], dim=1)
    last = torch.full_like(accepted, input_ids.shape[1] - 1)
    while rows.active.any():
        drafts = _propose(model, draft, following, hidden, last, valid, draft_cache, rows.room)
        K = drafts.shape[1]
        active = rows.active.clone()
        columns = torch.cat([rows.newest[:, None], drafts], dim=1)
        ones = valid.new_ones(columns.shape)
        hidden = _main(model, columns, torch.cat([valid, ones], dim=1), cache)
        stats.main_calls += 1
        chosen, accepted = rows.accept(model.lm_head(hidden), drafts)
        stats.drafted += K * int(active.sum())
        stats.accepted += int(accepted[active].sum())
        # 所有行都没接受的末尾几列裁掉，其余没接受的遮住。
        kept = int(accepted.max()) + 1
        cache.crop(kept - columns.shape[1])
        hidden, following = hidden[:, :kept], chosen[:, :kept]
        real = torch.arange(kept, device=valid.device) <= accepted[:, None]
        valid = torch.cat([valid, real.to(valid.dtype)], dim=1)
        last = accepted.clamp(min=0)
    stats.tokens = rows.tokens_generated
    if streamer is not None:
        streamer.end()
    return rows.sequences


def _main(model: Any, columns: Tensor, valid: Tensor, cache: Any) -> Tensor:
    """主模型走一次；返回最终 norm 之后的 hidden [B, S, D]。"""
    positions = column_positions(valid)[:, -columns.shape[1] :]
    out = model.model(
        input_ids=columns,
        attention_mask=valid,
        position_ids=positions,
        use_cache=True,
        **{cache_name(): cache},
    )
    return out.last_hidden_state


def _propose(
    model: Any,
    draft: MtpDraft,
    following: Tensor,
    hidden: Tensor,
    last: Tensor,
    valid: Tensor,
    cache: Any,
    room: int,
) -> Tensor:
    """起草 [B, K]：先把主模型新走过的列喂给 MTP 模块，再递归；递归的列不留在草稿的缓存里。

    Args:
        following, hidden: 新走过的列的下一个 token [B, S] 与 hidden [B, S, D]。
        last: [B]，每行最后一个真正的新列。
        valid: [B, 全部列]。
        room: 至多还要几个草稿；0 时不起草。
    """
    count = min(draft.num_draft_tokens, room)
    if count == 0:
        return following[:, :0]
    out = draft.hidden(model, following, hidden, valid, cache)
    out = out[torch.arange(len(out), device=out.device), last].unsqueeze(1)
    drafts = [model.lm_head(out).argmax(-1)]
    while len(drafts) < count:
        valid = torch.cat([valid, valid.new_ones(len(valid), 1)], dim=1)
        out = draft.hidden(model, drafts[-1], out, valid, cache)
        drafts.append(model.lm_head(out).argmax(-1))
    cache.crop(1 - count)
    return torch.cat(drafts, dim=1)


class _Rows:
    """各行已有的 token。

    Attributes:
        active: [B] bool，还没结束的行。
        newest: [B]，每行最后一个 token；它还没进缓存。
    """

    def __init__(
        self, input_ids: Tensor, processors: Any, criteria: Any, streamer: Any, config: GenerationConfig
    ) -> None:
        batch, self._width = input_ids.shape
        eos = config.eos_token_id
        fallback = eos[0] if isinstance(eos, list) and eos else eos
        pad = config.pad_token_id if config.pad_token_id is not None else fallback
        self._tokens = input_ids.new_full((batch, int(config.max_length)), 0 if pad is None else pad)
        self._tokens[:, : self._width] = input_ids
        self._lens = [self._width] * batch
        self._processors, self._criteria, self._streamer = processors, criteria, streamer
        self.active = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
        self.newest = input_ids[:, -1].clone()

    @property
    def room(self) -> int:
        """还没结束的行里最多还能放几个草稿：验证时至少多出一个 token，所以少算一个。"""
        shortest = min(
            length for length, active in zip(self._lens, self.active.tolist(), strict=True) if active
        )
        return self._tokens.shape[1] - shortest - 1

    @property
    def tokens_generated(self) -> int:
        """各行新 token 的总数。"""
        return sum(self._lens) - self._width * len(self._lens)

    @property
    def sequences(self) -> Tensor:
        """[B, 最长的一行]，短的行用 pad 补齐，与 transformers 的输出相同。"""
        return self._tokens[:, : max(self._lens)]

    def accept(self, logits: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
        """按普通 greedy 的规则逐个收下，遇到与草稿不同的、或一行结束就停。

        Args:
            logits: [B, K+1, V]，依次是最新 token 与各草稿之后的。
            drafts: [B, K]。

        Returns:
            选出的 token [B, K+1]（没走到的位置无意义）；每行接受的草稿个数 [B]，已结束的行是 -1。
        """
        chosen = drafts.new_zeros(logits.shape[:2])
        accepted = drafts.new_full((len(drafts),), -1)
        for row in self.active.nonzero().flatten().tolist():
            for step in range(logits.shape[1]):
                token = self._choose(row, logits[row, step].float())
                chosen[row, step], accepted[row] = token[0], step
                if self._append(row, token) or step == drafts.shape[1] or token[0] != drafts[row, step]:
                    break
        return chosen, accepted

    def _choose(self, row: int, logits: Tensor) -> Tensor:
        """logits [V] → 过了 processor 之后的 argmax，[1]。"""
        # 有的 processor 按行号存着东西（例如每行左填充多长），所以铺成整个 batch，再取这一行。
        batch = len(self._lens)
        prefix = self._tokens[row, : self._lens[row]].expand(batch, -1)
        if len(self._processors):
            logits = self._processors(prefix, logits.repeat(batch, 1))[row]
        return logits.argmax(-1, keepdim=True)

    def _append(self, row: int, token: Tensor) -> bool:
        """收下一个 token；返回这一行是否结束。"""
        self._tokens[row, self._lens[row]] = self.newest[row] = token[0]
        self._lens[row] += 1
        if self._streamer is not None:
            self._streamer.put(token.cpu())
        done = bool(self._criteria(self._tokens[row : row + 1, : self._lens[row]], None)[0])
        self.active[row] = not done
        return done
