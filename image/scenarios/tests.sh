# The test scenarios. Each is a function that calls fail, or returns.

test_raw() {
  local file before
  have_guest g1
  file=$(image raw 2)
  before=$(ports_to "$(domid "$DOMAIN")" "$(domid g1)")
  disk g1 xvdb w "$file"
  [ "$(on g1 "cat /sys/block/xvdb/size")" = 4096 ] || fail "the disk's size is $(on g1 "cat /sys/block/xvdb/size") sectors, not 4096"
  verified g1 xvdb 1
  on g1 "vbdd-guest pattern 42 2097152 >/dev/xvdb && sync" || fail "writing the whole disk"
  # The backend's domain makes the same bytes for itself.
  on "$DOMAIN" "vbdd-guest pattern 42 2097152 | cmp - $file" || fail "the image holds something else than the guest wrote"
  quiet g1
  gracefully g1 xvdb
  on g1 "test ! -b /dev/xvdb" || fail "the guest still has the disk"
  [ "$(ports_to "$(domid "$DOMAIN")" "$(domid g1)")" = "$before" ] || fail "an event channel was not given back"
}

# test_take_over HOW TIMES [IMAGE]: vbdd ends and starts again under a guest's verified writes. HOW: stop (SIGTERM), kill
# (SIGKILL).
test_take_over() {
  local how=$1 times=$2 n=0 count
  only_vbdd
  have_guest g1
  disk g1 xvdb w "${3:-$(image takeover 16)}"
  verify_start g1 xvdb
  wait_for writes_beyond g1 xvdb 100 || fail "the verifier does not write"
  while [ $n -lt "$times" ]; do
    n=$((n + 1))
    "vbdd_$how" "$DOMAIN" || fail "take-over $n: vbdd did not end as it should"
    state_is "$(be_of g1 xvdb)" 4 || fail "take-over $n: vbdd left the backend in state $(xenstore-read "$(be_of g1 xvdb)/state")"
    count=$(writes g1 xvdb)
    vbdd_start "$DOMAIN" || fail "take-over $n: vbdd did not start again"
    wait_for writes_beyond g1 xvdb $((count + 50)) || fail "take-over $n: the guest's writes do not go on"
    state_is "$(front g1 xvdb)" 4 || fail "take-over $n: the guest noticed"
  done
  verify_stop g1 xvdb
  echo "@say $DOMAIN: $n take-overs ($how) under writes: $(head -1 /run/verify.g1.xvdb)" >/dev/hvc0
  quiet g1
  gracefully g1 xvdb
}

test_many() {
  local pair
  have_guest g1
  have_guest g2
  for pair in "g1 xvdb" "g1 xvdc" "g1 xvdd" "g2 xvdb" "g2 xvdc"; do
    set -- $pair
    disk "$1" "$2" w "$(image "many-$1-$2" 16)"
    verify_start "$1" "$2" 20
  done
  sleep 2
  for pair in "g1 xvdb" "g1 xvdc" "g1 xvdd" "g2 xvdb" "g2 xvdc"; do
    set -- $pair
    verify_stop "$1" "$2"
    quiet "$1"
    gracefully "$1" "$2"
  done
}

test_read_only() {
  local file sum
  have_guest g1
  file=$(image ro 2)
  on "$DOMAIN" "yes vbdd | head -c 2097152 >$file"
  sum=$(on "$DOMAIN" "sha256sum <$file")
  disk g1 xvdb r "$file"
  [ "$(on g1 "cat /sys/block/xvdb/ro")" = 1 ] || fail "the guest does not see that the disk is read-only"
  [ "$(on g1 "sha256sum </dev/xvdb")" = "$sum" ] || fail "the guest reads something else"
  on g1 "dd if=/dev/zero of=/dev/xvdb bs=4096 count=1 conv=fsync" && fail "the guest could write"
  gracefully g1 xvdb
  [ "$(on "$DOMAIN" "sha256sum <$file")" = "$sum" ] || fail "the image changed"
}

# The nodes exist before vbdd starts: two disks of a guest that waits.
test_existing_nodes() {
  only_vbdd
  have_guest g1
  vbdd_stop "$DOMAIN" || fail "vbdd did not end"
  plug g1 xvdb "$FLAVOUR" "$DOMAIN" w "$(image early1 8)" || fail "attaching"
  plug g1 xvdc "$FLAVOUR" "$DOMAIN" w "$(image early2 8)" || fail "attaching"
  sleep 1
  state_is "$(be_of g1 xvdb)" 1 || fail "somebody else serves the disk"
  vbdd_start "$DOMAIN" || fail "vbdd did not start"
  connected g1 xvdb || fail "xvdb did not connect"
  connected g1 xvdc || fail "xvdc did not connect"
  verified g1 xvdb 1
  verified g1 xvdc 1
  quiet g1
  gracefully g1 xvdb
  gracefully g1 xvdc
}

