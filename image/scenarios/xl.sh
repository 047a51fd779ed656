# Real xl with disks that the storage domain serves: disk lines with "backend=", block-attach and block-detach, save and
# restore, destroy. Each function is a scenario; the guest is x1, with xvda and xvdb of kind vbd.

# xl_line DISK TYPE FILE: a disk line. TYPE: phy (kind vbd), qdisk.
xl_line() { echo "backend=storage,vdev=$1,access=w,backendtype=$2,${XL_WORDS:-}$([ "$2" = phy ] || echo format=raw,)target=$3"; }

# xl_record GUEST DISK TYPE FILE: tells the harness of a disk that xl has attached.
xl_record() { echo "$(case $3 in phy) echo vbdd ;; *) echo qdisk ;; esac) storage $4" >"/run/plug.$1.$2"; }

xl_attach() {
  xl block-attach "$1" "$(xl_line "$2" "$3" "$4")" >/run/xl.out 2>&1 || fail "xl block-attach $2 ($3): $(tail -4 /run/xl.out | tr '\n' ' ')"
  xl_record "$@"
  connected "$1" "$2" || fail "$2 of $1 ($3) did not connect"
  wait_for on "$1" "test -b /dev/$2" || fail "$1 has no /dev/$2"
}

# xl_detach GUEST DISK [--force]: and nothing of the disk is left, in xenstore or in vbdd's hands.
xl_detach() {
  local be fe file
  be=$(be_of "$1" "$2") fe=$(front "$1" "$2") file=$(awk '{ print $3 }' "/run/plug.$1.$2")
  xl block-detach ${3:-} "$1" "$2" >/run/xl.out 2>&1 || fail "xl block-detach ${3:-} $2: $(tail -4 /run/xl.out | tr '\n' ' ')"
  wait_for absent "$be" || fail "$be is still there after block-detach: $(xenstore-ls "$be" | tr '\n' ' ')"
  absent "$fe" || fail "$fe is still there after block-detach"
  absent "/libxl/$(domid "$1")/device/vbd/$(devid "$2")" || fail "libxl did not forget $2"
  wait_for not_held "$file" || fail "vbdd still has $file open"
  rm -f "/run/plug.$1.$2"
}

# The path of an image that vbdd has open shows in its descriptors.
held() { on storage "ls -l /proc/\$(pidof vbdd)/fd | grep -q '$1'"; }
not_held() { ! held "$1"; }

have_x1() {
  local a b
  if [ -e /run/x1.domid ] && ! gone x1; then on x1 "dmesg -c >/dev/null"; return; fi
  a=$(image x1-a 16 k) b=$(image x1-b 16 k)
  create x1 pv /domains/guest.cpio 128 "extra='console=hvc0 loglevel=1'" "disk=['$(xl_line xvda phy "$a")','$(xl_line xvdb phy "$b")']" ||
    fail "xl create: $(tail -2 /run/x1.xl | tr '\n' ' ')"
  xl_record x1 xvda phy "$a"
  xl_record x1 xvdb phy "$b"
  # libxl waits for exactly 2 where it expects a script to follow.
  wait_for state_is "$(be_of x1 xvda)" 2 || fail "xvda is not in state 2 before the guest runs"
  start x1 || fail "x1 did not boot"
  connected x1 xvda && connected x1 xvdb || fail "the disks of xl create did not connect"
  wait_for on x1 "test -b /dev/xvda -a -b /dev/xvdb" || fail "x1 lacks a disk"
}

# xl create with two disks, and one guest (x0) with a disk of each kind. In Xen 4.17 a guest with a qdisk of another domain can
# have no disk attached later: libxl takes it for dom0's and wants a QEMU.
test_xl_create() {
  local disk a b
  a=$(image x0-a 8) b=$(image x0-b 8)
  create x0 pv /domains/guest.cpio 128 "extra='console=hvc0 loglevel=1'" "disk=['$(xl_line xvda phy "$a")','$(xl_line xvdb qdisk "$b")']" ||
    fail "xl create: $(tail -4 /run/x0.xl | tr '\n' ' ')"
  xl_record x0 xvda phy "$a"
  xl_record x0 xvdb qdisk "$b"
  start x0 || fail "x0 did not boot"
  for disk in xvda xvdb; do connected x0 $disk || fail "$disk of x0 did not connect"; done
  told xl block-list x0
  [ "$(xl block-list x0 | awk 'NR > 1 && $4 == 4' | wc -l)" = 2 ] || fail "xl block-list does not show two connected disks"
  verify_start x0 xvda
  verify_start x0 xvdb
  sleep 1
  for disk in xvda xvdb; do
    verify_stop x0 $disk
    # The bytes in the image are the guest's.
    on x0 "vbdd-guest pattern 7 1048576 | dd of=/dev/$disk bs=64k 2>/dev/null && sync" || fail "writing $disk"
    on storage "vbdd-guest pattern 7 1048576 >/tmp/p; head -c 1048576 $(awk '{ print $3 }' /run/plug.x0.$disk) | cmp - /tmp/p" ||
      fail "the image of $disk of x0 is not what the guest wrote"
  done
  quiet x0
  rm -f /run/plug.x0.*
  xl destroy x0
  rm -f /run/x0.domid /run/x0.tty
  wait_for not_held t-x0 || fail "vbdd still has the images of x0 open"
}

