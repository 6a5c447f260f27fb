"""EXPORT-26、RUNTIME-10：用户给的文件怎么坏都只有带码的错误，不等到永远，不吃光内存。

平常每种试几十个；``nox -s fuzz`` 试得多（``DSX_FUZZ_EXAMPLES`` 个）。找到过的坏法留在 ``seeds/``：每种一个文件，一行一个，
是内容按 latin-1 写成的 JSON 字符串；新找到的照样添一行。
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from deepseek_export.bundle import Bundle
from deepseek_export.checkpoint import Checkpoint, TensorStore, stop_token_ids
from deepseek_export.checkpoint.store import INDEX_NAME, SINGLE_NAME
from deepseek_export.checkpoint.synthetic import CHAT_TEMPLATE, write_checkpoint
from deepseek_export.errors import DsxError
from deepseek_export.runtime import BundleTokenizer
from tests.fuzz.mutate import JSON_PIECES, TEMPLATE_PIECES, mutants
from tests.odd_files import hurried_templates
from tests.unit.test_fp8 import FP8
from tests.unit.test_runtime_tokenizer import BOS, EOS, byte_tokenizer

pytestmark = pytest.mark.unit

SEEDS = Path(__file__).parent / "seeds"
EXAMPLES = int(os.environ.get("DSX_FUZZ_EXAMPLES", "0"))
#: 一个例子多用这么多内存就算失控。
_MEMORY = 2 << 30
#: 一个例子这么久还没有完就是停不下来了，连同调用栈一起报。
_HANG_S = 300

fuzz = settings(
    max_examples=EXAMPLES or 25,
    derandomize=not EXAMPLES,  # 平常总是同样的几十个；fuzz 由 --hypothesis-seed 定
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """只许 :class:`DsxError`；多占内存、停不下来都是失败。"""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MEMORY, hard))
    faulthandler.dump_traceback_later(_HANG_S, exit=True)
    try:
        with contextlib.suppress(DsxError):
            yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@dataclass(frozen=True)
class Target:
    """一种文件。

    Attributes:
        base: 合法的内容，从它变。
        use: 把内容写到该在的地方，再照 dsx 的用法读它。
        pieces: 插进去的片段。
    """

    base: bytes
    use: Callable[[bytes], None]
    pieces: tuple[bytes, ...] = JSON_PIECES


NAMES = (
    *("config", "header", "index", "generation_config"),
    *("manifest", "tokenizer", "tokenizer_config", "chat_template"),
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory, v3_bundle: Bundle) -> Iterator[dict[str, Target]]:
    """各种文件，各有一个合法的目录陪着。"""
    folder = tmp_path_factory.mktemp("fuzz")
    checkpoint = write_checkpoint(folder / "checkpoint", FP8, mtp=True, shards=2)
    single = write_checkpoint(folder / "single", FP8)
    bundle = shutil.copytree(v3_bundle.path, folder / "bundle")
    words = folder / "words"
    words.mkdir()
    byte_tokenizer().save(str(words / "tokenizer.json"))
    words_config = json.dumps(
        {
            "bos_token": BOS,
            "eos_token": {"content": EOS},
            "add_bos_token": True,
            "chat_template": CHAT_TEMPLATE,
        }
    ).encode()
    (words / "tokenizer_config.json").write_bytes(words_config)

    def target(path: Path, read: Callable[[], object]) -> Target:
        good = path.read_bytes()

        def use(content: bytes) -> None:
            path.write_bytes(content)
            try:
                with bounded():
                    read()
            finally:
                path.write_bytes(good)

        return Target(good, use)

    def open_checkpoint() -> None:
        opened = Checkpoint.open(checkpoint)
        stop_token_ids(checkpoint, opened.config)

    def speak() -> None:
        loaded = BundleTokenizer.load(words)
        assert loaded is not None
        ids = loaded.encode("床前明月光 abc")
        loaded.decode(ids)
        loaded.encode(loaded.apply_chat_template([{"role": "user", "content": "好"}]))

    raw = (single / SINGLE_NAME).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]

    def use_header(content: bytes) -> None:
        (single / SINGLE_NAME).write_bytes(struct.pack("<Q", len(content)) + content + raw[8 + length :])
        with bounded():
            store = TensorStore.open(single)
            with safe_open(single / SINGLE_NAME, "np") as file:  # dsx 收下的，safetensors 也收
                assert sorted(file.keys()) == list(store.names)

    def use_template(content: bytes) -> None:
        text = content.decode("utf-8", "replace")
        (words / "chat_template.jinja").write_text(text, encoding="utf-8")
        try:
            with bounded():
                speak()
        finally:
            (words / "chat_template.jinja").unlink()

    with pytest.MonkeyPatch.context() as patch:
        hurried_templates(patch)
        yield {
            "config": target(checkpoint / "config.json", open_checkpoint),
            "header": Target(raw[8 : 8 + length], use_header),
            "index": target(checkpoint / INDEX_NAME, lambda: TensorStore.open(checkpoint)),
            "generation_config": target(checkpoint / "generation_config.json", open_checkpoint),
            "manifest": target(bundle / "manifest.json", lambda: Bundle.open(bundle)),
            "tokenizer": target(words / "tokenizer.json", speak),
            "tokenizer_config": target(words / "tokenizer_config.json", speak),
            "chat_template": Target(CHAT_TEMPLATE.encode(), use_template, TEMPLATE_PIECES),
        }


@pytest.mark.parametrize("name", NAMES)
def test_kept_seeds(targets: dict[str, Target], name: str) -> None:
    """找到过的坏法。"""
    targets[name].use(targets[name].base)
    seeds = (SEEDS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert seeds
    for line in seeds:
        targets[name].use(json.loads(line).encode("latin-1"))


@pytest.mark.parametrize("name", NAMES)
@fuzz
@given(data=st.data())
def test_any_damage(targets: dict[str, Target], name: str, data: st.DataObject) -> None:
    """从合法的内容变出来的任何坏法。"""
    target = targets[name]
    target.use(data.draw(mutants(target.base, target.pieces)))
