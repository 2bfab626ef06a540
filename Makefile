# The two commands of the README are `make demo` and `make test`. Both install what is missing.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: help install demo test lint stack fleet package soak simulate fuzz bench upgrade

help: ## Show this
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: ## Install what is missing from Debian's packages
	@scripts/install.sh

demo: install ## A whole demae on this machine: deploys under load, counted
	@cargo build --quiet --bin demae --example demo
	@cargo run --quiet --example demo

lint: install ## Format and clippy, warnings denied
	cargo fmt --check
	cargo clippy --quiet --all-targets --all-features -- -D warnings

test: lint ## Everything: format, clippy, unit, property and integration tests; as root
	@scripts/test.sh

stack: install ## The whole stack by docker-compose.yml: deploys under load, dashboards, alerts, etcd away; 10 min
	@scripts/install.sh stack
	@scripts/stack.sh

fleet: install ## Three hosts with engines of their own, and three members of etcd: rollouts while hosts are cut off and killed; 12 min
	@scripts/install.sh fleet
	@scripts/fleet.sh

package: install ## The package, tried on a bare Debian: install, upgrade under load, remove, purge; 5 min
	@scripts/install.sh fleet
	@scripts/package-test.sh

soak: install ## The long forms: a thousand switches, twenty deploys of slow apps, every kill point, many histories
	DEMAE_ETCD_ROUNDS=20 DEMAE_SOCKET_SWITCHES=1000 DEMAE_TABLE_SWITCHES=1000 DEMAE_ADDRESS_ROUNDS=50 DEMAE_PORT_SWITCHES=100 DEMAE_DEFAULT_DEPLOYS=20 DEMAE_ALL_KILL_POINTS=1 DEMAE_PROPERTY_CASES=20000 \
	scripts/test.sh --soak

simulate: install ## A million events in the life of agents, and 100,000 fleets, played; optimised, so built anew: 15 min in all
	@DEMAE_SIMULATED_EVENTS=$${DEMAE_SIMULATED_EVENTS:-1000000} cargo test --quiet --profile bench --all-features --test simulation histories -- --nocapture
	@DEMAE_FLEETS=$${DEMAE_FLEETS:-100000} cargo test --quiet --profile bench --all-features --test simulation fleets_with -- --nocapture

fuzz: install ## libFuzzer on all that reads or writes what others wrote; 10 min for each of five targets
	@scripts/install.sh fuzz
	@scripts/fuzz.sh

bench: install ## A deploy, many at once, and the start of an agent, each beside its bare steps; what a scrape costs
	@cargo bench --quiet --bench deploy
	@cargo bench --quiet --bench many
	@cargo bench --quiet --bench start
	@cargo bench --quiet --bench path
	@cargo bench --quiet --bench scrape
	@cargo bench --quiet --bench fleet

upgrade: install ## From the agent of another commit to this one and back, 20 apps under load: make upgrade FROM=<commit>
	@scripts/upgrade.sh "$(FROM)"
