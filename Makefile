.PHONY: demo up test fmt

demo: ; @scripts/demo.sh
up: ; @scripts/up.sh
test: ; @scripts/test.sh
fmt: ; @cargo fmt
