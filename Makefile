.PHONY: help demo up test chaos bench fmt

help: ## This list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 8

demo: ## Run one job with the real Claude CLI and simulated answers; needs no account
	@scripts/demo.sh
up: ## Serve: API and worker, with this machine's Anthropic credential
	@scripts/up.sh
test: ## Check everything: format, lints, build, tests, documentation
	@scripts/test.sh
chaos: ## Run 10,000 jobs while processes are killed and stopped; half an hour
	@scripts/chaos.sh
bench: ## Measure the release build; wants a machine that does nothing else
	@scripts/bench.sh
fmt: ## Format the source
	@cargo fmt
