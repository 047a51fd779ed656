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