# xl block-attach and block-detach, beside a disk in use; a detached image can be attached again.
test_xl_hot() {
  local file n=0
  have_x1
  verify_start x1 xvda 20
  file=$(image hot 8)
  while [ $n -lt 3 ]; do
    xl_attach x1 xvdc phy "$file"
    [ "$(xl block-list x1 | awk 'NR > 1 && $4 == 4' | wc -l)" = 3 ] || fail "xl block-list does not show three connected disks"
    held "$file" || fail "vbdd serves $file without having it open: this test sees nothing"
    verified x1 xvdc 1
    xl_detach x1 xvdc
    n=$((n + 1))
  done
  [ "$(xl block-list x1 | wc -l)" = 3 ] || fail "xl block-list still shows the detached disk"
  verify_stop x1 xvda
  quiet x1
  tell "$n times xl block-attach, verified I/O, xl block-detach beside a disk in use: $(head -1 /run/verify.x1.xvda)"
}

# What a guest had flushed before its disk was torn away is in the image.
flushed_pattern() { on "$1" "vbdd-guest pattern $3 1048576 | dd of=/dev/$2 bs=64k seek=16 2>/dev/null && sync"; }
has_pattern() { on storage "vbdd-guest pattern $2 1048576 >/tmp/p; dd if=$1 bs=64k skip=16 count=16 2>/dev/null | cmp - /tmp/p"; }

# xl block-detach under I/O, then forced. The guest's I/O ends with errors or is over; nothing may stay, and nobody else notices.
test_xl_detach_io() {
  local file how
  have_x1
  verify_start x1 xvda 20
  for how in "" --force; do
    file=$(image torn 16)
    xl_attach x1 xvdc phy "$file"
    flushed_pattern x1 xvdc 77 || fail "writing the pattern"
    verify_start x1 xvdc
    wait_for writes_beyond x1 xvdc 100 || fail "the verifier does not write"
    xl_detach x1 xvdc $how
    wait_for on x1 "grep -q status= /tmp/verify.xvdc" || fail "the guest's I/O on a detached disk hangs"
    tell "xl block-detach $how under I/O; the guest's verifier then said: $(on x1 "head -1 /tmp/verify.xvdc" | cut -c1-90)"
    on x1 "grep -q 'should be of generation' /tmp/verify.xvdc" && fail "wrong data before the detach"
    has_pattern "$file" 77 || fail "flushed data is not in the image"
    wait_for on x1 "test ! -b /dev/xvdc" || fail "the guest keeps /dev/xvdc"
  done
  verify_stop x1 xvda
}

# xl save under verified I/O on both disks, then xl restore: the guest goes on and finds all its data. Nothing of the saved
# domain stays. HOW: "" ends the domain, -c leaves it running.
test_xl_save() {
  local old be count
  have_x1
  verify_start x1 xvda
  verify_start x1 xvdb
  wait_for writes_beyond x1 xvda 150 || fail "the verifier does not write"
  old=$(domid x1) be=$(be_of x1 xvda)
  xl save x1 /run/x1.save >/run/xl.out 2>&1 || fail "xl save: $(tail -4 /run/xl.out | tr '\n' ' ')"
  wait_for absent "$be" || fail "$be is still there after xl save"
  wait_for not_held k-x1-a || fail "vbdd still has the image of a saved guest open"
  no_zombie || fail "xl save left a zombie"
  xl restore /run/x1.save >/run/xl.out 2>&1 || fail "xl restore: $(tail -4 /run/xl.out | tr '\n' ' ')"
  rm -f /run/x1.save
  adopt x1 || fail "the restored guest has no console"
  connected x1 xvda && connected x1 xvdb || fail "the disks of the restored guest did not connect"
  count=$(writes x1 xvda)
  wait_for writes_beyond x1 xvda $((count + 100)) || fail "the restored guest's writes do not go on"
  verify_stop x1 xvda
  verify_stop x1 xvdb
  quiet x1
  tell "xl save and restore under I/O, domain $old became $(domid x1): $(head -1 /run/verify.x1.xvda); $(head -1 /run/verify.x1.xvdb)"
}

