"""各套场景的检查点与 bundle：形状是数据，每次运行现造，用完即弃。"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Literal

from deepseek_export import api
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.records import ModelDtype
from perf.results import ROOT

_COMMON: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": 16384,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
)
_V2: Mapping[str, Any] = MappingProxyType(
    {
        **_COMMON,
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "topk_method": "greedy",
        "scoring_func": "softmax",
    }
)
_V3: Mapping[str, Any] = MappingProxyType(
    {
        **_COMMON,
        "model_type": "deepseek_v3",
        "q_lora_rank": 128,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
    }
)
#: DeepSeek-V3 的注意力：宽度都是真的，别的从简；``_V3_2`` 多一个索引器（也是真的宽度）。
_V3_WIDE: Mapping[str, Any] = MappingProxyType(
    {
        **_V3,
        "hidden_size": 7168,
        "q_lora_rank": 1536,
        "max_position_embeddings": 163840,
    }
)
_V3_2: Mapping[str, Any] = MappingProxyType(
    {
        **_V3_WIDE,
        "model_type": "deepseek_v32",
        "index_topk": 2048,
        "index_n_heads": 64,
        "index_head_dim": 128,
    }
)
#: 缩小的同一对：头与宽度小，名额少，几秒钟跑完。
_SMALL: Mapping[str, Any] = MappingProxyType({"hidden_size": 512, "q_lora_rank": 256})
#: 单步解码受权重带宽限制的 V3：bench-0.9b 的宽度，层数少一些。
_WIDE: Mapping[str, Any] = MappingProxyType(
    {
        **_V3,
        "vocab_size": 8192,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 512,
        "intermediate_size": 2816,
        "moe_intermediate_size": 512,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
    }
)


def _heads(base: Mapping[str, Any], heads: int, layers: int) -> Mapping[str, Any]:
    """全部稠密（与 MLA 无关的都从简），只留头的形状。"""
    return MappingProxyType(
        {
            **base,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "num_hidden_layers": layers,
            "first_k_dense_replace": layers,
        }
    )


def _thin(hidden: int, vocab: int, layers: int) -> Mapping[str, Any]:
    """一步只要几百微秒：除了过边的宽度（``hidden`` 或词表），别的都尽量小。"""
    return MappingProxyType(
        {
            **_heads(_V3, heads=1, layers=layers),
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": 64,
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
        }
    )


def _scaled(layers: int, hidden: int, experts: int, width: int) -> Mapping[str, Any]:
    """导出开销用的 V3：词表是真的，只改宽度、层数与专家。"""
    return MappingProxyType(
        {
            **_WIDE,
            "vocab_size": 129280,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "n_routed_experts": experts,
            "moe_intermediate_size": width,
        }
    )


#: V2-Lite 与 V3 的头（16 与 128 个，128+64/128，潜向量 512）是真的；层数取得使两者展开的缓存一样大。
SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "v2-lite": _heads(_V2, heads=16, layers=16),
        "v3": _heads(_V3, heads=128, layers=2),
        "v2-lite-2": _heads(_V2, heads=16, layers=2),
        "v3-wide-2": _heads(_V3_WIDE, heads=128, layers=2),
        "v3.2-wide-2": _heads(_V3_2, heads=128, layers=2),
        "v3-small-2": _heads({**_V3_WIDE, **_SMALL}, heads=16, layers=2),
        "v3.2-small-2": _heads({**_V3_2, **_SMALL, "index_topk": 512}, heads=16, layers=2),
        # 宽度也是 V2-Lite 的，一层稠密、一层 MoE，专家少一些。
        "v2-lite-wide": MappingProxyType(
            {
                **_heads(_V2, heads=16, layers=2),
                "vocab_size": 1024,
                "hidden_size": 2048,
                "intermediate_size": 10944,
                "moe_intermediate_size": 1408,
                "n_routed_experts": 8,
                "n_shared_experts": 2,
                "num_experts_per_tok": 6,
                "first_k_dense_replace": 1,
            }
        ),
        "wide-4": MappingProxyType({**_WIDE, "num_hidden_layers": 4}),
        # 过一条边的开销：V3 的 hidden，与 V3 的词表。
        "edge": _thin(hidden=7168, vocab=512, layers=4),
        "edge-vocab": _thin(hidden=256, vocab=129280, layers=2),
        "edge-small": _thin(hidden=256, vocab=512, layers=4),
        # V3 真的宽度，四层。全是稠密层：一个稠密层与一个 MoE 层的九个专家（8 + 1）一样大，一个 token 读的一样多，而权重放得下。
        "v3-wide": MappingProxyType(
            {
                **_heads(_V3, heads=128, layers=4),
                "vocab_size": 1024,
                "hidden_size": 7168,
                "intermediate_size": 18432,
                "q_lora_rank": 1536,
            }
        ),
        "wide-8": MappingProxyType({**_WIDE, "num_hidden_layers": 8}),
        # 导出开销：大约 0.1B、0.9B、4B 个参数（以文件头里数出来的为准）。
        "0.1B": MappingProxyType({**_scaled(4, 256, 8, 256), "intermediate_size": 704}),
        "0.9B": _scaled(12, 1024, 32, 512),
        "4B": _scaled(24, 2048, 32, 768),
        # 缩小的同类比较：量化的块要整除各个宽度，填满 8192 个 token 只要几秒。
        "peers-2": MappingProxyType(
            {
                **_WIDE,
                "hidden_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            }
        ),
        # 与 wide-4 总参数相同的稠密模型：四层的宽度之和等于一个稠密层加三个 MoE 层的（2816 + 3 × 33 × 512）。
        "wide-4-dense": MappingProxyType(
            {**_WIDE, "num_hidden_layers": 4, "first_k_dense_replace": 4, "intermediate_size": 13376}
        ),
    }
)


class Workspace:
    """一次运行的临时目录；同样的检查点与 bundle 只造一次。"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = functools.cache(self._checkpoint)
        self.bundle = functools.cache(self._bundle)

    def _checkpoint(
        self, shape: str, *, sparse: bool = False, dtype: Literal["bfloat16", "float32"] = "float32"
    ) -> Path:
        """:data:`SHAPES` 里的形状，随机权重；``sparse`` 则是 bfloat16 的全零、不占磁盘。"""
        dtype = "bfloat16" if sparse else dtype
        path = self.folder / f"{shape}-{dtype}{'-sparse' if sparse else ''}"
        return write_checkpoint(path, SHAPES[shape], dtype=dtype, sparse=sparse)

    def _bundle(
        self,
        checkpoint: Path,
        profile: str,
        dtype: ModelDtype = "float32",
        overrides: tuple[str, ...] = (),
        quantization: Quantization | None = None,
        calibrate: Path | None = None,
    ) -> Path:
        """``ort-cpu`` 的 bundle。"""
        out = self.folder / "bundles" / f"{len(list((self.folder / 'bundles').glob('*')))}"
        api.export(
            checkpoint,
            out,
            profile,
            target="ort-cpu",
            dtype=dtype,
            overrides=overrides,
            quantization=quantization,
            calibrate=calibrate,
        )
        return out


def parameter_count(checkpoint: Path) -> int:
    """检查点里有多少个参数，只读文件头。"""
    store = Checkpoint.open(checkpoint).store
    return sum(math.prod(store[name].shape) for name in store)


@contextmanager
def workspace() -> Iterator[Workspace]:
    """``build/perf`` 下的临时目录，退出时删掉。"""
    parent = ROOT / "build/perf"
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=parent) as folder:
        yield Workspace(Path(folder))
