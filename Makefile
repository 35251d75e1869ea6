.PHONY: demo up test bench chaos fmt

demo: ; @scripts/demo.sh
up: ; @scripts/up.sh
test: ; @scripts/test.sh
bench: ; @scripts/bench.sh
chaos: ; @scripts/chaos.sh
fmt: ; @cargo fmt
