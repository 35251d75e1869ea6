.PHONY: demo up test bench fmt

demo: ; @scripts/demo.sh
up: ; @scripts/up.sh
test: ; @scripts/test.sh
bench: ; @scripts/bench.sh
fmt: ; @cargo fmt
