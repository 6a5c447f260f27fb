"""打开一个检查点：每个张量要么被用到恰好一次，要么在忽略表里；形状与 dtype 只凭文件头就能查清。"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepseek_export.checkpoint.config import ModelConfig, load_model_config
from deepseek_export.checkpoint.int4_tensors import as_stored, check_declared, int4_dtypes
from deepseek_export.checkpoint.quantization import FP8_DTYPE, SCALE_SUFFIX
from deepseek_export.checkpoint.store import TensorStore
from deepseek_export.dtypes import BY_SAFETENSORS, DTYPES
from deepseek_export.errors import DsxError
from deepseek_export.paths import path_kind

Shapes = dict[str, tuple[int, ...]]

_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = tuple(DTYPES[name].safetensors for name in ("float32", "float16", "bfloat16"))
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_ROUTER_BIAS, _POST_MLP_NORM = "mlp.gate.e_score_correction_bias", "post_mlp_layernorm.weight"
# MTP 层里这两个张量只是主干的副本，检查点可以不带。
_MTP_COPIES = frozenset({"embed_tokens.weight", "shared_head.head.weight"})
_CHUNK = 64 << 20


def expected_tensors(config: ModelConfig) -> Shapes:
    """主干应有的全部张量，名字与 HF 检查点一致（专家逐个列出），不含 MTP 层。

    Returns:
        名字到形状；Linear 权重是 ``[out, in]``。``tie_word_embeddings`` 时不含 ``lm_head.weight``。
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: Shapes = {_EMBED: (vocab, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= _decoder_layer(config, layer)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[_HEAD] = (vocab, hidden)
    return shapes


def expected_mtp_tensors(config: ModelConfig, index: int) -> Shapes:
    """第 ``index`` 个 MTP 层应有的张量，编号接在主干之后：``model.layers.{num_hidden_layers + index}.*``。"""
    hidden, vocab = config.hidden_size, config.vocab_size
    layer = config.num_hidden_layers + index
    extra: Shapes = {
        "enorm.weight": (hidden,),
        "hnorm.weight": (hidden,),
        "eh_proj.weight": (hidden, 2 * hidden),
        "embed_tokens.weight": (vocab, hidden),
        "shared_head.norm.weight": (hidden,),
        "shared_head.head.weight": (vocab, hidden),
    }
    prefix = f"model.layers.{layer}."
    return {prefix + name: shape for name, shape in extra.items()} | _decoder_layer(config, layer)


def _unused_tensors(config: ModelConfig) -> Shapes:
    """可以存着、却没有作用的张量。

    ``n_shared_experts`` 为 0 时 transformers 仍旧建共享专家，存成宽度为 0 的张量，没有数据。A.X-K1 发布的 dense 层也存着
    ``post_mlp_layernorm``，前向不经过它；路由的偏置发布时没有，transformers 另存时补上的是零（见 :func:`_check_zero`）。
    """
    shapes: Shapes = {}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        if config.is_moe_layer(layer) and not config.n_shared_experts:
            shapes |= _mlp(prefix + "mlp.shared_experts.", config.hidden_size, 0)
        if config.is_moe_layer(layer) and not config.router_bias:
            shapes[prefix + _ROUTER_BIAS] = (config.n_routed_experts,)
        if config.post_mlp_norm and not config.is_moe_layer(layer):
            shapes[prefix + _POST_MLP_NORM] = (config.hidden_size,)
    return shapes


def _decoder_layer(config: ModelConfig, layer: int) -> Shapes:
    hidden, prefix = config.hidden_size, f"model.layers.{layer}."
    shapes: Shapes = {
        prefix + "input_layernorm.weight": (hidden,),
        prefix + "post_attention_layernorm.weight": (hidden,),
    }
    shapes |= _attention(config, prefix + "self_attn.")
    if config.runs_indexer(layer):
        shapes |= _indexer(config, prefix + "self_attn.indexer.")
    if not config.is_moe_layer(layer):
        return shapes | _mlp(prefix + "mlp.", hidden, config.intermediate_size)
    shapes[prefix + "mlp.gate.weight"] = (config.n_routed_experts, hidden)
    if config.topk_method == "noaux_tc" and config.router_bias:
        shapes[prefix + _ROUTER_BIAS] = (config.n_routed_experts,)
    if config.post_mlp_norm:
        shapes[prefix + _POST_MLP_NORM] = (hidden,)
    for expert in range(config.n_routed_experts):
        shapes |= _mlp(f"{prefix}mlp.experts.{expert}.", hidden, config.moe_intermediate_size)
    if config.n_shared_experts:
        width = config.moe_intermediate_size * config.n_shared_experts
        shapes |= _mlp(prefix + "mlp.shared_experts.", hidden, width)
    return shapes


def _attention(config: ModelConfig, prefix: str) -> Shapes:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    latent = config.latent_cache_values
    shapes: Shapes = {}
    if config.q_lora_rank is None:
        shapes["q_proj.weight"] = (heads * config.qk_head_dim, hidden)
    else:
        shapes["q_a_proj.weight"] = (config.q_lora_rank, hidden)
        shapes["q_a_layernorm.weight"] = (config.q_lora_rank,)
        shapes["q_b_proj.weight"] = (heads * config.qk_head_dim, config.q_lora_rank)
    shapes["kv_a_proj_with_mqa.weight"] = (latent, hidden)
    shapes["kv_a_layernorm.weight"] = (rank,)
    shapes["kv_b_proj.weight"] = (heads * (config.qk_nope_head_dim + config.v_head_dim), rank)
    shapes["o_proj.weight"] = (hidden, heads * config.v_head_dim)
    if config.attention_bias:
        if config.q_lora_rank is not None:
            shapes["q_a_proj.bias"] = (config.q_lora_rank,)
        shapes["kv_a_proj_with_mqa.bias"] = (latent,)
        shapes["o_proj.bias"] = (hidden,)
    return {prefix + name: shape for name, shape in shapes.items()}


def _indexer(config: ModelConfig, prefix: str) -> Shapes:
    indexer, rank = config.indexer, config.q_lora_rank
    assert indexer is not None
    assert rank is not None
    return {
        prefix + "wq_b.weight": (indexer.n_heads * indexer.head_dim, rank),
        prefix + "wk.weight": (indexer.head_dim, config.hidden_size),
        prefix + "k_norm.weight": (indexer.head_dim,),
        prefix + "k_norm.bias": (indexer.head_dim,),
        prefix + "weights_proj.weight": (indexer.n_heads, config.hidden_size),
    }


def _mlp(prefix: str, hidden: int, width: int) -> Shapes:
    return {
        prefix + "gate_proj.weight": (width, hidden),
        prefix + "up_proj.weight": (width, hidden),
        prefix + "down_proj.weight": (hidden, width),
    }


@dataclass(frozen=True)
class Checkpoint:
    """一个核对过的检查点；打开时不读权重。

    Attributes:
        path: 目录。
        config: ``config.json`` 的类型化视图。
        store: 张量的只读视图。
        mtp_tensors: MTP 层的张量名，按字典序；没有就是空。
        ignored: 已知无用、故意不读的张量名。
    """

    path: Path
    config: ModelConfig
    store: TensorStore
    mtp_tensors: tuple[str, ...]
    ignored: tuple[str, ...]

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """打开并核对一个 HF 检查点目录。

        Raises:
            DsxError: ``DSX-E101`` 目录不存在、看不了或没有权重；``DSX-E111`` 缺张量；``DSX-E112`` 多张量，
                或路由不用的偏置不是零；``DSX-E113`` 形状不符；``DSX-E114`` dtype 不支持；``DSX-E117`` 声明共享词嵌入，
                ``lm_head`` 却与它不同；``DSX-E120`` 声明是 FP8 却没有 FP8 张量；``DSX-E650`` / ``DSX-E651`` 4 位的权重
                打包不了，或与声明不符；配置与文件的错误见 ``load_model_config``、``TensorStore.open``。
        """
        path = Path(path)
        if (kind := path_kind(path, "DSX-E101")) != "directory":
            got = "不存在" if kind == "missing" else "不是目录"
            raise DsxError("DSX-E101", f"检查点目录 {path} {got}", "给出含 config.json 与 safetensors 的目录")
        path_kind(path.resolve(), "DSX-E101")  # manifest 记的是它，也得是 UTF-8
        config = load_model_config(path)
        store = TensorStore.open(path)
        main, drafts = expected_tensors(config), Shapes()
        expected = as_stored(main, config.int4, store)
        ignored = [name for name in store.names if name.endswith("rotary_emb.inv_freq")]
        if config.tie_word_embeddings and _HEAD in store:
            ignored.append(_HEAD)
        unused = {name: shape for name, shape in _unused_tensors(config).items() if name in store}
        ignored += unused
        scales = fp8_scales(config, store)
        extras = set(store.names) - set(expected) - set(ignored) - set(scales)
        groups: dict[int, set[str]] = {}
        for name in extras:
            match = _LAYER.match(name)
            index = int(match[1]) - config.num_hidden_layers if match else -1
            groups.setdefault(index if 0 <= index < max(config.num_mtp_layers, 1) else -1, set()).add(name)
        unknown, mtp = groups.pop(-1, set()), Shapes()
        missing = (expected | scales).keys() - set(store.names)
        for index, present in groups.items():
            draft = expected_mtp_tensors(config, index)
            wanted = as_stored(draft, config.int4, store)
            prefix = f"model.layers.{config.num_hidden_layers + index}."
            unknown |= present - wanted.keys()
            if not present & wanted.keys():
                continue
            drafts |= draft
            missing |= wanted.keys() - present - {prefix + name for name in _MTP_COPIES}
            mtp |= {name: shape for name, shape in wanted.items() if name in present}
        _check_dtypes(store, ignored, scales, int4_dtypes(expected | mtp, config.int4))
        if missing:
            todo = "重新下载检查点，或确认 config.json 与权重是同一个模型"
            raise DsxError("DSX-E111", f"{path} 缺少 {len(missing)} 个张量：{_listed(missing)}", todo)
        if unknown:
            todo = "dsx 不知道怎么用它们，所以不敢丢弃；确认 config.json 与权重是同一个模型"
            raise DsxError("DSX-E112", f"{path} 多出 {len(unknown)} 个张量：{_listed(unknown)}", todo)
        _check_shapes(store, expected | mtp | scales | unused)
        check_declared(path, main, drafts, config.int4, store)
        _check_zero(store, [name for name in unused if name.endswith(_ROUTER_BIAS)])
        if _HEAD in ignored:
            _check_tied(store)
        return cls(path, config, store, tuple(sorted(mtp)), tuple(sorted(ignored)))


def dtype_conflict(checkpoint: Checkpoint) -> str | None:
    """矩阵大多数（按字节）是什么 dtype，与 ``config.json`` 写的不同就说一句；FP8、4 位的另有声明，不比。

    不拒绝：transformers 也以文件头为准，转过 dtype 的检查点常常没有改 ``config.json``。可如果是文件头标错了，数值就全错了。
    """
    sizes: Counter[str] = Counter()
    for name in checkpoint.store:
        spec = checkpoint.store[name]
        if len(spec.shape) == 2:
            sizes[spec.dtype] += spec.nbytes
    if checkpoint.config.int4 is not None:
        return None
    ((most, _),) = sizes.most_common(1)
    declared = checkpoint.config.dtype
    if most == FP8_DTYPE or BY_SAFETENSORS[most].name == declared:
        return None
    return f"检查点的矩阵多是 {most}，config.json 的 dtype 却是 {declared}：按 {most} 读；如果是文件头标错了，数值全是错的"


def require_mtp(checkpoint: Checkpoint, modules: int = 1) -> int:
    """检查点带几个 MTP 模块；少于 ``modules`` 就拒绝。

    transformers 保存时会丢掉 MTP 权重而在 config 里留着 ``num_nextn_predict_layers``，所以看张量，不看 config。

    Raises:
        DsxError: ``DSX-E119``。
    """
    first = checkpoint.config.num_hidden_layers
    layers = {int(match[1]) - first for name in checkpoint.mtp_tensors if (match := _LAYER.match(name))}
    if len(layers) < modules or layers != set(range(len(layers))):
        config = checkpoint.config.num_mtp_layers
        raise DsxError(
            "DSX-E119",
            f"{checkpoint.path} 里有 {len(layers)} 个 MTP 模块（model.layers.{first}.* 起），"
            f"config.json 写的是 {config}，需要 {modules}",
            "改用不含 MTP 的方案（-p mla+moe），或换带 MTP 权重的原始检查点（transformers 另存时会丢掉它们）",
        )
    return len(layers)


def _listed(names: Iterable[str]) -> str:
    """最多列五个名字。"""
    ordered = sorted(names)
    return "、".join(ordered[:5]) + (" 等" if len(ordered) > 5 else "")


def fp8_scales(config: ModelConfig, store: TensorStore) -> Shapes:
    """FP8 检查点应有的全部 scale：名字到形状；不是 FP8 检查点则为空。

    Raises:
        DsxError: ``DSX-E120``，config.json 声明了 FP8，文件里却一个 FP8 张量也没有。
    """
    if config.weight_block_size is None:
        return {}
    rows, columns = config.weight_block_size
    scales: Shapes = {
        name + SCALE_SUFFIX: (-(-spec.shape[0] // rows), -(-spec.shape[1] // columns))
        for name in store.names
        if (spec := store[name]).dtype == FP8_DTYPE and len(spec.shape) == 2
    }
    if not scales:
        raise DsxError(
            "DSX-E120",
            f"{store.directory} 的 config.json 声明 quant_method: fp8，文件里却没有 {FP8_DTYPE} 张量",
            "若权重已经反量化过，从 config.json 里删掉 quantization_config；否则重新下载",
        )
    return scales


def _check_dtypes(
    store: TensorStore, ignored: Iterable[str], scales: Shapes, int4: Mapping[str, tuple[str, ...]]
) -> None:
    """权重是浮点；FP8 只能是带 scale 的矩阵，scale 只能是 float32；4 位权重的各个张量见 ``int4``。"""
    for name in sorted(set(store.names) - set(ignored)):
        allowed: tuple[str, ...] = ("F32",) if name in scales else int4.get(name, _FLOATS)
        if name + SCALE_SUFFIX in scales:
            allowed = (*_FLOATS, FP8_DTYPE)
        if store[name].dtype not in allowed:
            todo = f"这里支持的 dtype：{'、'.join(allowed)}；FP8 只认 config.json 里声明过、带 {SCALE_SUFFIX} 的矩阵"
            raise DsxError("DSX-E114", f"张量 {name} 的 dtype 是 {store[name].dtype}", todo)


def _check_shapes(store: TensorStore, expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if store[name].shape != shape:
            what = f"张量 {name} 的形状是 {list(store[name].shape)}，按 config.json 应为 {list(shape)}"
            raise DsxError("DSX-E113", what, "确认 config.json 与权重是同一个模型")


def _check_zero(store: TensorStore, names: Iterable[str]) -> None:
    """路由没有偏置的家族，检查点里多带的偏置必须全是零：不是零就改变选中的专家。"""
    for name in names:
        if store.read(name).any():
            what = f"张量 {name} 不是零，而这个家族的路由没有偏置"
            raise DsxError("DSX-E112", what, "确认检查点是原版；dsx 不知道怎么用它，所以不敢丢弃")


def _check_tied(store: TensorStore) -> None:
    """共享词嵌入时，多带的 ``lm_head.weight`` 必须与词嵌入逐字节相同；分块比较，不占整块内存。"""
    head, embed = store[_HEAD], store[_EMBED]
    same = (head.dtype, head.shape) == (embed.dtype, embed.shape)
    if same:
        left, right = (store.read(name).reshape(-1).view(np.uint8) for name in (_HEAD, _EMBED))
        same = all(
            np.array_equal(left[start : start + _CHUNK], right[start : start + _CHUNK])
            for start in range(0, left.size, _CHUNK)
        )
    if not same:
        raise DsxError(
            "DSX-E117",
            f"config.json 说 tie_word_embeddings=true，但 {_HEAD} 与 {_EMBED} 不同",
            "若输出层确实独立，把 tie_word_embeddings 改成 false；否则删掉多余的 lm_head.weight",
        )
