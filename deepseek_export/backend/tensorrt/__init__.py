"""``dsx build`` 为当前 GPU 建的 TensorRT 引擎。"""

from deepseek_export.backend.tensorrt.backend import TensorRTBackend

BACKEND = TensorRTBackend()