# A PVH guest that boots with a disk nobody serves yet: Linux waits for it before it starts anything.
test_pvh_late() {
  create g3 pvh /domains/guest.cpio 192 "extra='console=hvc0 loglevel=7'" || fail "no PVH guest"
  case $FLAVOUR in vbdd*) vbdd_stop "$DOMAIN" || fail "vbdd did not end" ;; esac
  plug g3 xvdb "$FLAVOUR" "$DOMAIN" w "$(image pvh 16)" || fail "attaching"
  xl unpause g3
  case $FLAVOUR in vbdd*)
    wait_for grep -q "Waiting for devices" "$LOGS/guest-g3.log" || fail "the guest did not miss its disk"
    vbdd_start "$DOMAIN" || fail "vbdd did not start" ;;
  esac
  start g3 || fail "the PVH guest did not boot"
  on g3 "dmesg -n 1"
  connected g3 xvdb || fail "xvdb did not connect"
  wait_for on g3 "test -b /dev/xvdb" || fail "no /dev/xvdb"
  verified g3 xvdb 2
  on g3 "dmesg" | grep -qi "xen pvh" || fail "this was not a PVH guest"
  quiet g3
  gracefully g3 xvdb
}

# PV-GRUB reads the kernel from the disk with a frontend of its own, and Linux's takes over from it.
test_pv_grub() {
  local file=$IMAGES/boot.img
  on "$DOMAIN" "test -e $file" || skip "no boot.img"
  create g4 grub - 192 || fail "no PV-GRUB domain"
  plug g4 xvda "$FLAVOUR" "$DOMAIN" w "$file" || fail "attaching"
  # GRUB looks only once: the backend must wait for it before it runs.
  wait_for state_is "$(be_of g4 xvda)" 2 || fail "the backend did not reach state 2 before the guest ran"
  start g4 || fail "no Linux came out of PV-GRUB: $(tail -c 300 $LOGS/guest-g4.log | tr -cd ' -~')"
  connected g4 xvda || fail "Linux did not connect after GRUB"
  on g4 "grep -q vbdd.from=grub /proc/cmdline" || fail "Linux was not started by GRUB"
  on g4 "mount -t ext4 /dev/xvda /mnt && vbdd-guest pattern 9 1000000 >/mnt/new && umount /mnt && mount -t ext4 /dev/xvda /mnt && vbdd-guest pattern 9 1000000 | cmp - /mnt/new && umount /mnt" ||
    fail "the disk does not work after the hand-over"
  quiet g4
  gracefully g4 xvda
  destroy g4
}

# FE removed under I/O, then the guest destroyed under I/O: nothing of it may stay. The victim is whichever second guest
# an earlier scenario left.
test_forced() {
  local id be victim=g2
  [ ! -e /run/g3.domid ] || victim=g3
  have_guest g1
  disk g1 xvdb w "$(image bystander 16)"
  verify_start g1 xvdb 100
  have_guest $victim
  id=$(domid $victim)
  disk $victim xvdb w "$(image forced 16)"
  disk $victim xvdc w "$(image killed 16)"
  verify_start $victim xvdb
  verify_start $victim xvdc
  wait_for writes_beyond $victim xvdb 100 || fail "the verifier does not write"
  wait_for writes_beyond $victim xvdc 100 || fail "the verifier does not write"
  force_unplug $victim xvdb || fail "the backend did not close a disk whose frontend was removed"
  rm -f /run/plug.$victim.xvdb
  be=$(be_of $victim xvdc)
  # While vbdd sleeps, it holds the dead guest's ring: that the zombie is seen then proves that it would be seen later.
  case $FLAVOUR in vbdd*) on "$DOMAIN" "killall -STOP vbdd" ;; esac
  destroy $victim
  case $FLAVOUR in vbdd*)
    zombie || fail "no zombie although vbdd sleeps: this test sees nothing"
    on "$DOMAIN" "killall -CONT vbdd" ;;
  esac
  wait_for no_zombie || fail "a zombie domain stays: $(xl list | tail -2 | tr '\n' ' ')"
  # libxl removes what it knows of; the backend's directory was made by hand and is ours to remove.
  xenstore-exists "$be" && { wait_for closed_or_gone "$be" || fail "the backend of a dead guest is in state $(xenstore-read "$be/state")"; }
  xenstore-rm "$be" 2>/dev/null
  rm -f /run/plug.$victim.xvdc
  [ "$(grants_of "$id" "$(domid "$DOMAIN")")" = 0 ] || fail "grants of the dead guest are still in use"
  [ "$(ports_to "$(domid "$DOMAIN")" "$id")" = 0 ] || fail "event channels to the dead guest are still bound"
  verify_stop g1 xvdb
  quiet g1
  gracefully g1 xvdb
}

