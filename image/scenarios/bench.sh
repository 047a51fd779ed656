# make bench-xen: three backends in one boot, in dom0, each with a raw file on tmpfs, read and written by one guest.
# The machine runs with -icount: its clock counts instructions, 1 ns each.
. /scenario/config
. /scenario/bench-common.sh

bench_up

measure() {
  local flavour=$1 shape=$2 depth=$3 seed=$4 line requests
  case $shape in rand*) requests=$REQUESTS ;; *) requests=$((REQUESTS / 6)) ;; esac
  line=$(on guest "sleep 2; vbdd-guest load /dev/$(disk_of "$flavour") $shape $depth $requests $seed") || failed "$flavour $shape $depth: $line"
  data "point $flavour $shape $depth $line"
}

# One round that does not count: page tables, caches, grants that stay.
for flavour in $FLAVOURS; do for shape in $SHAPES; do measure "$flavour" "$shape" 32 0 >/dev/null; done; done
story "warm"
repeat=0
while [ $repeat -lt "$REPEATS" ]; do
  repeat=$((repeat + 1))
  for shape in $SHAPES; do
    for depth in 1 32; do
      for flavour in $FLAVOURS; do measure "$flavour" "$shape" "$depth" "$repeat"; done
    done
  done
  story "repeat $repeat of $REPEATS"
done

case " $FLAVOURS " in *" vbdd3 "*) ;; *) exit 0 ;; esac
POLL=1
LOOK_MS=500
pid=$(cat /run/vbdd.pid)
for letter in f g h i j k l; do
  truncate -s 8M "/srv/images/idle-$letter.img"
  plug guest "xvd$letter" vbdd3 dom0 w "/srv/images/idle-$letter.img" || failed "attaching"
  connected guest "xvd$letter" || failed "connecting"
done
sleep 3
switches() { awk '/ctxt_switches/ { sum += $2 } END { print sum }' /proc/$pid/status; }
before=$(switches)
sleep 10
data "idle disks=8 seconds=10 context_switches=$(($(switches) - before)) threads=$(ls /proc/$pid/task | wc -l) rss_kib=$(awk '/VmRSS/ { print $2 }' /proc/$pid/status)"
data "memory $(grep -E 'Rss(Anon|File|Shmem)|VmHWM|VmPeak' /proc/$pid/status | tr -s '\t ' ' ' | tr '\n' ' ')"
exit 0
