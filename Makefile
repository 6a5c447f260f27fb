# 在全新的机器上只要有 Python 3.11+：make demo 或 make test 会自己建好 .venv。
PY ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# 版本都照锁来；锁由 make lock 写。
INSTALL := $(RUN) -m pip install -c constraints.txt
# 两层：跑（演示的最后要开服务）与导出用得着的，加上开发用得着的（测试、静态检查、网站、打包）。
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
DEMO_DIR ?= build/demo
# 不安静的机器上：make perf-check PERF_FLAGS=--no-time
PERF_FLAGS ?=
SOURCES := deepseek_export tests tools perf plugins examples noxfile.py hatch_build.py

.DEFAULT_GOAL := help
.PHONY: help demo plugins wheel quick test test-all test-newest lock graphs ops-header perf perf-check docs lint format clean

help: ## 显示这份说明
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(STAMP): pyproject.toml constraints.txt deepseek_export/version.py
	test -x $(RUN) || $(PY) -m venv $(VENV)
	$(INSTALL) -e '.[export,serve]'
	touch $@

$(DEV_STAMP): $(STAMP)
	$(INSTALL) -e '.[dev]'
	touch $@

plugins: $(STAMP) ## 构建 C++ 算子库（没有编译器或头文件时说明原因，走函数体）
	$(RUN) plugins/cpu/build.py --fetch

demo: plugins ## 在随包附带的小模型上导出、校验、查看、生成、开服务
	DSX_HOME=$(DEMO_DIR) $(VENV)/bin/dsx demo

wheel: $(DEV_STAMP) ## 发布用的 sdist 与 manylinux wheel（带 C++ 算子库），放进 dist/
	$(RUN) -m tools.make_wheel

quick: lint plugins ## 每次提交之前：静态检查、单元测试与不必导出的契约测试，两核上三分钟以内
	$(RUN) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder -m "(unit or contract) and not heavy and not slow"

# 不重排：慢的契约测试先开始，末尾是几百个很快的单元测试，两个 worker 才会差不多同时结束。
test: lint plugins ## 静态检查与测试（不含 slow），覆盖率至少 90%
	$(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations=15 -m "not slow" --cov --cov-report=term --cov-fail-under=90

test-all: lint plugins ## 同上，加上 slow
	$(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations=15 --cov --cov-report=term --cov-fail-under=90

test-newest: plugins ## 另建一个没有上限的环境，跑契约测试，列出每个更新的包与它弄坏的测试
	$(RUN) -m tools.test_newest

lock: $(DEV_STAMP) ## 按 pyproject.toml 的范围重写锁 constraints.txt
	$(RUN) -m tools.make_lock

graphs: $(DEV_STAMP) ## 重新生成 graphs/ 里的计算图与引擎层清单
	$(RUN) tools/make_graphs.py
	$(RUN) -m tools.make_engine_graphs

ops-header: $(DEV_STAMP) ## 改了 ops/table.py 之后，重新生成 C++ 一侧的契约 plugins/ops.h 与 docs/operators.md
	$(RUN) -m tools.make_ops_header
	$(RUN) -m tools.make_ops_page

perf: $(DEV_STAMP) plugins ## 完整的性能测量（要安静的机器），追加进 perf/history，报告在 build/perf-report
	$(RUN) -m perf run

perf-check: $(DEV_STAMP) plugins ## 缩小的性能测量（五分钟以内），对照 perf/gates.toml；报告在 build/perf-report
	$(RUN) -m perf check $(PERF_FLAGS)

docs: $(DEV_STAMP) ## 网站，建在 build/site；命令行与性能两页先按源码、历史重写
	$(RUN) -m tools.make_cli_page
	$(RUN) -m perf pages
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

lint: $(DEV_STAMP) ## ruff、mypy、import-linter
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

format: $(DEV_STAMP) ## 按 ruff 的格式改写源码
	$(RUN) -m ruff check --fix $(SOURCES)
	$(RUN) -m ruff format $(SOURCES)

clean: ## 删除产物与缓存，保留 .venv
	rm -rf build dist deepseek_export/_native .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.*
	find deepseek_export tests tools perf -name __pycache__ -type d -prune -exec rm -rf {} +
