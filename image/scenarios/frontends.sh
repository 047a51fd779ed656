# Linux' blkfront in all its forms, against a backend in dom0. Each function is a scenario.

# be_says GUEST DISK KEY, fe_says GUEST DISK KEY: a node of either end; nothing when it is not there.
be_says() { xenstore-read "$(be_of "$1" "$2")/$3" 2>/dev/null; }
fe_says() { xenstore-read "$(front "$1" "$2")/$3" 2>/dev/null; }

# blkfront GUEST [PARAMETER=VALUE]...: loads the guest's driver anew, with other parameters. No disk may be attached.
blkfront() {
  local guest=$1
  shift
  on "$guest" "rmmod xen-blkfront 2>/dev/null; modprobe xen-blkfront $*" || fail "modprobe xen-blkfront $*"
}

# hammer_start GUEST DISK THREADS [REGION_KIB]: verified I/O of all sizes on each vCPU, until hammer_stop.
hammer_start() {
  on "$1" "rm -f /tmp/stop.$2 /tmp/hammer.$2.*; cpus=\$(nproc); cpu=0; while [ \$cpu -lt \$cpus ]; do (taskset \$(printf %x \$((1 << cpu))) vbdd-guest hammer /dev/$2 $3 ${4:-1024} /tmp/stop.$2 900 \$cpu \$((cpu * $3)); echo status=\$?) >/tmp/hammer.$2.\$cpu 2>&1 & cpu=\$((cpu + 1)); done"
}

hammer_ended() { on "$1" "! grep -L status= /tmp/hammer.$2.* | grep -q ."; }

# hammer_stop GUEST DISK: ends it and wants every byte right. Prints what each vCPU did.
hammer_stop() {
  on "$1" "touch /tmp/stop.$2"
  wait_for hammer_ended "$1" "$2" || fail "the hammer on $2 of $1 hangs: $(on "$1" "dmesg | tail -5")"
  on "$1" "grep -h . /tmp/hammer.$2.*" >"/run/hammer.$1.$2"
  cat "/run/hammer.$1.$2"
  if grep -q '^status=[1-9]' "/run/hammer.$1.$2" || ! grep -q '^errors=0' "/run/hammer.$1.$2"; then
    fail "the hammer on $2 of $1: $(grep -v '^status=0' "/run/hammer.$1.$2" | head -1)"
  fi
}

# queues_of GUEST DISK: hardware queues that the guest's block layer has.
queues_of() { on "$1" "ls /sys/block/$2/mq | wc -l"; }

