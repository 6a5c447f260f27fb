"""bundle → 会话与投机解码器。"""

from __future__ import annotations

from typing import Literal

from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.checkpoint import stop_token_ids
from deepseek_export.cpu_library import library_for
from deepseek_export.engine.derived import engine_bundle
from deepseek_export.runtime.cuda import require_gpu
from deepseek_export.runtime.draft import DraftSession
from deepseek_export.runtime.plan import find_engine
from deepseek_export.runtime.session import ModelSession
from deepseek_export.runtime.speculation import Floor, MeasuredFloor, SpeculativeFloor
from deepseek_export.runtime.speculative import SpeculativeGenerator
from deepseek_export.runtime.tensorrt import TensorRTDraftSession, TensorRTSession
from deepseek_export.runtime.tokenizer import BundleTokenizer

Backend = Literal["ort", "trt"]


def bundle_for(bundle: Bundle, backend: Backend) -> Bundle:
    """在这个后端上实际运行的 bundle：``trt`` 时是引擎由之建成的那个，见 :mod:`deepseek_export.engine.derived`。

    Raises:
        DsxError: ``DSX-E918`` 没有 GPU；``DSX-E920`` 没有引擎。
    """
    if backend == "trt":
        require_gpu()
        return engine_bundle(bundle)
    return bundle


def open_session(
    bundle: Bundle, weights: BundleWeights, threads: int | None = None, backend: Backend = "ort"
) -> ModelSession:
    """打开主模型。

    Args:
        bundle: 打开的 bundle，先过 :func:`bundle_for`。
        weights: 它的权重；与草稿模型用同一个，共有的权重只占一份内存。
        threads: 线程数；只对 ``ort`` 有意义。
        backend: ``ort`` 是 ONNX Runtime CPU，``trt`` 是 ``dsx build`` 为当前 GPU 建的引擎。

    Raises:
        DsxError: ``DSX-E507`` / ``DSX-E508``，加载失败或不符合约定；``DSX-E115`` / ``DSX-E116``，权重有问题；``DSX-E918``
            没有 GPU；``DSX-E920`` 没有引擎；``DSX-E917`` 引擎与这里不符；``DSX-E520`` / ``DSX-E521``
            C++ 算子库用不了。
    """
    if backend == "trt":
        directory, _ = find_engine(bundle, require_gpu())
        return TensorRTSession(bundle, directory / "model.plan")
    bundle.check_runs_on_onnxruntime()
    return ModelSession(
        bundle.model_path,
        threads=threads,
        max_positions=bundle.manifest.model.max_position_embeddings,
        initializers=weights.arrays(bundle.model_path),
        library=library_for(bundle.manifest.target),
    )


def open_speculative(
    bundle: Bundle,
    weights: BundleWeights,
    session: ModelSession,
    tokenizer: BundleTokenizer | None,
    threads: int | None = None,
    floor: bool = True,
) -> SpeculativeGenerator | None:
    """按 manifest 打开草稿模型；bundle 没有打开 MTP 时为 ``None``。

    Args:
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
    if not bundle.draft_paths:
        return None
    # 草稿不足模块数时，后面的模块用不到，不必加载。
    drafts = [
        TensorRTDraftSession(bundle, session.plan_path.with_name(f"{path.stem}.plan"))
        if isinstance(session, TensorRTSession)
        else DraftSession(
            path,
            threads=threads,
            max_positions=config.max_position_embeddings,
            initializers=weights.arrays(path),
            library=library_for(bundle.manifest.target),
        )
        for path in bundle.draft_paths[: mtp.num_draft_tokens]
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
        session.prefill_chunk,
        floor=limit if floor else None,
    )
