# Every target sets up what it needs. On a fresh Debian 12: `make run` shows the broker, `make test` checks it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard cext/*.pyx cext/*.pxd cext/*.h)

.PHONY: run test lint bench bench-gate build cover docs clean test-faults test-kill test-applications test-till test-groups test-power test-root-loss test-tables test-attack test-fuzz test-watchdog chaos soak packages wheels freeze freeze-nuitka deb image test-appliance

run: build
	$(BIN)/edgebroker demo

test: build
	$(BIN)/python -m pytest

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Broker and client where the kernel puts them, then on a core each.
bench: build freeze
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks publish publish-1k one-by-one drain push connections --pinned

# In a few minutes: has any row that matters lost a quarter since it was last accepted (benchmarks/accepted.json)?
bench-gate: build
	$(BIN)/python -m benchmarks.gate

build: $(VENV)/built

$(VENV)/built: $(VENV)/ready $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# The mypyc wheels of tomli cannot be frozen; the pure Python form is small and fast enough.
$(VENV)/ready: pyproject.toml
	$(MAKE) packages
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "setuptools>=77" "Cython>=3.1,<4" "flit_core>=3.2,<4"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-binary tomli --no-build-isolation --editable ".[dev]"
	touch $@

# Installs the Debian packages when allowed to, else says what to run.
packages:
	@./packaging/packages.sh

# Five-second delays on every kind of disk access in turn.
test-faults: build
	EB_DELAY_MS=5000 EB_FAULTS_FULL=1 $(BIN)/python -m pytest tests/faults -k "delay or fault"

test-kill: build
	EB_KILL_CYCLES=500 $(BIN)/python -m pytest tests/faults/test_kill.py

# kill -9 of an application and its broker: 500 times, while records come, topics are loaded again and views rebuilt.
test-applications: build
	EB_APP_KILL_CYCLES=500 EB_APP_POINT_TIMES=4 $(BIN)/python -m pytest tests/faults/test_app_kill.py tests/faults/test_app_points.py -s

# A million keys are replaced while Java, the SQL shell and REST read them, and the application is killed twice.
test-till: export EB_READER_KEYS ?= 1000000
test-till: export EB_JDBC := build/jdbc
test-till: build
	mvn -q dependency:copy -Dartifact=org.xerial:sqlite-jdbc:3.46.1.3 -DoutputDirectory=$(EB_JDBC)
	mvn -q dependency:copy -Dartifact=org.slf4j:slf4j-api:1.7.36 -DoutputDirectory=$(EB_JDBC)
	$(BIN)/python -m pytest tests/faults/test_app_readers.py -s

# Consumer groups under every fault at random, and refreshes interrupted by every process at every step.
test-groups: build
	EB_GROUP_CYCLES=400 EB_FAULTS_FULL=1 $(BIN)/python -m pytest tests/faults/test_groups_real.py tests/faults/test_refresh.py -s

# Power cuts on an ext4 image (root, loop mounts); then the same without syncs, which must lose records.
test-power: build
	EB_POWER_CYCLES=300 $(BIN)/python -m pytest tests/faults/test_power.py -s

# A table under everything that takes bytes away, 10,000 schedules (twenty minutes).
test-tables: build
	EB_TABLE_SCHEDULES=10000 $(BIN)/python -m pytest tests/unit/broker/test_table_schedules.py

# ROOT lost for good under traffic, in a tree of twelve processes, from a seed each time (25 seconds a run).
test-root-loss: export EB_ROOT_LOSS_RUNS ?= 200
test-root-loss: build
	$(BIN)/python -m pytest tests/faults/test_root_loss.py -s

# A tree of six nodes in network namespaces (root) under everything at once, from a seed; then the same gently, for hours.
chaos: export EB_CHAOS_SECONDS ?= 120
chaos: build
	$(BIN)/python -m pytest tests/faults/test_chaos.py -s

soak: export EB_SOAK_HOURS ?= 1
soak: build
	$(BIN)/python -m pytest tests/faults/test_soak.py -s

# The program as one file (dist/edgebroker) and as a folder (dist/folder), which end by checking themselves.
freeze:
	@./packaging/packages.sh freeze
	./packaging/freeze.sh

# The same by Nuitka (dist/nuitka/edgebroker), in five minutes.
freeze-nuitka:
	./packaging/freeze_nuitka.sh

# The Debian package (dist/*.deb) and the container image, both of the folder form.
deb: freeze
	./packaging/deb.sh

image:
	./packaging/image.sh

# What a technician does, in a booted systemd, a virtual machine and a container image (root; installs Debian packages).
test-appliance: build freeze
	@./packaging/packages.sh appliance
	EB_APPLIANCE=1 $(BIN)/python -m pytest tests/appliance

# Does a callback take 20 ms of a loop? On a machine with nothing else to do.
test-watchdog: build
	EB_LOOP_MS=20 $(BIN)/python -m pytest tests/integration tests/unit/network

# For pip: the source distribution, and wheels for three Pythons, each tried in clean environments.
wheels:
	packaging/wheels.sh dist/wheels

# Strangers in processes of their own against real nodes, with what honest users feel: on a quiet machine, 6 minutes.
test-attack: build
	$(BIN)/python -m tests.attack

# The C parsers, then a whole node at every door, a minute each.
test-fuzz: build
	tests/fuzz/run.sh 60
	$(BIN)/python -m tests.fuzz.live 60

cover: export EDGEBROKER_TRACE = 1
cover: build
	$(BIN)/pip install --quiet coverage
	$(BIN)/python setup.py --quiet build_ext --inplace --force
	$(BIN)/coverage run -m pytest; $(BIN)/coverage report
	env -u EDGEBROKER_TRACE $(BIN)/python setup.py --quiet build_ext --inplace --force
	rm -f cext/*.c

# Documents that are made from the code.
docs: build
	$(BIN)/python packaging/metrics_page.py > docs/metrics.md
	$(BIN)/python packaging/python_page.py > docs/python.md

clean:
	rm -rf build $(VENV) *.egg-info cext/*.c
	find edgebroker -name '*.so' -delete
