# Everything is re-runnable. `make help` lists the targets.
SHELL := /bin/sh
SAW := .venv/bin/saw
PYTEST := .venv/bin/pytest
VARIANT ?= cpu
SAW_BUILD ?= $(CURDIR)/build
export SAW_CONTEXT ?= $(SAW_BUILD)/lab/context.json
# What the golden image carries of endpoint detection (docs/edr.md): EDR=none|embedded|vendor_package, and files for it.
ifdef EDR
export SAW_IMAGE_EDR := $(EDR)
endif
ifdef EDR_VARIABLES
export SAW_IMAGE_EDR_VARIABLES := $(abspath $(EDR_VARIABLES))
endif
ifdef EDR_SIGNATURES
export SAW_IMAGE_EDR_SIGNATURES := $(abspath $(EDR_SIGNATURES))
endif
# Where the roles of the golden image run (docs/images.md): SOURCE=tree, a light host, or SOURCE=qemu, a virtual machine.
ifdef SOURCE
export SAW_IMAGE_SOURCE := $(SOURCE)
endif
# Its base operating system: BASE_OS=debian-13, the default, or another of packer/pkrvars.
ifdef BASE_OS
export SAW_IMAGE_BASE_OS := $(BASE_OS)
endif
# Whether its root file system is read-only and checked block by block (docs/images.md): ROOT_VERITY=1.
ifdef ROOT_VERITY
export SAW_IMAGE_ROOT_VERITY := $(ROOT_VERITY)
endif
# Where the packages of the golden image come from (docs/images.md): FRESH=1 insists on asking, REUSE=1 does not ask, PACKAGES=FILE
# takes an earlier set; OLDER=1 lets packages be older than before. Other values of these switches are refused.
$(foreach name,FRESH REUSE OLDER ROOT_VERITY,$(if $(filter-out 1,$($(name))),$(error $(name)=$($(name)) means nothing: give $(name)=1, or leave it out)))
ifneq ($(words $(if $(FRESH),1) $(if $(REUSE),1) $(if $(PACKAGES),1)),0)
ifneq ($(words $(if $(FRESH),1) $(if $(REUSE),1) $(if $(PACKAGES),1)),1)
$(error choose one of FRESH=1, REUSE=1, PACKAGES=FILE)
endif
export SAW_IMAGE_PACKAGES := $(if $(FRESH),fresh,$(if $(REUSE),reuse,$(abspath $(PACKAGES))))
endif
ifdef OLDER
export SAW_IMAGE_OLDER := $(OLDER)
endif

# Whether the workspace's data disk is encrypted (docs/data-disk.md): DATA_DISK=encrypted|plain.
ifdef DATA_DISK
export SAW_DATA_DISK := $(DATA_DISK)
endif

# The owner's key that the boot image is signed with, its certificate and the variable store that lets it in (docs/images.md).
ifdef SECURE_BOOT_KEY
export SAW_IMAGE_SECURE_BOOT_KEY := $(abspath $(SECURE_BOOT_KEY))
endif
ifdef SECURE_BOOT_CERTIFICATE
export SAW_IMAGE_SECURE_BOOT_CERTIFICATE := $(abspath $(SECURE_BOOT_CERTIFICATE))
endif
ifdef SECURE_BOOT_VARIABLES
export SAW_IMAGE_SECURE_BOOT_VARIABLES := $(abspath $(SECURE_BOOT_VARIABLES))
endif

.DEFAULT_GOAL := help
.PHONY: help workspace test test-unit test-roles test-e2e test-postgresql test-properties test-thorough lint bench image image-edr-check image-reproducible clean start stop rebuild kill destroy tools tools-python

help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

tools:
	@echo "==> what this machine needs"
	@scripts/bootstrap.sh all

tools-python:
	@scripts/bootstrap.sh python

workspace: ## from an empty machine to a governed workspace; prints the control report (needs root)
	@scripts/workspace.sh

# After the build: DATABASE=FILE [ADVISORIES='OSV …'] [WAIVERS=FILE] searches for known vulnerabilities, SIGN_KEY='A B' [SIGN_PASSPHRASE_FILE=…] signs,
# BASELINE_FLOOR=FILE holds the scanner's report against a floor, MEASURED=FILE takes a hypervisor's reference boot (docs/images.md).
image: tools ## build the golden image with the newest packages, or reuse it, score and boot it and write its record; FRESH=1, SIGN_KEY=…: docs/images.md
	@echo "==> golden image ($(VARIANT)) in $(SAW_BUILD)/images"
	@mkdir -p "$(SAW_BUILD)"
	@set -e; answer=$$(mktemp "$(SAW_BUILD)/.image-XXXXXXXX.json"); \
	trap 'rm -f "$$answer"' EXIT; trap 'exit 130' INT; trap 'exit 143' TERM; \
	.venv/bin/python -m saw.image.build image --build "$(SAW_BUILD)" --variant "$(VARIANT)" --json \
	  $(if $(MODULE_KEY),--module-key "$(MODULE_KEY)") $(if $(MODULE_CERTIFICATE),--module-certificate "$(MODULE_CERTIFICATE)") \
	  >"$$answer"; \
	scripts/image_release.sh "$$answer"

image-edr-check: tools ## attack a workspace on an image with endpoint detection; some 20 minutes, no part of `make test`
	@scripts/image_edr_check.sh

image-reproducible: tools ## build the image twice and compare, boot two machines on it and compare; no part of `make test`
	@scripts/image_reproducible.sh

start stop rebuild kill destroy: tools-python ## (each) do that to the demonstration workspace
	@$(SAW) lab $@

test: tools ## all tests but those run by choice (test-…): lint, unit and integration, roles on booted hosts, end to end
	@scripts/test.sh

test-unit: tools ## unit, property and integration tests
	@scripts/test.sh unit

test-roles: tools ## molecule: every role on booted systemd hosts
	@scripts/test.sh roles

test-e2e: tools ## `make workspace` from a clean clone, then every failure case
	@scripts/test.sh e2e

# What is about files of SQLite is skipped there and says so. TESTS=… names other folders or files.
test-postgresql: TESTS ?= tests/unit/broker tests/integration/broker tests/integration/postgres
test-postgresql: tools ## the tests of the broker on a PostgreSQL that they start themselves, no part of `make test`
	@SAW_TEST_DATABASE=postgresql $(PYTEST) $(TESTS) -q -n 2 --dist loadfile -p no:cacheprovider

test-thorough: tools ## what goes deeper and takes long, and `make workspace` ended at each step; no part of `make test`
	@$(PYTEST) tests/unit tests/integration -q -m thorough -n 2 --dist loadfile -p no:cacheprovider
	@SAW_INTERRUPTIONS=all scripts/test.sh e2e

test-properties: tools-python ## all property tests with all their examples, and a thousand policy bundles; no part of `make test`
	@$(PYTEST) tests/unit tests/integration -q -m hypothesis --hypothesis-profile=thorough -n 2 --dist loadfile -p no:cacheprovider
	@SAW_BUNDLES=1000 $(PYTEST) tests/integration/policyd/test_policyd_thousand.py -q -p no:cacheprovider

lint: tools-python ## ruff, mypy, yamllint, shellcheck, ansible-lint, packer validate, ansible-test sanity
	@scripts/lint.sh

bench: tools ## measure, on the running workspace too; writes build/bench.json (ratios in one run)
	@echo "==> benchmarks; a missed goal is shown and does not fail the run"
	@.venv/bin/python benchmarks/run.py

clean: ## end everything and remove all state: no process, mount, tap, namespace or nft table stays
	@scripts/clean.sh
