# What the benchmark and the profile share: backends side by side in dom0, each with a raw file on tmpfs, and one guest.
DOMAIN=dom0

failed() { warn "$*"; tail -20 /run/vbdd.log /run/qdisk.*.log 2>/dev/null; exit 1; }

# Between two looks of ours nothing but the load runs: the looks are rare, and the load starts well after the first.
POLL=10
LOOK_MS=10000
TIMEOUT=200
SIZE=33554432

disk_of() {
  case $1 in
    blkback) echo xvdb ;; qdisk) echo xvdc ;; vbdd3) echo xvdd ;; persistent) echo xvde ;;
    qcow2) echo xvdm ;; vhd) echo xvdn ;; qdisk-qcow2) echo xvdo ;;
  esac
}

# plug_flavour FLAVOUR: "persistent", "qcow2" and "vhd" are further disks of the same vbdd.
plug_flavour() {
  local disk
  disk=$(disk_of "$1")
  case $1 in
    vbdd3 | persistent)
      echo "vbdd3 dom0 /srv/images/$1.img" >"/run/plug.guest.$disk"
      attach guest "$disk" dom0 vbd3 w "aio:/srv/images/$1.img" \
        vbdd "=persistent=$([ "$1" = persistent ] && echo 1 || echo 0)" ;;
    qcow2 | vhd)
      echo "vbdd3 dom0 /srv/images/$1.img" >"/run/plug.guest.$disk"
      attach guest "$disk" dom0 vbd3 w "$1:/srv/images/$1.img" vbdd =persistent=0 ;;
    qdisk-qcow2)
      echo "qdisk dom0 /srv/images/$1.img" >"/run/plug.guest.$disk"
      attach guest "$disk" dom0 qdisk w "qcow2:/srv/images/$1.img" && qdisk_serve guest ;;
    *) plug guest "$disk" "$1" dom0 w "/srv/images/$1.img" ;;
  esac
}

VBDD_OPTIONS=--persistent-grants

# One guest with a disk from each of FLAVOURS.
bench_up() {
  mkdir -p /srv/images
  mount -t tmpfs tmpfs /srv/images
  # QEMU's CPU promises no invariant TSC, so Xen would emulate every rdtsc of the guest: a third of all instructions at
  # depth 1, which real machines do not execute. TSC=default leaves it so.
  create guest pv /domains/guest.cpio 192 "extra='console=hvc0 loglevel=1'" "tsc_mode='${TSC:-native}'" || failed "no guest"
  POLL=1 LOOK_MS=500 start guest || failed "the guest did not start"
  story "a guest is up"
  for flavour in $FLAVOURS; do
    case $flavour in
      qcow2 | qdisk-qcow2) cp /scenario/qcow2.full "/srv/images/$flavour.img" ;;
      vhd) cp /scenario/vhd.full "/srv/images/$flavour.img" ;;
      *) vbdd-guest pattern 5 $SIZE >"/srv/images/$flavour.img" ;;
    esac
    case $flavour in
      qdisk-qcow2) POLL=1 backend_up qdisk dom0 ;;
      persistent | qcow2 | vhd) pidof vbdd >/dev/null || POLL=1 backend_up vbdd3 dom0 ;;
      *) POLL=1 backend_up "$flavour" dom0 ;;
    esac || failed "$flavour did not start"
    plug_flavour "$flavour" || failed "attaching $flavour"
    POLL=1 connected guest "$(disk_of "$flavour")" || failed "$flavour did not connect"
    story "$flavour is connected"
  done
}
