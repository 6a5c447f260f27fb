"""只用 ONNX Runtime 解码：不导入 dsx，照着 ``model.onnx`` 的输入输出约定写的一个循环。

    python examples/onnxruntime_decode.py OUT "床前明月光" --tokens 32

缓存既绑成输入又绑成输出，同一块内存原地更新：不绑的话，ONNX Runtime 每步都要复制整个缓存，并为每层打印一条 TensorScatter 的警告。
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


def bind_caches(session: ort.InferenceSession, io: ort.IOBinding, capacity: int) -> list[ort.OrtValue]:
    """每层的缓存 ``kv_cache.{i} [1, 1, T, 宽]`` 与 ``kv_cache_out.{i}`` 绑到同一块内存；返回的要留着。"""
    values = []
    for port in session.get_inputs():
        if "cache." not in port.name:
            continue
        _, heads, _, width = port.shape
        zeros = np.zeros((1, heads, capacity, width), DTYPES[port.type])
        value = ort.OrtValue.ortvalue_from_numpy(zeros)
        io.bind_ortvalue_input(port.name, value)
        io.bind_ortvalue_output(port.name.replace("cache.", "cache_out."), value)
        values.append(value)
    return values


def greedy(session: ort.InferenceSession, prompt: list[int], tokens: int, stops: set[int]) -> list[int]:
    """先一次送进整个提示词（prefill），再每步一个 token。"""
    io = session.io_binding()
    io.bind_output("logits")  # 第一个绑，下面的 get_outputs()[0] 就是它
    caches = bind_caches(session, io, len(prompt) + tokens)
    past, step, found = 0, list(prompt), list[int]()
    while len(found) < tokens and not stops & set(found):
        io.bind_cpu_input("input_ids", np.array([step], np.int64))
        io.bind_cpu_input("past_lens", np.array([past], np.int64))  # 缓存里已有多少
        # 只要最后一行的 logits：长提示词不必为 S x V 付账
        io.bind_cpu_input("logits_positions", np.array([[len(step) - 1]], np.int64))
        session.run_with_iobinding(io)
        past += len(step)
        step = [int(io.get_outputs()[0].numpy()[0, 0].argmax())]
        found += step
    del caches
    return found


def stop_tokens(bundle: Path) -> set[int]:
    """``generation_config.json`` 的 ``eos_token_id``，没有才看 ``config.json`` 的。"""
    for name in ("generation_config.json", "config.json"):
        if (path := bundle / name).is_file():
            eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            if eos is not None:
                return set(eos if isinstance(eos, list) else [eos])
    return set()


def main() -> None:
    """命令行。"""
    parser = argparse.ArgumentParser(description="只用 ONNX Runtime 解码一个 dsx 的 bundle（不带草稿的）。")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    session = ort.InferenceSession(arguments.bundle / "model.onnx")
    tokenizer = Tokenizer.from_file(str(arguments.bundle / "tokenizer.json"))
    prompt = tokenizer.encode(arguments.prompt).ids
    print(tokenizer.decode(greedy(session, prompt, arguments.tokens, stop_tokens(arguments.bundle))))


if __name__ == "__main__":
    main()
