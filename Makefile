# The two commands that matter: `make demo` and `make test`. Both install what they need first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Debian packages: what Lockstep runs on, what builds its kernel, and what the tests and benchmarks compare it with.
RUN_PACKAGES := cryptsetup-bin libnbd-bin fuse3 util-linux e2fsprogs kmod
BUILD_PACKAGES := gcc libc6-dev libgcrypt20-dev python3-dev python3-venv
TEST_PACKAGES := python3-libnbd qemu-utils qemu-system-common nbdkit nbdkit-plugin-dev nbd-client fio xfsprogs btrfs-progs strace fdisk util-linux-extra lvm2 postgresql
# A kernel is taken from its package, not installed: `make rescue-test` boots it in QEMU.
RESCUE_PACKAGES := qemu-system-x86 busybox-static cpio kpartx

SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: demo test check recovery bench bench-quick bench-grow bench-users bench-micro fuzz torture restore-kills replace-kills rekey-kills interleavings rescue-test format clean
.DELETE_ON_ERROR:

demo: $(VENV)/run-packages $(VENV)/installed
	$(SUDO) $(BIN)/lockstep demo

# Tests wait a good deal, so one worker more than processors keeps these busy. PYTEST_PARALLEL= runs them in one process.
PYTEST_PARALLEL ?= --numprocesses $(shell expr $$(nproc) + 1) --dist worksteal
test: $(VENV)/run-packages $(VENV)/test-packages $(VENV)/installed check
	$(BIN)/pytest $(PYTEST_PARALLEL) $(PYTEST_ARGS)

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# The long form of the disasters: PostgreSQL works for a minute before it loses its disk.
recovery: $(VENV)/run-packages $(VENV)/test-packages $(VENV)/installed
	PG_RECOVERY_SECONDS=60 $(BIN)/pytest tests/test_recovery_instant.py tests/test_recovery_postgresql.py

# docs/benchmarks.md says what each measures.
bench bench-quick bench-grow bench-users: $(VENV)/run-packages $(VENV)/test-packages $(VENV)/installed
bench:
	$(BIN)/python -m benchmarks $(BENCH_ARGS)
bench-quick:
	$(BIN)/python -m benchmarks --quick $(BENCH_ARGS)
bench-grow:
	$(BIN)/python -m benchmarks --grow $(BENCH_ARGS)
bench-users:
	$(SUDO) $(BIN)/python -m benchmarks --users $(BENCH_ARGS)

bench-micro: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check 'pytest-benchmark>=5.1,<6'
	$(BIN)/pytest benchmarks/micro $(BENCH_ARGS)

# Coverage-guided fuzzing of the protocol, FUZZ_SECONDS each; the suite runs the same bodies briefly.
FUZZ_SECONDS ?= 300
fuzz: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check atheris
	mkdir -p build/fuzz/negotiation build/fuzz/connection
	$(BIN)/python -m fuzz.fuzz_negotiation -max_total_time=$(FUZZ_SECONDS) build/fuzz/negotiation
	$(BIN)/python -m fuzz.fuzz_connection -max_total_time=$(FUZZ_SECONDS) -max_len=4000 -rss_limit_mb=1024 build/fuzz/connection

# Crash tests with new seeds, for TORTURE_SECONDS: power cuts that the disks allow, and kill -9 under load.
TORTURE_SECONDS ?= 3600
torture: $(VENV)/run-packages $(VENV)/test-packages $(VENV)/installed
	$(SUDO) $(BIN)/python -m tests.torture --seconds $(TORTURE_SECONDS) $(TORTURE_ARGS)
# A restore that is killed at random moments and resumed, so often; the suite does it a few times.
RESTORE_KILLS ?= 1000
restore-kills: $(VENV)/run-packages $(VENV)/test-packages $(VENV)/installed
	RESTORE_KILLS=$(RESTORE_KILLS) $(BIN)/pytest --timeout=0 tests/test_restore_resume.py -k random_moments -s
# A new target whose server is killed at random moments while it is filled, or whose disk loses power; the suite does it
# a few times.
REPLACE_KILLS ?= 300
REPLACE_HISTORIES ?= 100
replace-kills: $(VENV)/run-packages $(VENV)/test-packages $(VENV)/installed
	REPLACE_KILLS=$(REPLACE_KILLS) $(BIN)/pytest --timeout=0 tests/test_replace_target.py -k kill_9
	REPLACE_HISTORIES=$(REPLACE_HISTORIES) $(BIN)/pytest --timeout=0 tests/test_crash_replacing.py

# A re-keying that is killed at random moments and gone on with, so often for each kind of mirror; the suite: a few times.
REKEY_KILLS ?= 200
rekey-kills: $(VENV)/run-packages $(VENV)/test-packages $(VENV)/installed
	$(SUDO) env REKEY_KILLS=$(REKEY_KILLS) $(BIN)/pytest --timeout=0 tests/test_rekey.py -k killed -s

# The write path in an order that a seed decides, so many scenes; the suite plays 160. INTERLEAVINGS_SEED is the first.
INTERLEAVINGS ?= 20000
interleavings: $(VENV)/installed
	INTERLEAVINGS=$(INTERLEAVINGS) $(BIN)/pytest --timeout=0 --numprocesses 4 tests/test_volume_interleavings.py

# docs/rescue.md, typed into a virtual machine that runs Debian's kernel and has never heard of Lockstep. No KVM needed.
rescue-test: $(VENV)/run-packages $(VENV)/test-packages $(VENV)/rescue-packages $(VENV)/installed
	$(BIN)/python -m tests.rescue $(RESCUE_ARGS)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f src/lockstep/_*.c src/lockstep/*.so src/lockstep/*/_*.c src/lockstep/*/*.so

# --- what the commands above need ---

$(VENV)/bin/python: | $(VENV)/build-packages
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard src/lockstep/*.pyx src/lockstep/*/*.pyx src/lockstep/*.pxd) | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# Each list of packages is installed only if one of them is missing, so that a second run needs no network.
$(VENV)/build-packages: PACKAGES = $(BUILD_PACKAGES)
$(VENV)/run-packages: PACKAGES = $(RUN_PACKAGES)
$(VENV)/test-packages: PACKAGES = $(TEST_PACKAGES)
$(VENV)/rescue-packages: PACKAGES = $(RESCUE_PACKAGES)
$(addprefix $(VENV)/,build-packages run-packages test-packages rescue-packages): Makefile
	@mkdir -p $(VENV)
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
		echo "Installing Debian packages:" $$missing; \
		$(SUDO) apt-get update -q && $(SUDO) env DEBIAN_FRONTEND=noninteractive \
			apt-get install -q -y --no-install-recommends $$missing; \
	fi
	@touch $@
