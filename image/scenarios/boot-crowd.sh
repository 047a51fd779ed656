# The tests' machine for LONG=1: as many guests and disks as fit, against a backend in dom0.
. /scenario/config
DOMAIN=dom0
. /scenario/harness.sh
. /scenario/tests.sh
. /scenario/crowd.sh
CROWD_MEMORY=96

storage_up dom0 && backend_up "$FLAVOUR" dom0 || { echo "@fail crowd: the backend did not start"; exit 1; }
scenario "5 guests with 4 disks each" test_crowd 5 4
scenario "${CROWD:-50} guests with 4 disks each" test_crowd "${CROWD:-50}" 4
echo "@tally $PASSED $FAILED"
[ $FAILED = 0 ]