# The domain is suspended, saved, and goes on in place.
test_xl_checkpoint() {
  local count n=0
  have_x1
  verify_start x1 xvda
  wait_for writes_beyond x1 xvda 150 || fail "the verifier does not write"
  while [ $n -lt 2 ]; do
    n=$((n + 1))
    xl save -c x1 /run/x1.save >/run/xl.out 2>&1 || fail "xl save -c: $(tail -4 /run/xl.out | tr '\n' ' ')"
    rm -f /run/x1.save
    count=$(writes x1 xvda)
    wait_for writes_beyond x1 xvda $((count + 100)) || fail "the guest's writes do not go on"
    connected x1 xvda || fail "xvda did not stay connected"
  done
  verify_stop x1 xvda
  quiet x1
  tell "$n times xl save -c under I/O: $(head -1 /run/verify.x1.xvda)"
}

# xen_says GUEST_ID: what Xen itself says about a guest and the storage domain, for people to read.
xen_says() {
  tell "grants of d$1 that the backend has in use: $(grants_of "$1" "$(domid storage)"); event channels of the backend to d$1: $(ports_to "$(domid storage)" "$1")"
  { grant_lines "$1" "$(domid storage)"; port_lines "$(domid storage)" "$1"; } | head -6 >/run/xen.lines
  told cat /run/xen.lines
}

# The guest destroyed in the middle of I/O on two disks: Xen's tables are back where they were.
test_xl_destroy() {
  local id fds
  have_x1
  fds=$(on storage "ls /proc/\$(pidof vbdd)/fd | wc -l")
  verify_start x1 xvda
  verify_start x1 xvdb
  wait_for writes_beyond x1 xvda 100 || fail "the verifier does not write"
  id=$(domid x1)
  [ "$(ports_to "$(domid storage)" "$id")" -ge 2 ] || fail "no event channels to a guest under I/O: this test sees nothing"
  [ "$(grants_of "$id" "$(domid storage)")" -ge 2 ] || fail "no grants of a guest under I/O in use: this test sees nothing"
  xen_says "$id"
  rm -f /run/plug.x1.*
  xl destroy x1 >/run/xl.out 2>&1 || fail "xl destroy: $(tail -4 /run/xl.out | tr '\n' ' ')"
  rm -f /run/x1.domid /run/x1.tty
  wait_for no_zombie || fail "a zombie domain stays: $(xl list | tail -2 | tr '\n' ' ')"
  tell "after xl destroy:"
  xen_says "$id"
  told xl list
  [ "$(ports_to "$(domid storage)" "$id")" = 0 ] || fail "event channels to the dead guest are still bound"
  [ "$(grants_of "$id" "$(domid storage)")" = 0 ] || fail "grants of the dead guest are still in use"
  for kind in vbd qdisk; do
    wait_for absent "/local/domain/$(domid storage)/backend/$kind/$id" || fail "the dead guest's $kind directories stay"
  done
  absent "/libxl/$id" || fail "libxl keeps /libxl/$id"
  wait_for not_held k-x1 || fail "vbdd keeps the dead guest's images open"
  loops_left k-x1
  [ "$(on storage "ls /proc/\$(pidof vbdd)/fd | wc -l")" -lt "$fds" ] || fail "vbdd has as many files open as with the guest"
}

# loops_left IMAGE: told and not asserted, as it depends on whether bash and Xen's script need more than the five seconds that
# the directory stays: on a busy emulated machine they do.
loops_left() {
  TIMEOUT=15 wait_for on storage "! losetup -a | grep $1" || tell "xl devd's script was too slow to take its loop device away: $(on storage "losetup -a")"
}

# "xl devd" beside vbdd, with Debian's own scripts: it runs "block" for each vbd, which makes a loop device nobody reads; and it
# removes directories as vbdd does. Also with script=block-vbdd, which does nothing of the kind.
test_xl_devd() {
  local file words
  on storage "mkdir -p /run/lock /run/xen /var/lib/xen /var/log/xen; insmod /lib/vbdd/peer/loop.ko 2>/dev/null"
  on storage "xl devd -F >/tmp/devd.log 2>&1 & echo \$! >/run/devd.pid"
  wait_for on storage "pidof xl" || fail "xl devd does not run: $(on storage "tail -3 /tmp/devd.log")"
  have_x1
  verify_start x1 xvda 20
  for words in "" script=block-vbdd,; do
    file=$(image devd 16)
    XL_WORDS=$words xl_attach x1 xvdc phy "$file"
    wait_for xenstore-exists "$(be_of x1 xvdc)/physical-device-path" || xenstore-exists "$(be_of x1 xvdc)/hotplug-error" ||
      fail "xl devd did not run its script: this test sees nothing. $(on storage "tail -3 /tmp/devd.log /var/log/xen/xen-hotplug.log")"
    tell "xl devd ran $(basename "$(xenstore-read "$(be_of x1 xvdc)/script")"): $(xenstore-ls "$(be_of x1 xvdc)" | grep -E '^(physical-device|hotplug|node)' | tr '\n' ' ')"
    verified x1 xvdc 2
    xl_detach x1 xvdc
    loops_left t-devd
  done
  verify_stop x1 xvda
  quiet x1
  told on storage "cut -c1-150 /tmp/devd.log /var/log/xen/xen-hotplug.log 2>/dev/null | tail -6"
}
