# make run: one guest, one disk, from attaching to unplugging.
. /scenario/config

step() { story "$*"; }
failed() {
  warn "$*"
  case $BACKEND in vbdd) echo "---- vbdd said"; vbdd_log "$DOMAIN" | tail -20 ;; esac
  exit 1
}

storage_up "$DOMAIN" || failed "the storage of $DOMAIN did not come up"
[ "$DOMAIN" = dom0 ] || step "the storage domain is up; its disk came from dom0's blkback"
backend_up "$BACKEND" "$DOMAIN" || failed "the backend did not start"
step "$BACKEND serves in $DOMAIN"

guest guest || failed "no guest"
start guest || failed "the guest did not start"
step "a Linux PV guest is up, without any disk"

plug guest xvdb "$BACKEND" "$DOMAIN" w "/srv/images/guest.img" || failed "attaching failed"
connected guest xvdb || failed "the disk did not connect"
step "xvdb attached by xenstore writes: both ends say Connected"
wait_for on guest "test -b /dev/xvdb" || failed "no /dev/xvdb in the guest"

on guest "sh /lib/vbdd/work-write /dev/xvdb" >/run/sums || { cat /run/sums; failed "writing in the guest failed"; }
while read -r sum; do data "$sum"; done </run/sums
step "the guest made an ext4, wrote $(wc -l </run/sums) files, synced and unmounted"
on guest "sh /lib/vbdd/work-verify /dev/xvdb" >/run/verify || { cat /run/verify; failed "the guest read something else than it wrote"; }
step "the guest mounted it again and read every byte back"

unplug guest xvdb || failed "unplugging failed"
on guest "test ! -b /dev/xvdb" || failed "the guest still has /dev/xvdb"
step "unplugged: the backend reached Closed and its directory is gone"
halt guest || failed "the guest did not power off"
storage_down "$DOMAIN" || failed "the storage domain did not go down"
step "all domains are down"
exit 0
