# One line each. `make run` and `make test` are all that a visitor needs; both install what they lack (apt, as root).
.PHONY: run test check sim fuzz bench bench-xen image clean
run:        ; @image/run
test:       ; @tests/run
check:      ; @tests/check
sim:        ; @VBDD_SEEDS=$${VBDD_SEEDS:-200} cargo test --release --test 'sim_*' --test 'backend_*' --test 'vbd_explore'
fuzz:       ; @fuzz/run
bench:      ; @benches/run
bench-xen:  ; @image/bench-xen
image:      ; @image/appliance
clean:      ; @cargo clean && rm -rf image/cache
