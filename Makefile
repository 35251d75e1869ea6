.PHONY: demo up test chaos bench fmt

demo: ; @scripts/demo.sh
up: ; @scripts/up.sh
test: ; @scripts/test.sh
chaos: ; @scripts/chaos.sh
bench: ; @scripts/bench.sh
fmt: ; @cargo fmt