# test_queues GUEST KIND VCPUS ORDER INDIRECT: as many queues as vCPUs, rings of 2^ORDER pages, requests of INDIRECT segments;
# all of it is really used, and given back.
test_queues() {
  local name=$1 kind=$2 vcpus=$3 order=$4 indirect=$5 id queues pages refs ports0 grants0 queue segments
  only_vbdd
  [ -e "/run/$name.domid" ] && ! gone "$name" ||
    { VCPUS=$vcpus create "$name" "$kind" /domains/guest.cpio 192 "extra='console=hvc0 loglevel=1'" && start "$name" || fail "$name did not boot"; }
  on "$name" "dmesg -c >/dev/null"
  [ "$(on "$name" nproc)" = "$vcpus" ] || fail "$name has $(on "$name" nproc) vCPUs"
  id=$(domid "$name") ports0=$(ports_to 0 "$id") grants0=$(grants_of "$id" 0)
  blkfront "$name" max_queues=$vcpus max_ring_page_order=$order max_indirect_segments=$indirect
  disk "$name" xvdb w "$(image "queues-$name" 96)"
  queues=$(be_says "$name" xvdb multi-queue-max-queues) pages=$(be_says "$name" xvdb max-ring-page-order)
  [ "${queues:-1}" -gt 1 ] || fail "no queues are offered"
  [ "$queues" -lt "$vcpus" ] || queues=$vcpus
  [ "$pages" -lt "$order" ] || pages=$order
  [ "$(fe_says "$name" xvdb multi-queue-num-queues)" = "$queues" ] || fail "the guest wrote '$(fe_says "$name" xvdb multi-queue-num-queues)' queues, not $queues"
  [ "$(queues_of "$name" xvdb)" = "$queues" ] || fail "the guest's block layer has $(queues_of "$name" xvdb) queues, not $queues"
  [ "$(fe_says "$name" xvdb ring-page-order)" = "$pages" ] || [ "$pages" = 0 ] || fail "the guest's rings are of order $(fe_says "$name" xvdb ring-page-order)"
  queue=0 refs=0
  while [ $queue -lt "$queues" ]; do
    xenstore-exists "$(front "$name" xvdb)/queue-$queue/event-channel" || fail "queue $queue has no event channel"
    queue=$((queue + 1)) refs=$((refs + (1 << pages)))
  done
  # A request is as long as the guest was told, in pages of 4 KiB: 11 segments without indirect requests.
  segments=$(be_says "$name" xvdb feature-max-indirect-segments)
  [ "${segments:-0}" -lt "$indirect" ] || segments=$indirect
  [ "$(on "$name" "cat /sys/block/xvdb/queue/max_sectors_kb")" = "$((${segments:-11} * 4))" ] ||
    fail "requests of $(on "$name" "cat /sys/block/xvdb/queue/max_sectors_kb") KiB for ${segments:-11} segments"
  hammer_start "$name" xvdb 4
  sleep "${SECONDS_OF_LOAD:-4}"
  [ "$(($(ports_to 0 "$id") - ports0))" = "$queues" ] || fail "Xen knows of $(($(ports_to 0 "$id") - ports0)) event channels for $queues queues"
  [ "$(($(grants_of "$id" 0) - grants0))" -ge "$refs" ] || fail "Xen knows of $(($(grants_of "$id" 0) - grants0)) mapped grants for $refs ring pages"
  if [ -n "${PERSISTENT:-}" ]; then
    [ "$(be_says "$name" xvdb feature-persistent)/$(fe_says "$name" xvdb feature-persistent)" = 1/1 ] || fail "persistent grants are not agreed on"
    [ "$(($(grants_of "$id" 0) - grants0))" -gt $((refs + 32)) ] || fail "only $(($(grants_of "$id" 0) - grants0)) grants are mapped with persistent grants under load"
  fi
  tell "$kind guest, $vcpus vCPUs: $queues queues of $((1 << pages)) pages; Xen: $(($(ports_to 0 "$id") - ports0)) event channels, $(($(grants_of "$id" 0) - grants0)) grants; largest request $(on "$name" "cat /sys/block/xvdb/queue/max_sectors_kb") KiB; feature-persistent: we $(be_says "$name" xvdb feature-persistent), the guest $(fe_says "$name" xvdb feature-persistent)"
  on dom0 "vbdd status" | grep "/$id/" | while read -r line; do tell "  $line"; done
  hammer_stop "$name" xvdb
  tell "  $(grep -c '^errors=0' "/run/hammer.$name.xvdb") processes, one a vCPU, all sizes: $(grep '^errors=0' "/run/hammer.$name.xvdb" | tail -1)"
  # The queues were used: each had requests of its own vCPU.
  quiet "$name"
  gracefully "$name" xvdb
  [ "$(ports_to 0 "$id")" = "$ports0" ] || fail "event channels were not given back"
  [ "$(grants_of "$id" 0)" = "$grants0" ] || fail "grants were not given back"
}

# The same with persistent grants, which vbdd uses where the image is in memory: the guest's pages stay mapped, and all of them are
# given back at the end.
test_persistent() {
  IMAGES=/run/images
  mkdir -p $IMAGES
  vbdd_stop dom0 && VBDD_OPTIONS="--persistent-grants --root $IMAGES" vbdd_start dom0 || fail "vbdd did not start with --persistent-grants"
  PERSISTENT=1 test_queues "$@"
  rm -r $IMAGES
  vbdd_stop dom0 && vbdd_start dom0 || fail "vbdd did not start again"
}

# kib_of FILE: what a file occupies.
kib_of() { on "$DOMAIN" "sync; du -k $1" | cut -f1; }

