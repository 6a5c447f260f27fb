"""ONNX Runtime CPU。"""

from deepseek_export.backend.ort.backend import OrtBackend

BACKEND = OrtBackend()
