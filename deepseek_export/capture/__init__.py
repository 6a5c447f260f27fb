"""PyTorch 参考模块 → ONNX 图：每种块追踪一次，按层拼接。"""

from deepseek_export.capture.stitch import CapturedModel, capture_draft, capture_model

__all__ = ["CapturedModel", "capture_draft", "capture_model"]