# Discards of the guest give the image's space back: of a range, by trimming a file system, of the whole disk.
test_discard() {
  local file part full half trimmed
  have_guest g1
  file=$(image discard 32)
  disk g1 xvdb w "$file"
  [ "$(be_says g1 xvdb feature-discard)" = 1 ] || fail "no discards are offered"
  for part in "3 8388608 0" "4 16777216 8" "5 8388608 24"; do
    set -- $part
    on g1 "vbdd-guest pattern $1 $2 | dd of=/dev/xvdb bs=1M iflag=fullblock seek=$3 conv=fsync 2>/dev/null" || fail "filling the disk"
  done
  full=$(kib_of "$file")
  [ "$full" -ge 32768 ] || fail "a full image occupies $full KiB: this test sees nothing"
  on g1 "blkdiscard -o 8388608 -l 16777216 /dev/xvdb" || fail "blkdiscard in the guest"
  half=$(kib_of "$file")
  [ "$half" -le 16900 ] || fail "after discarding 16 MiB of 32 the image occupies $half KiB"
  # What was not discarded is what it was.
  for part in "3 8388608 0" "5 8388608 24"; do
    set -- $part
    on g1 "echo 3 >/proc/sys/vm/drop_caches; [ \"\$(dd if=/dev/xvdb bs=1M skip=$3 count=8 2>/dev/null | md5sum)\" = \"\$(vbdd-guest pattern $1 $2 | md5sum)\" ]" ||
      fail "a discard changed what lies beside it, at $3 MiB"
  done
  on g1 "/sbin/mke2fs -q -F -t ext4 /dev/xvdb && mount -t ext4 /dev/xvdb /mnt && vbdd-guest pattern 4 12000000 >/mnt/a && vbdd-guest pattern 5 4000000 >/mnt/b && sync" ||
    fail "a file system"
  full=$(kib_of "$file")
  on g1 "rm /mnt/a && sync && fstrim /mnt" || fail "fstrim in the guest"
  trimmed=$(kib_of "$file")
  [ "$trimmed" -le $((full - 11000)) ] || fail "fstrim after removing 12 MB: $full KiB before, $trimmed KiB after"
  on g1 "umount /mnt && mount -t ext4 /dev/xvdb /mnt && vbdd-guest pattern 5 4000000 | cmp - /mnt/b && umount /mnt" || fail "fstrim hurt another file"
  on g1 "blkdiscard /dev/xvdb" || fail "blkdiscard of the whole disk"
  [ "$(kib_of "$file")" -le 64 ] || fail "after discarding everything the image occupies $(kib_of "$file") KiB"
  tell "image of 32 MiB: full, then 16 MiB discarded: $half KiB; ext4 with 16 MB: $full KiB, a file removed and fstrim: $trimmed KiB; all discarded: $(kib_of "$file") KiB"
  quiet g1
  gracefully g1 xvdb
}

# closed_and_released GUEST DISK FILE: after its frontend has gone, vbdd holds nothing of the disk.
closed_and_released() {
  wait_for state_is "$(be_of "$1" "$2")" 6 || fail "the backend is in state $(be_says "$1" "$2" state) after the driver has gone"
  wait_for on dom0 "! ls -l /proc/\$(pidof vbdd)/fd | grep -q $3" || fail "vbdd keeps $3 open after the driver has gone"
}

# test_reload TIMES: the driver unbound from its disk under I/O, then its module unloaded and loaded (Linux keeps it while a device is
# bound). blkfront leaves its nodes in state 6 and never takes such a device back, whatever the backend: the toolstack attaches it anew.
test_reload() {
  local n=0 file
  have_guest g1
  file=$(image reload 32)
  disk g1 xvdb w "$file"
  on g1 "vbdd-guest pattern 31 1048576 | dd of=/dev/xvdb bs=64k seek=256 2>/dev/null && sync" || fail "writing the pattern"
  while [ $n -lt "$1" ]; do
    n=$((n + 1))
    hammer_start g1 xvdb 2
    wait_for writes_beyond g1 xvdb 20 || fail "round $n: the hammer does not write"
    on g1 "echo vbd-$(devid xvdb) >/sys/bus/xen/drivers/vbd/unbind" || fail "round $n: unbinding"
    # Its disk is gone: the hammer ends with errors, and must not hang, nor have read anything wrong.
    wait_for hammer_ended g1 xvdb || fail "round $n: I/O on an unbound disk hangs"
    on g1 "grep -h 'wrong byte' /tmp/hammer.xvdb.*" && fail "round $n: wrong data"
    on g1 "rmmod xen-blkfront && modprobe xen-blkfront" || fail "round $n: reloading the module: $(on g1 "lsmod | grep blkfront")"
    closed_and_released g1 xvdb "$file"
    gracefully g1 xvdb
    disk g1 xvdb w "$file"
    on g1 "vbdd-guest pattern 31 1048576 >/tmp/p; dd if=/dev/xvdb bs=64k skip=256 count=16 2>/dev/null | cmp - /tmp/p" ||
      fail "round $n: flushed data is gone"
  done
  tell "$1 times the driver unbound under I/O, its module reloaded, the disk attached anew: flushed data is there"
  gracefully g1 xvdb
}

