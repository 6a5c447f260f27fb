"""演示配置，以及把训练好的模型写成 HF 检查点。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deepseek_export.checkpoint.store import SINGLE_NAME
from deepseek_export.checkpoint.synthetic import tokenizer_settings
from tools.demo_training.data import BOS, EOS, Corpus, train_tokenizer
from tools.demo_training.model import DemoModel

_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "vocab_size": 768,
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
    "num_nextn_predict_layers": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "use_cache": True,
}


def demo_config(*, dense: bool = False) -> dict[str, Any]:
    """演示检查点的 ``config.json``。

    ``dense`` 是对照组：全部层（含 MTP）都稠密。``intermediate_size`` 等于 MoE 层每 token 激活的宽度
    （top-2 加共享专家），所以两者的激活参数相同，只差 router 那几千个。
    """
    if not dense:
        return dict(_CONFIG)
    return {**_CONFIG, "first_k_dense_replace": _CONFIG["num_hidden_layers"] + 1}


def load_or_train_tokenizer(path: Path, corpora: dict[str, Corpus], vocab_size: int, reuse: bool) -> Any:
    """续训时用存档旁边的分词器，否则现训一个存下。"""
    from tokenizers import Tokenizer

    if reuse and path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = train_tokenizer(corpora, vocab_size)
    tokenizer.save(str(path))
    return tokenizer


def export_tensors(model: DemoModel) -> dict[str, torch.Tensor]:
    """检查点的张量：权重转 bf16，``e_score_correction_bias`` 保持 float32，与官方检查点相同。

    MTP 层不写词嵌入与输出头的副本：它们与主干共用，dsx 与 transformers 都允许不带。
    """
    kept = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return {
        name: (tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()).contiguous()
        for name, tensor in kept.items()
    }


def write_checkpoint(out: Path, model: DemoModel, tokenizer: Any) -> None:
    """把检查点写进 ``out``，覆盖同名文件。"""
    out.mkdir(parents=True, exist_ok=True)
    save_file(export_tensors(model), out / SINGLE_NAME, metadata={"format": "pt"})
    config = model.config
    _write_json(out / "config.json", config)
    tokens = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    _write_json(out / "generation_config.json", {"_from_model_config": True, **tokens})
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", tokenizer_settings(config["max_position_embeddings"]))


def load_model(path: Path) -> DemoModel:
    """把检查点读回训练模型（float32），评估的就是写出去的权重。"""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return _loaded(config, load_file(path / SINGLE_NAME))


def as_exported(model: DemoModel) -> DemoModel:
    """写出再读回会得到的模型：权重舍入到 bf16。"""
    return _loaded(model.config, export_tensors(model))


def _loaded(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> DemoModel:
    model = DemoModel(config)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def mtp_prefix(config: dict[str, Any]) -> str:
    """MTP 层的张量名的开头。"""
    return f"model.layers.{config['num_hidden_layers']}."


def replace_mtp(path: Path, model: DemoModel) -> None:
    """只改写检查点里 MTP 层的张量。

    Raises:
        ValueError: 模型的主干与检查点的不是逐字节相同，或张量的名字、形状、精度不同。
    """
    old, new = load_file(path / SINGLE_NAME), export_tensors(model)
    prefix = mtp_prefix(model.config)
    if {name: (t.shape, t.dtype) for name, t in old.items()} != {
        name: (t.shape, t.dtype) for name, t in new.items()
    }:
        raise ValueError(f"{path / SINGLE_NAME} 的张量与模型的不同名、不同形状或不同精度")
    if moved := [
        name for name in old if not name.startswith(prefix) and not _same_bytes(old[name], new[name])
    ]:
        raise ValueError(f"主干的权重变了：{'、'.join(moved)}")
    save_file(new, path / SINGLE_NAME, metadata={"format": "pt"})


def _same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """逐字节相同。"""
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
