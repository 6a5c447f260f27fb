"""PyTorch 参考模块 → ONNX 图：每种块追踪一次，按层拼接。"""

from deepseek_export.capture.stitch import CapturedModel, ModelDtype, OpSite, capture_draft, capture_model

__all__ = ["CapturedModel", "ModelDtype", "OpSite", "capture_draft", "capture_model"]