# all_of_it: everything that a disk could leave behind.
all_of_it() {
  footprint
  echo "nodes=$(xenstore-ls /local/domain/0/backend | wc -l),$(xenstore-ls "/local/domain/$(domid g1)/device" | wc -l) state-files=$(ls -R /run/vbdd | wc -l)"
}
resident_kib() { awk '/^VmRSS/ { print $2 }' "/proc/$(pidof vbdd)/status"; }

# test_hot_plug TIMES: a disk plugged, read, written and unplugged under the I/O of another.
test_hot_plug() {
  local n=0 before after rss0 rss1 file
  only_vbdd
  have_guest g1
  disk g1 xvdb w "$(image bystander 16)"
  verify_start g1 xvdb 5
  file=$(image hot 8)
  # The first rounds find the size that everything has at work.
  while [ $n -lt $(($1 + 3)) ]; do
    [ $n != 3 ] || { before=$(all_of_it) rss0=$(resident_kib); }
    n=$((n + 1))
    disk g1 xvdc w "$file"
    on g1 "vbdd-guest pattern $n 65536 | dd of=/dev/xvdc bs=4k conv=fsync 2>/dev/null; vbdd-guest pattern $n 65536 >/tmp/p; head -c 65536 /dev/xvdc | cmp - /tmp/p" ||
      fail "round $n: the disk does not hold what was written"
    gracefully g1 xvdc
  done
  after=$(all_of_it) rss1=$(resident_kib)
  verify_stop g1 xvdb
  tell "before: $(echo $before), $rss0 KiB resident; after $1 times: $(echo $after), $rss1 KiB"
  [ "$before" = "$after" ] || fail "before: $before, after $1 times: $after"
  # The allocator may keep a page or two; a leak grows with every round.
  [ "$rss1" -le $((rss0 + 64 + $1)) ] || fail "vbdd grew from $rss0 to $rss1 KiB in $1 rounds"
  quiet g1
  gracefully g1 xvdb
}

# PVH GRUB, a 32-bit frontend with the x86_32 ABI, reads a 64-bit Linux, which connects with its own ABI.
test_pvh_grub() {
  local file=$IMAGES/boot.img abi
  create g5 pvhgrub - 256 || fail "no PVH GRUB domain: $(tail -1 /run/g5.xl)"
  plug g5 xvda "$FLAVOUR" "$DOMAIN" w "$file" || fail "attaching"
  wait_for state_is "$(be_of g5 xvda)" 2 || fail "the backend did not reach state 2 before the guest ran"
  start g5 || fail "no Linux came out of PVH GRUB: $(tail -c 300 $LOGS/guest-g5.log | tr -cd ' -~')"
  connected g5 xvda || fail "Linux did not connect after GRUB"
  on g5 "grep -q vbdd.from=grub /proc/cmdline" || fail "Linux was not started by GRUB"
  on g5 "dmesg" | grep -qi "xen pvh" || fail "this is no PVH guest"
  on g5 "vbdd-guest pattern 9 1000000 >/tmp/p; mount -t ext4 /dev/xvda /mnt && cp /tmp/p /mnt/new && umount /mnt && mount -t ext4 /dev/xvda /mnt && cmp /tmp/p /mnt/new && umount /mnt" ||
    fail "the disk does not work after the hand-over"
  tell "connections of PVH GRUB and of Linux after it: $(vbdd_log dom0 | grep "vbd/$(domid g5)/.*connected" | sed 's/.*connected, //' | tr '\n' ' ')"
  vbdd_log dom0 | grep "vbd/$(domid g5)/.*connected" | grep -q x86_32 || fail "no connection with the 32-bit ABI"
  vbdd_log dom0 | grep "vbd/$(domid g5)/.*connected" | tail -1 | grep -q x86_64 || fail "Linux did not connect with the 64-bit ABI"
  quiet g5
  gracefully g5 xvda
  destroy g5
}

