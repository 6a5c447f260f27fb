"""OpenAI 兼容的 HTTP：服务引擎外面薄薄的一层，只有这里导入 FastAPI。"""
