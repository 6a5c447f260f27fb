# CPU 上的服务：docker build -t dsx . && docker run --rm -p 8000:8000 -v "$PWD/OUT:/model:ro" dsx
# 只装运行 bundle 与 HTTP 的依赖，没有 torch；要由检查点开始，build 时加 --build-arg EXTRAS=export,serve。
ARG PYTHON_IMAGE=python:3.12-slim-trixie

FROM ${PYTHON_IMAGE} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends cmake g++ libonnxruntime-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY plugins ./plugins
COPY deepseek_export ./deepseek_export
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE}
ARG EXTRAS=serve
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    pip install --no-cache-dir -c /constraints.txt "$(ls /wheels/*.whl)[${EXTRAS}]" \
    # 算子库没有构建成就停在这里：没有它也跑得了，但是慢。
    && python -c "from deepseek_export.cpu_library import find_library; assert find_library(), 'no CPU library'"
RUN useradd --uid 10001 --create-home dsx && install -d -o dsx /cache
USER 10001
ENV DSX_HOME=/cache PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# dsx serve 收到 SIGTERM 先做完手上的。
STOPSIGNAL SIGTERM
ENTRYPOINT ["dsx"]
CMD ["serve", "/model", "--host", "0.0.0.0"]