# xl in dom0 with vbdd in dom0: kind vbd with a script of our own, which libxl runs instead of "block".
test_block_vbdd() {
  local file
  file=$(image xl 16)
  create x2 pv /domains/guest.cpio 128 "extra='console=hvc0 loglevel=1'" "disk=['vdev=xvda,access=w,backendtype=phy,script=block-vbdd,target=$file']" ||
    fail "xl create: $(tail -2 /run/x2.xl | tr '\n' ' ')"
  echo "vbdd dom0 $file" >/run/plug.x2.xvda
  [ "$(be_says x2 xvda hotplug-status)" = connected ] || fail "the script did not run: hotplug-status is '$(be_says x2 xvda hotplug-status)'"
  start x2 || fail "x2 did not boot"
  connected x2 xvda
  verified x2 xvda 1
  # What is not there makes xl fail, with a text, and leaves nothing.
  xl block-attach x2 "vdev=xvdb,access=w,backendtype=phy,script=block-vbdd,target=$IMAGES/t-none" >/run/xl.out 2>&1 && fail "xl attached an image that does not exist"
  grep -q "no such file" /run/xl.out || fail "xl does not say why: $(tail -3 /run/xl.out | tr '\n' ' ')"
  tell "xl block-attach of a missing image: $(grep "no such file" /run/xl.out | head -1 | cut -c1-160)"
  # libxl leaves the nodes of an attach that failed; block-detach takes them away.
  absent "$(back vbd dom0 x2 xvdb)" || xl block-detach x2 xvdb >/run/xl.out 2>&1
  wait_for absent "$(back vbd dom0 x2 xvdb)" || fail "a failed attach cannot be detached: $(tail -2 /run/xl.out | tr '\n' ' ')"
  file=$(image xl2 16)
  xl block-attach x2 "vdev=xvdb,access=w,backendtype=phy,script=block-vbdd,target=$file" >/run/xl.out 2>&1 || fail "xl block-attach: $(tail -2 /run/xl.out | tr '\n' ' ')"
  echo "vbdd dom0 $file" >/run/plug.x2.xvdb
  connected x2 xvdb
  verified x2 xvdb 1
  xl block-detach x2 xvdb >/run/xl.out 2>&1 || fail "xl block-detach: $(tail -2 /run/xl.out | tr '\n' ' ')"
  absent "$(be_of x2 xvdb)" || fail "the directory is still there after block-detach"
  rm -f /run/plug.x2.*
  # xl forgets what it cannot do: in Xen 4.17 no blktap is known; from 4.20 on this line attaches as vbd3.
  xl block-attach x2 "vdev=xvdc,access=w,backendtype=tap,format=raw,script=block-vbdd,target=$file" >/run/xl.out 2>&1
  tell "xl $(xl info 2>/dev/null | awk '/^xen_version/ { print $3 }'), backendtype=tap: $(grep -m1 -iE "error.*(tap|backend)" /run/xl.out || head -1 /run/xl.out)"
  quiet x2
  xl destroy x2
  wait_for no_zombie || fail "a zombie stays"
  rm -f /run/x2.domid /run/x2.tty
  wait_for on dom0 "! ls -l /proc/\$(pidof vbdd)/fd | grep -q t-xl" || fail "vbdd keeps the images open"
}

