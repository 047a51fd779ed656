# The tests' first machine: the backend in a storage domain, the images on a disk that dom0's blkback gives it.
. /scenario/config
DOMAIN=storage
. /scenario/harness.sh
. /scenario/tests.sh

storage_up storage && backend_up "$FLAVOUR" storage || { echo "@fail storage: the storage domain did not come up"; exit 1; }
story "storage: the domain is up"
scenario "xenstore client over /dev/xen/xenbus" test_conformance
scenario "a raw disk, from attaching to unplugging" test_raw
scenario "ten take-overs under guest I/O" test_take_over stop 10
scenario "vbdd killed five times under guest I/O" test_take_over kill 5
scenario "a read-only disk refuses writes" test_read_only
scenario "wrong params give texts, other disks go on" test_bad_params
scenario "five disks of two guests at once" test_many
scenario "forced unplug, and a guest destroyed under I/O" test_forced
echo "@tally $PASSED $FAILED"
[ $FAILED = 0 ]
