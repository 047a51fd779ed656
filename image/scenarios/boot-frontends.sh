# The tests' fourth machine: what Linux' blkfront and GRUB can be, against a backend in dom0.
. /scenario/config
DOMAIN=dom0
. /scenario/harness.sh
. /scenario/tests.sh
. /scenario/frontends.sh

storage_up dom0 && backend_up "$FLAVOUR" dom0 || { echo "@fail frontends: the backend did not start"; exit 1; }
story "frontends: the backend is up"
scenario "xl in dom0 with script=block-vbdd" test_block_vbdd
scenario "PVH GRUB (32-bit) boots a 64-bit Linux and hands over" test_pvh_grub
scenario "the frontend's driver unbound and reloaded under I/O" test_reload 2
scenario "hot plug ${LONG:+a hundred times }under another disk's I/O" test_hot_plug "$([ -n "$LONG" ] && echo 100 || echo 5)"
scenario "discards give the image's space back" test_discard
scenario "an image grown under I/O" test_resize
scenario "2 vCPUs, PV: 2 queues" test_queues q2 pv 2 0 32
destroy q2
scenario "4 vCPUs, PV: 4 queues, rings of 16 pages, 256 segments" test_queues q4 pv 4 4 256
destroy q4
scenario "4 vCPUs, PVH: 4 queues, rings of 4 pages" test_queues h4 pvh 4 2 64
destroy h4
scenario "2 vCPUs, PV, persistent grants" test_persistent p2 pv 2 1 32
destroy p2
if [ -n "$LONG" ]; then
  scenario "kexec in a PVH guest under I/O" test_kexec pvh
  scenario "kexec in a PV guest under I/O" test_kexec pv
fi
echo "@tally $PASSED $FAILED"
[ $FAILED = 0 ]