# kexec in a guest while its disk is in use: the old kernel leaves, the new one connects to the same disk. KIND: pv, pvh.
test_kexec() {
  local kind=$1 name=k-$1 booted program
  create "$name" "$kind" /domains/guest.cpio 320 "extra='console=hvc0 loglevel=1'" && start "$name" || fail "no guest"
  disk "$name" xvdb r "$IMAGES/boot.img"
  disk "$name" xvdc w "$(image "kexec-$kind" 16)"
  program="/mnt/kexec/usr/lib64/ld-linux-x86-64.so.2 --library-path /mnt/kexec/usr/lib /mnt/kexec/sbin/kexec"
  on "$name" "mount -t ext4 -o ro,noload /dev/xvdb /mnt && $program -s -l /mnt/boot/vmlinuz --initrd=/mnt/boot/guest.cpio --command-line='console=hvc0 loglevel=1 vbdd.from=kexec' || $program -c -l /mnt/boot/vmlinuz --initrd=/mnt/boot/guest.cpio --command-line='console=hvc0 loglevel=1 vbdd.from=kexec'" >/run/kexec.out ||
    skip "kexec -l in a $kind guest: $(tail -2 /run/kexec.out | tr '\n' ' ')"
  flushed_by_guest "$name"
  verify_start "$name" xvdc
  wait_for writes_beyond "$name" xvdc 100 || fail "the verifier does not write"
  booted=$(grep -c "agent ready" "$LOGS/guest-$name.log")
  echo "q0 $program -e" >"$(cat "/run/$name.tty")"
  wait_for booted_again "$name" "$booted" || skip "kexec -e in a $kind guest ends in: $(xl list "$name" | tail -1) $(tail -c 200 "$LOGS/guest-$name.log" | tr -cd ' -~')"
  on "$name" "grep -q vbdd.from=kexec /proc/cmdline" || fail "this is not the kernel of kexec"
  connected "$name" xvdc || fail "the disk did not connect to the new kernel"
  on "$name" "vbdd-guest pattern 12 1048576 >/tmp/p; dd if=/dev/xvdc bs=64k skip=64 count=16 2>/dev/null | cmp - /tmp/p" || fail "flushed data is gone"
  verified "$name" xvdc 1
  tell "kexec in a $kind guest under I/O: the new kernel has the disk, flushed data is there"
  gracefully "$name" xvdb
  gracefully "$name" xvdc
  destroy "$name"
}
booted_again() { [ "$(grep -c "agent ready" "$LOGS/guest-$1.log")" -gt "$2" ]; }
flushed_by_guest() { on "$1" "vbdd-guest pattern 12 1048576 | dd of=/dev/xvdc bs=64k seek=64 2>/dev/null && sync"; }

guest_sectors_are() { [ "$(on "$1" "cat /sys/block/$2/size")" = "$3" ]; }

# An image grown under a mounted file system and I/O: the guest sees the new size without an unplug, and can use it.
test_resize() {
  local file
  have_guest g1
  file=$(image resize 16)
  disk g1 xvdb w "$file"
  guest_sectors_are g1 xvdb 32768 || fail "a disk of 16 MiB has $(on g1 "cat /sys/block/xvdb/size") sectors"
  on g1 "dmesg -n 1; dmesg -c >/dev/null"
  verify_start g1 xvdb
  wait_for writes_beyond g1 xvdb 50 || fail "the verifier does not write"
  on dom0 "truncate -s 48M $file && vbdd resize vbd/$(domid g1)/$(devid xvdb)" || fail "vbdd resize"
  wait_for guest_sectors_are g1 xvdb 98304 || fail "the guest still sees $(on g1 "cat /sys/block/xvdb/size") sectors"
  state_is "$(front g1 xvdb)" 4 || fail "the frontend is in state $(fe_says g1 xvdb state)"
  on g1 "vbdd-guest pattern 21 16777216 | dd of=/dev/xvdb bs=1M seek=32 iflag=fullblock conv=fsync 2>/dev/null" || fail "writing where the disk has grown"
  on dom0 "vbdd-guest pattern 21 16777216 >/run/pattern; tail -c 16777216 $file | cmp - /run/pattern" || fail "the new part of the image is not what the guest wrote"
  verify_stop g1 xvdb
  tell "grown from 16 to 48 MiB under I/O; the guest: $(on g1 "dmesg | grep -i capacity | tail -1")"
  quiet g1
  gracefully g1 xvdb
}
