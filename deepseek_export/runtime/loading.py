"""bundle → 会话与投机解码器。"""

from __future__ import annotations

from deepseek_export.backend.base import Backend
from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.checkpoint import stop_token_ids
from deepseek_export.runtime.draft import DraftSession
from deepseek_export.runtime.session import ModelSession
from deepseek_export.runtime.speculation import Floor, MeasuredFloor, SpeculativeFloor
from deepseek_export.runtime.speculative import SpeculativeGenerator
from deepseek_export.runtime.tokenizer import BundleTokenizer


def open_session(
    backend: Backend, bundle: Bundle, weights: BundleWeights, threads: int | None = None
) -> ModelSession:
    """打开主模型。

    Args:
        backend: 后端。
        bundle: 打开的 bundle，先过 :meth:`Backend.prepared`。
        weights: 它的权重；与草稿模型用同一个，共有的权重只占一份内存。
        threads: 线程数；有的后端没有这一项。

    Raises:
        DsxError: ``DSX-E507`` / ``DSX-E508``，加载失败或不符合约定；其余见各后端的 ``open``。
    """
    return ModelSession(backend.open(bundle, bundle.manifest.main, weights, threads))


def open_speculative(
    backend: Backend,
    bundle: Bundle,
    weights: BundleWeights,
    session: ModelSession,
    tokenizer: BundleTokenizer | None,
    threads: int | None = None,
    floor: bool = True,
) -> SpeculativeGenerator | None:
    """按 manifest 打开草稿模型；bundle 没有打开 MTP 时为 ``None``。

    Args:
        backend: 后端，同主模型。
        bundle: 打开的 bundle。
        weights: 它的权重。
        session: 它的主模型。
        tokenizer: 只用来把结果解码成文本。
        threads: 草稿模型的线程数。
        floor: 投机不划算时退回普通解码；``False`` 一直投机。

    Raises:
        DsxError: ``DSX-E507`` / ``DSX-E508``，草稿模型加载失败或不符合约定；``DSX-E121`` 结束生成的 token 不能用。
    """
    config, mtp = bundle.manifest.model, bundle.manifest.profile.mtp
    if not bundle.manifest.drafts:
        return None
    # 草稿不足模块数时，后面的模块用不到，不必加载。
    drafts = [
        DraftSession(backend.open(bundle, graph, weights, threads))
        for graph in bundle.manifest.drafts[: mtp.num_draft_tokens]
    ]
    # 采样的结果与草稿用在哪一轮有关：要凭种子复现，停不停就不能看时间。
    measured = mtp.verify == "greedy"
    limit: Floor = MeasuredFloor() if measured else SpeculativeFloor.from_config(config, mtp.num_draft_tokens)
    return SpeculativeGenerator(
        session,
        drafts,
        tokenizer,
        stop_token_ids(bundle.path, config),
        mtp.num_draft_tokens,
        mtp.verify,
        session.limits.prefill_chunk,
        floor=limit if floor else None,
    )
