# The tests' second machine: the backend in dom0 itself.
. /scenario/config
DOMAIN=dom0
. /scenario/harness.sh
. /scenario/tests.sh

storage_up dom0 && backend_up "$FLAVOUR" dom0 || { echo "@fail dom0: the backend did not start"; exit 1; }
story "dom0: the backend is up"
scenario "xenstore client over the socket" test_conformance
scenario "a raw disk, from attaching to unplugging" test_raw
scenario "nodes that exist before the backend starts" test_existing_nodes
scenario "ten take-overs under guest I/O" test_take_over stop 10
scenario "vbdd killed five times under guest I/O" test_take_over kill 5
scenario "connecting again and again leaks nothing" test_leaks
scenario "a PVH guest whose backend starts late" test_pvh_late
scenario "PV-GRUB boots Linux from the disk and hands it over" test_pv_grub
scenario "forced unplug, and a guest destroyed under I/O" test_forced
echo "@tally $PASSED $FAILED"
[ $FAILED = 0 ]
