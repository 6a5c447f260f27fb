"""bundle 放进 transformers 的 ``pipeline``：``generate`` 是 transformers 自己的，前向在 ONNX Runtime 上。

    python examples/transformers_pipeline.py OUT "And God said" --tokens 24

要 ``pip install 'deepseek-export[hf]'``。
"""

from __future__ import annotations

import argparse

from transformers import AutoTokenizer, pipeline

from deepseek_export import DsxForCausalLM


def main() -> None:
    """命令行。"""
    parser = argparse.ArgumentParser(description="用 transformers 的 pipeline 跑一个 bundle。")
    parser.add_argument("bundle")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--beams", type=int, default=1, help="大于 1 是 beam search，缓存按行重排")
    arguments = parser.parse_args()
    model = DsxForCausalLM.from_pretrained(arguments.bundle)
    writer = pipeline(
        "text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(arguments.bundle)
    )
    options = {"max_new_tokens": arguments.tokens, "num_beams": arguments.beams, "do_sample": False}
    print(writer(arguments.prompt, return_full_text=False, **options)[0]["generated_text"])


if __name__ == "__main__":
    main()