# A domain that is dead and cannot go, as somebody holds its memory, has no name.
no_zombie() { xl list | awk 'NR > 1 && ($1 == "(null)" || $5 ~ /d$/) { zombie = 1 } END { exit zombie }'; }
zombie() { ! no_zombie; }

# refused DISK PARAMS WORD: such params, attached before, must have ended in state 6 with a text that contains WORD.
refused() {
  local be text
  be=$(be_of g1 "$1")
  wait_for xenstore-exists "$be/hotplug-error" || fail "params '$2': no hotplug-error"
  text=$(xenstore-read "$be/hotplug-error")
  [ "$(xenstore-read "$be/hotplug-status")" = error ] || fail "params '$2': hotplug-status is not error"
  wait_for state_is "$be" 6 || fail "params '$2': state $(xenstore-read "$be/state") instead of 6"
  echo "params '$2': $text"
  echo "$text" | grep -qiE "$3" || fail "params '$2': the text does not say what is wrong: $text"
}

# each_bad FUNCTION: calls it with DISK PARAMS WORD for every kind of wrong params. GOOD is an image in use.
each_bad() {
  "$1" xvdc "$IMAGES/t-none" "no such|not found|not exist|missing"
  "$1" xvdd "$IMAGES/../../etc/inittab" "root|outside|\.\."
  "$1" xvde "/init" "root|outside"
  "$1" xvdf "$IMAGES" "director"
  "$1" xvdg "vhdx:$GOOD" "vhdx|format"
  "$1" xvdh "$IMAGES/t-link" "link|root|outside"
  "$1" xvdi "$GOOD" "use|shar|writ"
  "$1" xvdj "" "params|empty|path"
}

plug_bad() { plug g1 "$1" "$FLAVOUR" "$DOMAIN" w "$2" || fail "attaching"; }

test_bad_params() {
  only_vbdd
  have_guest g1
  GOOD=$(image good 16)
  on "$DOMAIN" "ln -s /init $IMAGES/t-link"
  disk g1 xvdb w "$GOOD"
  verify_start g1 xvdb 100
  each_bad plug_bad
  each_bad refused
  # A wrong neighbour goes as any other disk goes.
  for letter in c d e f g h i j; do force_unplug g1 xvd$letter || fail "xvd$letter does not go"; done
  verify_stop g1 xvdb
  quiet g1
  gracefully g1 xvdb
}

# Connecting and disconnecting again and again leaves nothing behind: files, event channels, grants.
test_leaks() {
  local n=0 before after file
  only_vbdd
  have_guest g1
  file=$(image leak 4)
  disk g1 xvdb w "$file"
  gracefully g1 xvdb
  before=$(footprint)
  while [ $n -lt 4 ]; do
    n=$((n + 1))
    disk g1 xvdb w "$file"
    on g1 "dd if=/dev/xvdb of=/dev/null bs=64k count=4 2>/dev/null" || fail "reading"
    gracefully g1 xvdb
  done
  after=$(footprint)
  [ "$before" = "$after" ] || fail "before: $before, after $n times: $after"
}

footprint() {
  on "$DOMAIN" "echo files=\$(ls /proc/\$(pidof vbdd)/fd | wc -l) maps=\$(wc -l </proc/\$(pidof vbdd)/maps)"
  echo "ports=$(ports_to "$(domid "$DOMAIN")" "$(domid g1)") grants=$(grants_of "$(domid g1)" "$(domid "$DOMAIN")")"
}

# The program that checks the xenstore client against the real xenstored, over the transport of this domain.
test_conformance() {
  on "$DOMAIN" "test -x /usr/bin/xenstore-conformance" || skip "not built"
  on "$DOMAIN" "xenstore-conformance" || fail "the xenstore client fails against the real xenstored"
}
