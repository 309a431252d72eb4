# Each target sets up what it needs: a fresh machine with Python, pip and gcc can run any of them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo check test soak lint bench bench-bitlinear bench-checkpoint bench-data bench-evaluation bench-finetuning bench-forgetting bench-kan bench-moe bench-quality bench-retention bench-runtime bench-step bench-zero tables wasm clean

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and by its exact version: other packages would pull in another build of it.
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,mpi]'
	touch $@

# Text → shards → two processes train, are stopped, and resume → the model writes.
demo: setup
	rm -rf runs/demo
	$(BIN)/python -m data_prep --source python-stdlib --vocabulary 2048 --out data/python-stdlib --force
	$(BIN)/deepspeed --num_gpus 2 launch/train.py --config configs/tiny.yaml --set run.folder=runs/demo \
		--set parallel.expert_parallel=2 --stop-after 200
	$(BIN)/deepspeed --num_gpus 2 launch/train.py --config configs/tiny.yaml --set run.folder=runs/demo \
		--set parallel.expert_parallel=2 --resume must
	$(BIN)/python launch/generate.py --run runs/demo --prompt "def "

# Before a commit: lint, types, and the tests that are quick and start no processes.
check: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not distributed" $(PYTEST_OPTIONS)

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_OPTIONS)

# Half an hour of random kills, and a run that must come out as if nothing had happened.
soak: setup
	$(BIN)/python -m tests.support.soak --minutes 30 --json runs/soak.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# All benchmarks in their quick form; a rival that is not installed is reported as missing.
bench: setup
	$(BIN)/python -m benchmarks.retention --quick --json runs/bench-retention.json
	$(BIN)/python -m benchmarks.moe --quick --json runs/bench-moe.json
	$(BIN)/python -m benchmarks.kan --quick --json runs/bench-kan.json
	$(BIN)/python -m benchmarks.checkpoint --quick --json runs/bench-checkpoint.json
	$(BIN)/python -m benchmarks.data_prep --quick --json runs/bench-data.json
	$(BIN)/python -m benchmarks.bitlinear --quick --json runs/bench-bitlinear.json
	$(BIN)/python -m benchmarks.zero --quick --json runs/bench-zero.json
	$(BIN)/python -m benchmarks.step --quick --json runs/bench-step.json
	$(BIN)/python -m benchmarks.runtime --quick --json runs/bench-runtime.json
	$(BIN)/python -m benchmarks.evaluation --quick --json runs/bench-evaluation.json
	$(BIN)/python -m benchmarks.finetuning --quick --json runs/bench-finetuning.json
	$(BIN)/python -m benchmarks.forgetting --quick --json runs/bench-forgetting.json
	$(BIN)/python -m benchmarks.quality --quick --text $(QUALITY_TEXT) --json runs/bench-quality.json

# Any UTF-8 text file; the source of Python's library is on every machine.
QUALITY_TEXT ?= stdlib

# About 80 minutes on two cores; runs that are in the log are not run again.
bench-quality: setup
	$(BIN)/python -m benchmarks.quality --text $(QUALITY_TEXT) --log runs/bench-quality.jsonl \
		--json runs/bench-quality.json

bench-checkpoint: setup
	$(BIN)/python -m benchmarks.checkpoint --json runs/bench-checkpoint.json

# The constraints keep what is pinned; the versions of what datatrove adds keep the run repeatable.
bench-data: setup
	$(BIN)/pip install --quiet --constraint constraints.txt datatrove==0.10.1 orjson==3.13.0 dill==0.4.1 \
		humanize==4.17.0 loguru==0.7.3 multiprocess==0.70.19
	$(BIN)/python -m benchmarks.data_prep --json runs/bench-data.json

# torchscale pins an old fairscale, so it comes without what it asks for; the one module used needs only torch.
bench-retention: setup
	$(BIN)/pip install --quiet --no-deps torchscale==0.3.0
	$(BIN)/python -m benchmarks.retention --json runs/bench-retention.json

# pykan names none of what it imports; the versions keep the run repeatable, the constraints keep torch.
bench-kan: setup
	$(BIN)/pip install --quiet --constraint constraints.txt pykan==0.2.8 flashkan==0.2.0 matplotlib pandas==3.1.1 \
		scikit-learn==1.9.1 joblib==1.6.0 threadpoolctl==3.8.0 cloudpickle==3.1.2 narwhals==2.29.0
	$(BIN)/python -m benchmarks.kan --json runs/bench-kan.json

# transformers without what it asks for, which would move versions that are pinned here; its Mixtral needs regex alone.
bench-moe: setup
	$(BIN)/pip install --quiet --no-deps transformers==5.23.0 regex==2026.11.15
	$(BIN)/python -m benchmarks.moe --json runs/bench-moe.json

# Both rivals without what they ask for, which would move versions that are pinned here.
bench-bitlinear: setup
	$(BIN)/pip install --quiet --no-deps transformers==5.23.0 regex==2026.11.15 torchao==0.18.0
	$(BIN)/python -m benchmarks.bitlinear --json runs/bench-bitlinear.json

# ziglang and node are for WebAssembly, and are reported as missing without.
bench-runtime: setup
	$(BIN)/pip install --quiet ziglang==0.17.1
	$(BIN)/pip install --quiet --constraint constraints.txt onnx==1.23.2 onnxruntime==1.32.0
	$(BIN)/python -m benchmarks.runtime --json runs/bench-runtime.json

bench-evaluation: setup
	$(BIN)/python -m benchmarks.evaluation --json runs/bench-evaluation.json

# FINETUNE_DATA="--data DIR" adds real text; benchmarks/finetune_domains.py says which.
bench-finetuning: setup
	$(BIN)/python -m benchmarks.finetuning $(FINETUNE_DATA) --json runs/bench-finetuning.json

# About an hour on two cores. What was run before is in the log, and is not run again.
bench-forgetting: setup
	$(BIN)/python -m benchmarks.forgetting $(FINETUNE_DATA) --log runs/bench-forgetting.jsonl \
		--json runs/bench-forgetting.json

# The chat page that needs no server, in page/.
wasm: setup
	$(BIN)/pip install --quiet ziglang==0.17.1
	$(BIN)/mixkabrn page --out page

# About two hours on two cores. transformers as for bench-moe.
bench-step: setup
	$(BIN)/pip install --quiet --no-deps transformers==5.23.0 regex==2026.11.15
	$(BIN)/python -m benchmarks.step --json runs/bench-step.json

# The tables and figures of README.md and docs/ from benchmarks/results/.
tables: setup
	$(BIN)/python -m benchmarks.tables

bench-zero: setup
	$(BIN)/python -m benchmarks.zero --json runs/bench-zero.json

clean:
	rm -rf $(VENV) data runs
