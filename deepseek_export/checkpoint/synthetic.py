"""造随机权重的 HF 格式检查点：给测试、演示和基准用，不依赖 torch 与 transformers。

同样的参数总写出同样的字节：每个张量的随机数只由种子和它自己的名字决定，与分片数、先后顺序无关。config 里有
``quantization_config`` 时，Linear 权重写成 FP8 分块，与 DeepSeek 发布的一样；或 compressed-tensors 的 4 位，与 Kimi-K2-Thinking 发布的一样。
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from deepseek_export.checkpoint.checkpoint import expected_mtp_tensors, expected_tensors
from deepseek_export.checkpoint.config import ModelConfig, parse_model_config
from deepseek_export.checkpoint.int4_synthetic import is_shape, packed_block, packed_tensors
from deepseek_export.checkpoint.quantization import FP8_DTYPE, SCALE_SUFFIX
from deepseek_export.checkpoint.store import INDEX_NAME, SINGLE_NAME
from deepseek_export.dtypes import BY_SAFETENSORS, DTYPES
from deepseek_export.progress import Progress

DEMO_CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "bos_token_id": 0,
        "eos_token_id": 1,
        "use_cache": True,
    }
)
SPECIAL_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
_CHUNK = 1 << 22
#: DeepSeek 发布的 FP8 检查点里，注意力与（共享、路由）专家的 Linear 是 FP8；MTP 的 eh_proj 与其余张量不是。
_FP8_LINEARS = tuple(
    f".{name}.weight"
    for name in (
        *("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj", "indexer.wq_b", "indexer.wk"),
    )
)
_E4M3_MAX = 448.0

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
# 演示分词器的训练文本：公有领域的唐诗，加《独立宣言》一段。
DEMO_TEXT = (
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "朝辞白帝彩云间，千里江陵一日还。两岸猿声啼不住，轻舟已过万重山。",
    "日照香炉生紫烟，遥看瀑布挂前川。飞流直下三千尺，疑是银河落九天。",
    "故人西辞黄鹤楼，烟花三月下扬州。孤帆远影碧空尽，唯见长江天际流。",
    "国破山河在，城春草木深。感时花溅泪，恨别鸟惊心。烽火连三月，家书抵万金。白头搔更短，浑欲不胜簪。",
    "两个黄鹂鸣翠柳，一行白鹭上青天。窗含西岭千秋雪，门泊东吴万里船。",
    "好雨知时节，当春乃发生。随风潜入夜，润物细无声。野径云俱黑，江船火独明。晓看红湿处，花重锦官城。",
    "空山新雨后，天气晚来秋。明月松间照，清泉石上流。竹喧归浣女，莲动下渔舟。随意春芳歇，王孙自可留。",
    "红豆生南国，春来发几枝。愿君多采撷，此物最相思。",
    "独在异乡为异客，每逢佳节倍思亲。遥知兄弟登高处，遍插茱萸少一人。",
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "We hold these truths to be self-evident, that all men are created equal, that they are endowed by "
    "their Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit of "
    "Happiness. That to secure these rights, Governments are instituted among Men, deriving their just "
    "powers from the consent of the governed.",
)


@dataclass(frozen=True)
class _Contents:
    """检查点里每个张量的 dtype 与形状，以及怎么造内容；``packed`` 是 4 位权重的各个张量属于多大的权重。"""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    block_size: tuple[int, int] | None
    seed: int
    tied: bool
    packed: Mapping[str, tuple[int, ...]]

    def nbytes(self, name: str) -> int:
        tag, shape = self.tensors[name]
        return BY_SAFETENSORS[tag].nbytes(math.prod(shape))

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """按行主序逐块给出内容。"""
        tag, shape = self.tensors[name]
        if name in self.packed:
            yield packed_block(name, tag, shape, self.packed[name], self.seed)
            return
        source = name.removesuffix(SCALE_SUFFIX)
        if self.block_size is None or FP8_DTYPE not in (tag, self.tensors[source][0]):
            for block in _random_blocks(name, shape, self.seed, self.tied):
                yield block.astype(BY_SAFETENSORS[tag].numpy)
        else:
            shape = self.tensors[source][1]
            flat = np.concatenate([*_random_blocks(source, shape, self.seed, self.tied)])
            codes, scales = quantize_fp8(flat.reshape(shape), self.block_size)
            yield codes if tag == FP8_DTYPE else scales


def write_checkpoint(
    out: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16",
    shards: int = 1,
    mtp: bool = False,
    sparse: bool = False,
    progress: Progress | None = None,
) -> Path:
    """写一个随机权重的检查点，逐块落盘，内存占用与模型大小无关。

    Args:
        out: 目标目录，不存在就新建；里面不能已有权重。
        config: HF 风格的 ``config.json`` 内容；``torch_dtype`` 由 ``dtype`` 决定，有 ``quantization_config`` 则写成 FP8 分块或 4 位。
        seed: 随机种子。
        dtype: 权重的 dtype；``e_score_correction_bias`` 总是 float32，与官方检查点相同。
        shards: 分成几个文件，按大小均分；大于 1 时另写索引。
        mtp: 是否写 MTP 层；层数取 ``num_nextn_predict_layers``，至少一层。
        sparse: 只写文件头（与 4 位权重的形状），数据区留成稀疏文件的洞（全零），几乎不占磁盘。
        progress: 进度。

    Returns:
        ``out``。

    Raises:
        DsxError: ``config`` 不受支持，见 ``parse_model_config``。
        FileExistsError: ``out`` 里已有 safetensors 文件。
        ValueError: ``shards`` 小于 1，或多于张量个数；要造的 4 位不是对称的 compressed-tensors。
    """
    values = {key: value for key, value in config.items() if key != "dtype"} | {"torch_dtype": dtype}
    if mtp:
        values["num_nextn_predict_layers"] = max(values.get("num_nextn_predict_layers") or 0, 1)
    parsed = parse_model_config(values, "write_checkpoint 的 config")
    tensors = _tensors(parsed, dtype, mtp)
    if not 1 <= shards <= len(tensors):
        raise ValueError(f"shards 应在 1 到 {len(tensors)} 之间，得到 {shards}")
    out.mkdir(parents=True, exist_ok=True)
    if old := sorted(out.glob("*.safetensors*")):
        raise FileExistsError(f"{out} 里已有 {old[0].name}，请换一个空目录")
    _write_json(out / "config.json", values)
    tokens = {"bos_token_id": parsed.bos_token_id, "eos_token_id": values.get("eos_token_id")}
    _write_json(out / "generation_config.json", {"_from_model_config": True, **tokens})
    contents = _Contents(
        tensors, parsed.weight_block_size, seed, parsed.tie_word_embeddings, _packed(parsed, dtype, mtp)
    )
    weight_map: dict[str, str] = {}
    progress = progress or Progress()
    progress.start("写权重", sum(map(contents.nbytes, tensors)), "bytes")
    for number, names in enumerate(
        _split({name: contents.nbytes(name) for name in tensors}, shards), start=1
    ):
        file = SINGLE_NAME if shards == 1 else f"model-{number:05d}-of-{shards:05d}.safetensors"
        _write_shard(out / file, names, contents, sparse, progress)
        weight_map |= dict.fromkeys(names, file)
    if shards > 1:
        total = sum(map(contents.nbytes, tensors))
        index_data = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(out / INDEX_NAME, index_data)
    return out


def quantize_fp8(weight: np.ndarray, block_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """float32 矩阵 → E4M3 与每块的 scale（``amax / 448``）；边上的块可以不满。

    Returns:
        与 ``weight`` 同形的 float8_e4m3fn，和 ``[ceil(行/块高), ceil(列/块宽)]`` 的 float32。
    """
    height, width = block_size
    codes = np.empty(weight.shape, BY_SAFETENSORS[FP8_DTYPE].numpy)
    scales = np.empty((-(-weight.shape[0] // height), -(-weight.shape[1] // width)), np.float32)
    for i, j in np.ndindex(*scales.shape):
        block = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
        scales[i, j] = max(float(np.abs(weight[block]).max()) / _E4M3_MAX, np.finfo(np.float32).tiny)
        codes[block] = (weight[block] / scales[i, j]).astype(codes.dtype)
    return codes, scales


def write_demo_checkpoint(out: Path, **options: Any) -> Path:
    """写 :data:`DEMO_CONFIG` 的检查点，并现场训练一个字节级 BPE 分词器；任何文本都能无损往返。

    Args:
        out: 目标目录。
        **options: 原样交给 :func:`write_checkpoint`（``seed``、``dtype``、``shards``、``mtp``、``progress``）。

    Returns:
        ``out``，含权重、``tokenizer.json``、``tokenizer_config.json``。
    """
    write_checkpoint(out, DEMO_CONFIG, **options)
    _write_tokenizer(out, int(DEMO_CONFIG["vocab_size"]))
    return out


def tokenizer_settings(length: int) -> dict[str, Any]:
    """``tokenizer_config.json``：带 :data:`CHAT_TEMPLATE`，``length`` 是模型的最大长度。"""
    bos, eos, *extra = SPECIAL_TOKENS
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "additional_special_tokens": extra,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
        "chat_template": CHAT_TEMPLATE,
    }


def _tensors(config: ModelConfig, dtype: str, mtp: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """名字 → (safetensors 的 dtype, 形状)；scale 紧跟在它的权重后面。"""
    shapes = _shapes(config, mtp)
    packed = packed_tensors(shapes, config.int4, dtype)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if name in packed:
            tensors |= packed[name]
        elif config.weight_block_size is not None and name.endswith(_FP8_LINEARS):
            blocks = (-(-dim // size) for dim, size in zip(shape, config.weight_block_size, strict=True))
            tensors |= {name: (FP8_DTYPE, shape), name + SCALE_SUFFIX: ("F32", tuple(blocks))}
        else:
            kept = "float32" if name.endswith("e_score_correction_bias") else dtype
            tensors[name] = (DTYPES[kept].safetensors, shape)
    return tensors


def _shapes(config: ModelConfig, mtp: bool) -> dict[str, tuple[int, ...]]:
    """没有量化时的名字与形状。"""
    shapes = expected_tensors(config)
    for index in range(config.num_mtp_layers if mtp else 0):
        shapes |= expected_mtp_tensors(config, index)
    return shapes


def _packed(config: ModelConfig, dtype: str, mtp: bool) -> dict[str, tuple[int, ...]]:
    """4 位权重的各个张量 → 权重的形状。"""
    shapes = _shapes(config, mtp)
    return {
        part: shapes[name]
        for name, parts in packed_tensors(shapes, config.int4, dtype).items()
        for part in parts
    }


def _split(sizes: Mapping[str, int], parts: int) -> Iterator[list[str]]:
    """按顺序切成 ``parts`` 段，每段至少一个，字节数大致相等。"""
    left, shard, filled = sum(sizes.values()), [], 0
    for index, (name, size) in enumerate(sizes.items(), start=1):
        shard.append(name)
        filled += size
        if parts > 1 and (filled * parts >= left or len(sizes) - index == parts - 1):
            yield shard
            left, shard, filled, parts = left - filled, [], 0, parts - 1
    yield shard


def _write_shard(
    path: Path, names: Sequence[str], contents: _Contents, sparse: bool, progress: Progress
) -> None:
    """写一个 safetensors 文件；4 位权重的形状放在末尾，稀疏文件里也照写。"""
    names = sorted(names, key=is_shape)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tag, shape = contents.tensors[name]
        begin, end = end, end + contents.nbytes(name)
        header[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        if sparse:
            written = [name for name in names if is_shape(name)]
            stream.truncate(stream.tell() + end)
            stream.seek(-sum(map(contents.nbytes, written)), os.SEEK_END)
            progress.advance(end, path.name)
            names = written
        for name in names:
            for block in contents.blocks(name):
                stream.write(block.tobytes())
                progress.advance(0 if sparse else block.nbytes, name)


def _random_blocks(name: str, shape: tuple[int, ...], seed: int, tied: bool) -> Iterator[np.ndarray]:
    """按行主序逐块给出一个张量的 float32 值，拼起来是 ``shape``。"""
    rng = np.random.default_rng([seed, zlib.crc32(_source_of(name).encode())])
    mean, std = _moments(name, shape, tied)
    left = math.prod(shape)
    while left > 0:
        block = rng.standard_normal(min(left, _CHUNK), dtype=np.float32)
        left -= block.size
        yield block * np.float32(std) + np.float32(mean)


def _source_of(name: str) -> str:
    """MTP 层的词嵌入与输出头是主干的副本，随机数也用主干的名字。"""
    if name.endswith(".embed_tokens.weight"):
        return "model.embed_tokens.weight"
    return "lm_head.weight" if name.endswith(".shared_head.head.weight") else name


def _moments(name: str, shape: tuple[int, ...], tied: bool) -> tuple[float, float]:
    """均值与标准差：Linear 保方差，输出头略大以拉开 logits；偏置校正项足以让有偏分数变负。"""
    if name.endswith("e_score_correction_bias"):
        return 0.0, 0.5
    if name.endswith("norm.weight"):  # 各种 layernorm、enorm、hnorm、model.norm
        return 1.0, 0.1
    if name.endswith(".bias"):
        return 0.0, 0.1
    if name.endswith("embed_tokens.weight") and not tied:
        return 0.0, 1.0
    head = name.endswith(("lm_head.weight", "shared_head.head.weight", "embed_tokens.weight"))
    gain = 3.0 if head else 2.0 if name.endswith("mlp.gate.weight") else 1.0
    return 0.0, gain / math.sqrt(shape[-1])


def _write_tokenizer(out: Path, vocab_size: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(DEMO_TEXT, trainer)
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, 0)]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    settings = tokenizer_settings(DEMO_CONFIG["max_position_embeddings"])
    _write_json(out / "tokenizer_config.json", settings)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
