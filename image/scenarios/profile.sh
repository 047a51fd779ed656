# image/profile-xen: a load for each point, and a word to the host when it runs. Symbols go to the first NVMe disk.
. /scenario/config
. /scenario/bench-common.sh

bench_up
for flavour in $FLAVOURS; do
  for point in $POINTS; do
    on guest "vbdd-guest load /dev/$(disk_of "$flavour") ${point%:*} 32 1000 0" >/dev/null || failed "warming up"
  done
done
story "warm"
LOOK_MS=200
for flavour in $FLAVOURS; do
  for point in $POINTS; do
    # One to two seconds, within which the host opens its window.
    requests=10000
    [ "${point#*:}" = 1 ] || requests=30000
    on guest "(sleep 1; vbdd-guest load /dev/$(disk_of "$flavour") ${point%:*} ${point#*:} $requests 7) >/dev/null 2>&1 &"
    doze 1
    data "window $flavour.${point%:*}.${point#*:}"
    doze 2
  done
done
mkdir /run/sym
cd /run/sym
grep -v ' [rRdDbB] ' /proc/kallsyms >dom0
[ ! -e /run/vbdd.pid ] || grep /usr/sbin/vbdd "/proc/$(cat /run/vbdd.pid)/maps" >vbdd.maps
cat /proc/xen/xensyms >xen
on guest "grep '\[' /proc/kallsyms" | grep -v ' [rRdDbB] ' >guest
wait_for test -b /dev/nvme0n1 || failed "no disk for the symbols"
tar -cf /dev/nvme0n1 . || failed "writing the symbols"
sync
exit 0
