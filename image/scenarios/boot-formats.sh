# The tests' fifth machine: images with formats, made by other people's tools, behind a guest's file system, in dom0.
. /scenario/config
DOMAIN=dom0
VBDD_OPTIONS="--allow-nbd /run/nbd"
mkdir -p /run/nbd
. /scenario/harness.sh
. /scenario/tests.sh
. /scenario/formats.sh

storage_up dom0 && backend_up "$FLAVOUR" dom0 || { echo "@fail formats: the backend did not start"; exit 1; }
story "formats: the backend is up"
scenario "a file system on a QCOW2 overlay over a compressed template" test_file_system qcow2:$IMAGES/overlay.qcow2
scenario "a file system on a dynamic VHD" test_file_system vhd:$IMAGES/template.vhd
scenario "three take-overs of a QCOW2 under guest I/O" test_take_over stop 3 qcow2:$IMAGES/stop.qcow2
scenario "vbdd killed five times under guest I/O on a QCOW2" test_take_over kill 5 qcow2:$IMAGES/kill.qcow2
scenario "vbdd killed five times under guest I/O on a VHD" test_take_over kill 5 vhd:$IMAGES/kill.vhd
scenario "a chain of VHDs, behind the ring and behind NBD" test_vhd_chain
scenario "two guests over one template, and who may not have it" test_template
echo "@tally $PASSED $FAILED"
umount $IMAGES
[ $FAILED = 0 ]
