"""ONNX Runtime CPU。"""
