"""给随机权重的检查点一个人造的词表：每个 token 一个各不相同的 ASCII 词，哪个服务解码都不出半个字符。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def word(token: int) -> str:
    """第 ``token`` 个词。"""
    return f"<{token}>"


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """写 ``tokenizer.json`` 与 ``tokenizer_config.json``；测量只喂 token id，分词的规则用不到。"""
    vocab = {word(token): token for token in range(vocab_size)}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    whole: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
