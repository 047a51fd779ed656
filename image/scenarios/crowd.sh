# Many guests with several disks each, against one vbdd in dom0.

letters() { echo b c d e f g h i j k l m | cut -d' ' -f"1-$1"; }

# uptime_ms: milliseconds since the start.
uptime_ms() { awk '{ printf "%d\n", $1 * 1000 }' /proc/uptime; }
vbdd_kib() { awk -v key="$1:" '$1 == key { print $2 }' "/proc/$(pidof vbdd)/status"; }
threads() { ls "/proc/$(pidof vbdd)/task" | wc -l; }

# All that vbdd serves are connected, as it says itself.
disks_connected() { [ "$(vbdd status | grep -c ' connected')" = "$1" ]; }

# test_crowd GUESTS DISKS: what a disk costs when it is one of many.
test_crowd() {
  local guests=$1 disks=$2 n letter before_rss before_threads start attached total
  total=$((guests * disks)) n=0
  while [ $n -lt "$guests" ]; do
    n=$((n + 1))
    create "c$n" pv /domains/guest.cpio "$CROWD_MEMORY" "extra='console=hvc0 loglevel=1'" && xl unpause "c$n" || fail "guest $n: $(tail -1 "/run/c$n.xl")"
    # Two at a time: more only fight for the one CPU.
    [ $((n % 2)) = 0 ] && { start "c$n" || fail "guest $n did not boot"; }
  done
  start "c$n" || fail "guest $n did not boot"
  tell "$guests guests run"
  before_rss=$(vbdd_kib VmRSS) before_threads=$(threads) n=0 start=$(uptime_ms)
  while [ $n -lt "$guests" ]; do
    n=$((n + 1))
    for letter in $(letters "$disks"); do
      truncate -s 8M "$IMAGES/t-c$n-$letter"
      plug "c$n" "xvd$letter" "$FLAVOUR" dom0 w "$IMAGES/t-c$n-$letter" || fail "attaching"
    done
  done
  TIMEOUT=600 wait_for disks_connected "$total" || fail "only $(vbdd status | grep -c ' connected') of $total disks are connected"
  attached=$(uptime_ms)
  tell "$total disks attached and connected in $((attached - start)) ms: $(((attached - start) / total)) ms a disk, xenstore-write and guests' work with it"
  n=0
  while [ $n -lt "$guests" ]; do
    n=$((n + 1))
    on "c$n" "for d in $(letters "$disks" | tr '\n' ' '); do [ -b /dev/xvd\$d ] && (vbdd-guest hammer /dev/xvd\$d 1 256 /tmp/never 4 \$(printf %d \"'\$d\") >/tmp/h.\$d 2>&1; echo status=\$? >>/tmp/h.\$d) & done" ||
      fail "guest $n lacks a disk"
  done
  n=0
  while [ $n -lt "$guests" ]; do
    n=$((n + 1))
    wait_for on "c$n" "[ \$(cat /tmp/h.* | grep -c '^errors=0') = $disks ] || cat /tmp/h.* | grep -q 'status=[1-9]'" || fail "guest $n hangs"
    on "c$n" "cat /tmp/h.*" | grep -q '^vbdd-guest' && fail "guest $n: $(on "c$n" "grep -h vbdd-guest /tmp/h.*" | head -1)"
  done
  # The buffers of the requests are given back after some seconds of quiet.
  sleep 8
  tell "verified I/O on all of them; vbdd: $before_threads threads before, $(threads) with $total disks; resident $before_rss KiB before, $(vbdd_kib VmRSS) KiB: $(( ($(vbdd_kib VmRSS) - before_rss) / total )) KiB a disk"
  [ "$(threads)" = "$before_threads" ] || fail "$(threads) threads with $total disks, $before_threads without"
  [ $(( ($(vbdd_kib VmRSS) - before_rss) / total )) -le 64 ] || fail "more than 64 KiB of memory a disk"
  n=0
  while [ $n -lt "$guests" ]; do
    n=$((n + 1))
    for letter in $(letters "$disks"); do
      xenstore-rm "$(back vbd dom0 "c$n" "xvd$letter")"
      rm -f "/run/plug.c$n.xvd$letter"
    done
    destroy "c$n"
  done
  wait_for no_zombie || fail "a zombie stays"
  wait_for disks_connected 0 || fail "vbdd serves dead guests"
  sleep 8
  tell "all destroyed: $(vbdd_kib VmRSS) KiB resident, $(ls "/proc/$(pidof vbdd)/fd" | wc -l) files open"
}
