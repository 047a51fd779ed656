# Scenarios of images with formats.

# kib_in FILE: what it occupies.
kib_in() { on "$DOMAIN" "sync; du -k $1 | cut -f1"; }

# freed FILE KIB: it occupies no more than that; a second may pass before metadata are written.
freed() { [ "$(kib_in "$1")" -le "$2" ]; }

# test_file_system FORMAT:FILE: the template's ext4 with /known: read, written, trimmed, mounted again.
test_file_system() {
  local image=$1 file=${1#*:} full
  only_vbdd
  have_guest g1
  disk g1 xvdb w "$image"
  on g1 "mount -t ext4 /dev/xvdb /mnt && cd /mnt && md5sum -c known.md5" || fail "the template's file is not what it was"
  on g1 "vbdd-guest pattern 4 16000000 >/mnt/a && vbdd-guest pattern 5 4000000 >/mnt/b && sync" || fail "writing files"
  full=$(kib_in "$file")
  on g1 "rm /mnt/a && sync && fstrim /mnt" || fail "fstrim in the guest"
  case $image in
    # A VHD gives whole blocks of 2 MiB back to itself, and the file system the space of what is discarded in them.
    *) wait_for freed "$file" $((full - 14000)) || fail "fstrim after removing 16 MB: $full KiB before, $(kib_in "$file") KiB after" ;;
  esac
  tell "${file##*/}: with 20 MB more $full KiB, after removing 16 MB and fstrim $(kib_in "$file") KiB"
  on g1 "umount /mnt && mount -t ext4 /dev/xvdb /mnt && vbdd-guest pattern 5 4000000 | cmp - /mnt/b && cd /mnt && md5sum -c known.md5" || fail "after fstrim the files are not what they were"
  on g1 "umount /mnt"
  quiet g1
  gracefully g1 xvdb
}

# The overlays of two guests, and the template itself, which nobody may write meanwhile.
test_template() {
  local text
  only_vbdd
  have_guest g1
  have_guest g2
  disk g1 xvdb w qcow2:$IMAGES/one.qcow2
  disk g2 xvdb w qcow2:$IMAGES/two.qcow2
  for name in g1 g2; do
    on $name "mount -t ext4 /dev/xvdb /mnt && echo $name >/mnt/who && cd /mnt && md5sum -c known.md5" || fail "$name has no file system"
  done
  plug g1 xvdc "$FLAVOUR" "$DOMAIN" w "qcow2:$IMAGES/template.qcow2" || fail "attaching"
  wait_for xenstore-exists "$(be_of g1 xvdc)/hotplug-error" || fail "the template of two disks was given to a writer"
  text=$(xenstore-read "$(be_of g1 xvdc)/hotplug-error")
  tell "refused: $text"
  case $text in *"is in use by guest"*) ;; *) fail "refused otherwise: $text" ;; esac
  for name in g1 g2; do
    [ "$(on $name "cat /mnt/who")" = $name ] || fail "$name reads what another wrote"
    on $name "umount /mnt"
    quiet $name
    gracefully $name xvdb
  done
}

# A chain of three VHDs behind the ring, then behind an NBD server whose client the backend is, then turned into a raw image.
test_vhd_chain() {
  local leaf=$IMAGES/leaf.vhd socket=/run/nbd/leaf
  only_vbdd
  have_guest g1
  on "$DOMAIN" "cd $IMAGES && vbdd image snapshot vhd:chain.vhd middle.vhd && vbdd image snapshot vhd:middle.vhd leaf.vhd" || fail "making the chain"
  disk g1 xvdb w vhd:$leaf
  on g1 "mount -t ext4 /dev/xvdb /mnt && vbdd-guest pattern 6 9000000 >/mnt/ring && cd /mnt && md5sum -c known.md5 && cd / && umount /mnt" || fail "through the ring"
  gracefully g1 xvdb
  on "$DOMAIN" "vbdd image check vhd:$leaf" || fail "the leaf is damaged"
  on "$DOMAIN" "mkdir -p /run/nbd; vbdd nbd vhd:$leaf --socket $socket >/run/nbd.log 2>&1 & echo \$! >/run/nbd.pid"
  wait_for on "$DOMAIN" "test -S $socket" || fail "the NBD server: $(on "$DOMAIN" "cat /run/nbd.log")"
  disk g1 xvdb w "raw:nbd+unix:///?socket=$socket"
  on g1 "mount -t ext4 /dev/xvdb /mnt && vbdd-guest pattern 6 9000000 | cmp - /mnt/ring && vbdd-guest pattern 7 5000000 >/mnt/nbd && cd /mnt && md5sum -c known.md5 && cd / && umount /mnt" || fail "through NBD"
  quiet g1
  gracefully g1 xvdb
  on "$DOMAIN" "kill \$(cat /run/nbd.pid); vbdd image info --json vhd:$leaf" || fail "info"
  wait_for on "$DOMAIN" "vbdd image check vhd:$leaf" || fail "the leaf is damaged after NBD"
  on "$DOMAIN" "vbdd image convert -O raw vhd:$leaf $IMAGES/t-out && vbdd image compare vhd:$leaf raw:$IMAGES/t-out && mkdir -p /tmp/out && mount -t ext4 -o ro,noload,loop $IMAGES/t-out /tmp/out" ||
    fail "turning the chain into a raw image"
  on "$DOMAIN" "vbdd-guest pattern 6 9000000 | cmp - /tmp/out/ring && vbdd-guest pattern 7 5000000 | cmp - /tmp/out/nbd && cd /tmp/out && md5sum -c known.md5 && cd / && umount /tmp/out" || fail "the raw image holds something else"
}
