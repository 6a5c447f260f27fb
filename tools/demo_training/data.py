"""训练文本：只用 Debian 软件包里的公有领域文本，按诗、按经文块划出留出集，再编码成 token 流。"""

from __future__ import annotations

import random
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_export.checkpoint.synthetic import SPECIAL_TOKENS

BOS, EOS, USER, ASSISTANT = range(4)
_POEMS = ("tang300", "song100")
# fortunes-zh 的 chinese 文件什么都有，只取署名是这些古籍的条目。
_CLASSICS = ("论语", "道德经", "增广贤文", "菜根谭")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_VERSE = re.compile(r"([1-3]?[A-Za-z]+)(\d+):(\d+) (.*)")
_BLOCK = 12

#: 语料里的一篇：``(开头, 其余)``；开头在对话样本里是用户的话。
Document = tuple[str, str]


@dataclass
class Corpus:
    """一种语言的训练集与留出集。"""

    train: list[Document] = field(default_factory=list)
    held: list[Document] = field(default_factory=list)

    @classmethod
    def split(cls, documents: list[Document], seed: int, share: float) -> Corpus:
        """随机留出约 ``share`` 的篇目；重复的篇目只留一份。"""
        unique = list(dict.fromkeys(documents))
        held = set(random.Random(seed).sample(range(len(unique)), max(1, round(share * len(unique)))))
        return cls(
            [document for index, document in enumerate(unique) if index not in held],
            [unique[index] for index in sorted(held)],
        )


def _package_files(package: str) -> dict[str, Path]:
    """软件包里的文件，文件名 → 路径。

    Raises:
        FileNotFoundError: 没装这个软件包（或者不是 Debian 系统）。
    """
    try:
        listing = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise FileNotFoundError(
            f"没有软件包 {package}；先运行 apt-get install fortunes-zh bible-kjv"
        ) from error
    return {Path(line).name: Path(line) for line in listing.splitlines() if Path(line).is_file()}


def chinese_documents() -> list[Document]:
    """``fortunes-zh``：唐诗三百首、宋诗，以及论语等四部古籍的条目（正文早已进入公有领域）。"""
    files, documents = _package_files("fortunes-zh"), list[Document]()
    for name in _POEMS:
        for entry in _COLOUR.sub("", files[name].read_text(encoding="utf-8")).split("\n%"):
            lines = [line.strip() for line in entry.splitlines() if line.strip()]
            head = [line for line in lines if line.startswith(("《", "题目", "作者"))]
            body = [line for line in lines if line not in head]
            if len(head) >= 2 and body:
                title = re.sub(r"题目[:：]", "", head[0])
                author = re.sub(r"作者[:：]|（.*?）", "", head[1]).strip()
                documents.append((f"{title}{author}\n", "\n".join(body)))
    for entry in _COLOUR.sub("", files["chinese"].read_text(encoding="utf-8")).split("\n%\n"):
        match = re.search(r"-- ?《?(" + "|".join(_CLASSICS) + r")》?[^\n]*\s*$", entry)
        text = re.sub(r"\s+", "", entry[: match.start()]) if match else ""
        if match and 8 <= len(text) <= 200 and not re.search(r"译|注|[A-Za-z]", text):
            documents.append((f"《{match[1]}》\n", text))
    return documents


def english_documents() -> list[Document]:
    """``bible-kjv``：英王钦定本，每篇是同一章里至多十二节，用包里的 ``bible`` 程序读出。"""
    program = _package_files("bible-kjv")["bible"]
    text = subprocess.run([program, "-f", "Ge1:1-Re22:21"], capture_output=True, text=True, check=True).stdout
    blocks: dict[tuple[str, str, int], list[str]] = {}
    for book, chapter, verse, line in filter(None, (_parse(row) for row in text.splitlines())):
        blocks.setdefault((book, chapter, (int(verse) - 1) // _BLOCK), []).append(line)
    return [(verses[0] + "\n", "\n".join(verses[1:])) for verses in blocks.values() if len(verses) > 1]


def _parse(row: str) -> tuple[str, str, str, str] | None:
    match = _VERSE.match(row)
    return (match[1], match[2], match[3], " ".join(match[4].split())) if match else None


def load_corpora(seed: int) -> dict[str, Corpus]:
    """读两种语言的语料；留出 5%（中文）与 3%（英文）。"""
    return {
        "zh": Corpus.split(chinese_documents(), seed, 0.05),
        "en": Corpus.split(english_documents(), seed, 0.03),
    }


def train_tokenizer(corpora: dict[str, Corpus], vocab_size: int) -> Any:
    """在训练集上训练字节级 BPE；汉字先逐字切开，合并不会跨字。各语言重复到差不多一样长。"""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Han}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = {name: [head + body for head, body in corpus.train] for name, corpus in corpora.items()}
    sizes = {name: sum(len(text.encode()) for text in items) for name, items in texts.items()}
    largest = max(sizes.values())
    balanced = [text for name, items in texts.items() for text in items * max(1, largest // sizes[name] // 2)]
    tokenizer.train_from_iterator(balanced, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL_TOKENS[0]} $A",
        pair=f"{SPECIAL_TOKENS[0]} $A {SPECIAL_TOKENS[0]} $B",
        special_tokens=[(SPECIAL_TOKENS[0], BOS)],
    )
    return tokenizer


class Stream:
    """一种语言的无尽 token 流：每轮重新洗牌，四成篇目写成一问一答；状态只有轮次与偏移，可以续上。

    Args:
        documents: ``(开头, 其余)`` 的 token。
        seed: 种子；同样的种子与状态总给出同样的窗口。
    """

    def __init__(self, documents: list[tuple[list[int], list[int]]], seed: int) -> None:
        self.documents, self.seed = documents, seed
        self.epoch, self.offset = -1, 0
        self.tokens = torch.empty(0, dtype=torch.long)

    def load_state(self, state: tuple[int, int]) -> None:
        """恢复 :attr:`state`。"""
        self._start(state[0])
        self.offset = state[1]

    @property
    def state(self) -> tuple[int, int]:
        """``(轮次, 偏移)``。"""
        return self.epoch, self.offset

    def _start(self, epoch: int) -> None:
        self.epoch, self.offset = epoch, 0
        rng, tokens = random.Random(self.seed * 1_000_003 + epoch), list[int]()
        for index in rng.sample(range(len(self.documents)), len(self.documents)):
            head, body = self.documents[index]
            chat = rng.random() < 0.4
            tokens += [BOS, USER, *head[:-1], ASSISTANT, *body, EOS] if chat else [BOS, *head, *body, EOS]
        self.tokens = torch.tensor(tokens)

    def windows(self, count: int, length: int, overlap: int) -> Tensor:
        """接下来 ``count`` 个窗口 [count, length + overlap]；相邻窗口重叠 ``overlap`` 个 token。"""
        rows = []
        for _ in range(count):
            if self.epoch < 0 or self.offset + length + overlap > len(self.tokens):
                self._start(self.epoch + 1)
            rows.append(self.tokens[self.offset : self.offset + length + overlap])
            self.offset += length
        return torch.stack(rows)
