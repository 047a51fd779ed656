# What the benchmark and the profile share: backends side by side in dom0, each with a raw file on tmpfs, and one guest.
DOMAIN=dom0

failed() { warn "$*"; tail -20 /run/vbdd.log /run/qdisk.*.log 2>/dev/null; exit 1; }

# Between two looks of ours nothing but the load runs: the looks are rare, and the load starts well after the first.
POLL=10
LOOK_MS=10000
TIMEOUT=200
SIZE=33554432

disk_of() { case $1 in blkback) echo xvdb ;; qdisk) echo xvdc ;; vbdd3) echo xvdd ;; esac; }

# One guest with a disk from each of FLAVOURS.
bench_up() {
  mkdir -p /srv/images
  mount -t tmpfs tmpfs /srv/images
  guest guest pv 192 || failed "no guest"
  POLL=1 LOOK_MS=500 start guest || failed "the guest did not start"
  story "a guest is up"
  for flavour in $FLAVOURS; do
    vbdd-guest pattern 5 $SIZE >"/srv/images/$flavour.img"
    POLL=1 backend_up "$flavour" dom0 || failed "$flavour did not start"
    plug guest "$(disk_of "$flavour")" "$flavour" dom0 w "/srv/images/$flavour.img" || failed "attaching $flavour"
    POLL=1 connected guest "$(disk_of "$flavour")" || failed "$flavour did not connect"
    story "$flavour is connected"
  done
}
