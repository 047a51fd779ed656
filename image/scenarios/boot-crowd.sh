# The tests' machine for LONG=1: as many guests and disks as fit, against a backend in dom0.
. /scenario/config
DOMAIN=dom0
. /scenario/harness.sh
. /scenario/tests.sh
. /scenario/crowd.sh
CROWD_MEMORY=96

storage_up dom0 && backend_up "$FLAVOUR" dom0 || { echo "@fail crowd: the backend did not start"; exit 1; }
scenario "${CROWD%x*} guests with ${CROWD#*x} disks each" test_crowd "${CROWD%x*}" "${CROWD#*x}"
echo "@tally $PASSED $FAILED"
[ $FAILED = 0 ]
