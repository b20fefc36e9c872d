# One command for everything. Each target does what is needed first, once: the environment and the engine are rebuilt when their sources
# change. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
# Arguments for the programs behind a target: make boot ARGS="--cpu epyc", make test ARGS="-k cpio".
ARGS ?=
# make differential: comparisons, where the generator starts, and where the counts go.
CASES ?= 5000000
SEED ?= 1
LEDGER ?= $(abspath $(VENV))/differential.tsv
FUZZ ?= 20000
JOBS ?= $(shell nproc 2>/dev/null || echo 1)

ENGINE_SOURCES := $(shell find engine -name target -prune -o -type f \( -name '*.rs' -o -name '*.toml' \) -print 2>/dev/null) Cargo.toml $(wildcard Cargo.lock)
ENVIRONMENT := $(VENV)/.stamp-environment
ENGINE := $(VENV)/.stamp-engine

export KVM_UNIT_TESTS KVM_UNIT_TESTS_I386

# pip and maturin (which calls pip) speak up only when something fails.
export PIP_QUIET := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help boot build test test-fast test-soft test-aarch64 lint format bench performance conformance differential fuzz insn-tables selftest profiling readme-screen clean prerequisites

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

boot: $(ENGINE) ## Boot Debian's cloud kernel to a shell on this terminal (ARGS="--cpu epyc ...")
	@$(BIN)/softkvm run $(ARGS)

build: $(ENGINE) ## Create the environment in .venv and build the engine

test: $(ENGINE) ## Run all tests: the engine's, the package's, and real guests
	cargo test --workspace --exclude softkvm-engine-py --release --quiet
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-fast: $(ENGINE) ## Run the package's tests without those marked slow
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow" $(ARGS)

test-soft: ## Run the engine's tests of instructions with guest floating point in software, as hosts other than x86-64 have it
	cargo test -p softkvm-engine --release --quiet --features soft-float --lib --test insn --test differential

test-aarch64: ## Run the engine's tests for AArch64 hosts, in QEMU's user emulation
	@need() { command -v "$$1" >/dev/null || { echo "make test-aarch64 needs $$1: install it with sudo apt install $$2" >&2; exit 1; }; }; \
	need aarch64-linux-gnu-gcc "gcc-aarch64-linux-gnu libc6-dev-arm64-cross"; \
	need qemu-aarch64-static qemu-user-static; \
	need rustup "rustup, or as https://rustup.rs says"
	rustup --quiet target add aarch64-unknown-linux-gnu
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
	    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -L /usr/aarch64-linux-gnu" \
	    cargo test -p softkvm-engine --release --quiet --target aarch64-unknown-linux-gnu

lint: $(ENGINE) ## Check style, types, floors, and the stub against the engine
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m mypy.stubtest softkvm._engine
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings

format: $(ENVIRONMENT) ## Format Python and Rust sources
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	cargo fmt --all

differential: $(ENGINE) ## Compare 5 million generated instructions with the host's CPU and with Unicorn, and write docs/differential.md
	SOFTKVM_DIFFERENTIAL_CASES=$(CASES) SOFTKVM_DIFFERENTIAL_SEED=$(SEED) SOFTKVM_DIFFERENTIAL_LEDGER=$(LEDGER) \
	    SOFTKVM_DIFFERENTIAL_UNICORN=$$($(BIN)/python docs/differential.py --unicorn) \
	    cargo test -p softkvm-engine --release --quiet --test differential
	$(BIN)/python docs/differential.py $(LEDGER)

fuzz: $(ENGINE) ## Run hostile guests for longer: 20,000 of each kind, as many random blocks, port and MMIO storms on the whole board, a million KVMI messages each way, and new examples of every property (FUZZ=cases)
	SOFTKVM_HOSTILE_CASES=$(FUZZ) cargo test -p softkvm-engine --release --quiet --test hostile
	SOFTKVM_BLOCKS_CASES=$(FUZZ) cargo test -p softkvm-engine --release --quiet --test blocks
	SOFTKVM_STORM_CASES=$$(($(FUZZ) / 100)) $(BIN)/python -m pytest -q tests/vmm/test_storm.py --timeout 3600
	SOFTKVM_KVMI_MESSAGES=$$(($(FUZZ) * 50)) $(BIN)/python -m pytest -q -k million \
	    tests/kvm_guests/introspection/test_hostile.py tests/vmi/test_hostile_server.py
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -q -n $(JOBS) -m "hypothesis and not slow" --timeout 3600

insn-tables: ## Write tests/insn/user*.ins from what the host's CPU does
	SOFTKVM_INSN_WRITE=$(abspath tests/insn) cargo test -p softkvm-engine --release --quiet --test insn instructions_of_a_process

bench: $(ENGINE) ## Compare with QEMU's TCG, measure exits, what a second vCPU brings, and what it costs to be watched
	$(BIN)/python -m benchmarks.guest $(ARGS)
	$(BIN)/python -m benchmarks.exits
	$(BIN)/python -m benchmarks.entry
	$(BIN)/python -m benchmarks.smp
	$(BIN)/python -m benchmarks.watch
	$(BIN)/python -m benchmarks.introspection
	$(BIN)/python -m benchmarks.perf

performance: $(ENGINE) ## Compare with QEMU's TCG and write docs/performance.md, its figure and its samples
	$(BIN)/python -m benchmarks.guest --json docs/performance.json --plot docs/performance.svg --page docs/performance.md $(ARGS)

conformance: $(ENGINE) ## Run kvm-unit-tests from the built checkouts that KVM_UNIT_TESTS and KVM_UNIT_TESTS_I386 name, and write docs/conformance.md
	$(BIN)/python docs/conformance.py $(ARGS)

selftest: $(ENGINE) ## Check the installation with the built-in guest: no network, no apt
	@$(BIN)/softkvm run --selftest

profiling: $(ENGINE) ## Run the commands of docs/perf.md and put what they print there, and the table of edges into README.md
	$(BIN)/python docs/profiling.py

readme-screen: $(ENGINE) ## Boot once and put the screen into README.md
	$(BIN)/python docs/readme_screen.py

clean: ## Remove the environment and everything that was built
	rm -rf $(VENV) target src/softkvm/_engine*.so .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

prerequisites:
	@need() { command -v "$$1" >/dev/null || { echo "softkvm needs $$2: $$3" >&2; exit 1; }; }; \
	need $(PYTHON) "Python 3.11 or later" "install it with sudo apt install python3"; \
	need cc "a C compiler (Rust links with it)" "install one with sudo apt install gcc libc6-dev"; \
	need cargo "a Rust toolchain" "install it as https://rustup.rs says"; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "softkvm needs Python 3.11 or later: choose one with make PYTHON=python3.11" >&2; exit 1; }; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "softkvm needs Python's venv module: install it with sudo apt install python3-venv" >&2; exit 1; }

$(ENVIRONMENT): pyproject.toml | prerequisites
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install 'maturin>=1.9,<2'
	@touch $@

# maturin installs the package in editable mode, with its dependencies, around the engine that it builds.
$(ENGINE): $(ENVIRONMENT) $(ENGINE_SOURCES) | prerequisites
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin develop --release --extras dev --quiet
	@touch $@
