# What scenarios are written with. Sourced by busybox sh in dom0. The host understands lines that begin with "@".

LOGS=/var/log/xen/console
TIMEOUT=${TIMEOUT:-120}     # seconds that any single step may take
POLL=${POLL:-0.2}           # seconds between two looks; long in the benchmark, where every look would be measured
LOOK_MS=${LOOK_MS:-30}      # the same for looks at a guest's console, which cost less

story() { echo "@say $*"; }
data() { echo "@data $*"; }
warn() { echo "@warn $*"; }

finish() {
  sync
  echo "@end $1"
  sleep 0.2
  poweroff -f
  sleep 60
}

start_xen() {
  mkdir -p /run/xen /run/xenstored /run/lock /var/lib/xen "$LOGS"
  load xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs
  mount -t xenfs xenfs /proc/xen
  load loop nvme crc32c_generic ext4
  xenstored --pid-file /run/xen/xenstored.pid
  wait_for xenstore-exists /tool/xenstored || return 1
  xen-init-dom0 >/dev/null || return 1
  xenconsoled --log=guest --log-dir="$LOGS"
}

# Waiting must not fork: a fork is what an emulated machine does worst, and dom0 shares the only CPU with those that it
# waits for. "read" with a timeout on a pipe that nobody writes to is a sleep without one.
mkfifo /run/never
exec 8<>/run/never
doze() { read -t "$1" -u 8 never; }

# Sets NOW to the seconds since the start.
now() { read -r NOW REST </proc/uptime; NOW=${NOW%.*}; }

# wait_for COMMAND...: until it succeeds; fails after $TIMEOUT seconds.
wait_for() {
  local end
  now
  end=$((NOW + TIMEOUT))
  until "$@" >/dev/null 2>&1; do
    now
    [ "$NOW" -lt $end ] || return 1
    doze "$POLL"
  done
  # The loop's own status is that of doze, which is a timeout.
  return 0
}

# ------------------------------------------------------------------------------------------------------ domains

# create NAME KIND RAMDISK MEMORY [OPTION LINE]...: creates a domain, paused. KIND: pv, pvh, grub, pvhgrub. VCPUS: how many.
create() {
  local name=$1 kind=$2 ramdisk=$3 memory=$4 config=/run/$1.cfg line
  shift 4
  : >"$LOGS/guest-$name.log"
  {
    echo "name='$name'"
    echo "memory=$memory"
    echo "vcpus=${VCPUS:-1}"
    echo "on_crash='preserve'"
    case $kind in
      grub) echo "type='pv'"; echo "kernel='/usr/lib/grub-xen/grub-x86_64-xen.bin'" ;;
      pvhgrub) echo "type='pvh'"; echo "kernel='/usr/lib/grub-xen/grub-i386-xen_pvh.bin'" ;;
      *) echo "type='$kind'"; echo "kernel='/domains/vmlinux'"; echo "ramdisk='$ramdisk'" ;;
    esac
    # An intercepted RDTSCP kills PVH guests under QEMU; native TSC avoids the interception.
    case $kind in pvh*) echo "tsc_mode='native'" ;; esac
    for line in "$@"; do echo "$line"; done
  } >"$config"
  xl create -p -q "$config" >"/run/$name.xl" 2>&1 || { warn "xl create $name: $(tail -2 "/run/$name.xl" | tr '\n' ' ')"; return 1; }
  adopt "$name"
}

# adopt NAME: learns a domain's number and its console, which a restored domain has anew.
adopt() {
  local name=$1
  xl domid "$name" >"/run/$name.domid" || return 1
  xenstore-read "/local/domain/$(domid "$name")/console/tty" >"/run/$name.tty" 2>/dev/null ||
    { wait_for xenstore-exists "/local/domain/$(domid "$name")/console/tty" &&
      xenstore-read "/local/domain/$(domid "$name")/console/tty" >"/run/$name.tty"; }
}

# domid NAME: dom0 is 0.
domid() {
  local id=0
  [ "$1" = dom0 ] || read -r id <"/run/$1.domid"
  echo "$id"
}

# start NAME: lets a created domain run, and waits for its agent.
start() {
  xl unpause "$1" 2>/dev/null; wait_for grep -q "agent ready" "$LOGS/guest-$1.log" ||
    { warn "$1 does not answer on its console"; tail -5 "$LOGS/guest-$1.log"; return 1; }
}

guest() { create "$1" "${2:-pv}" /domains/guest.cpio "${3:-160}" "extra='console=hvc0 loglevel=1'"; }

storage_domain() {
  create storage pv /domains/storage.cpio 192 "driver_domain=1" "extra='console=hvc0 loglevel=3 vbdd.storage=$1'"
}

# on NAME COMMAND: runs COMMAND (one line) in the domain NAME; its output and status are ours. dom0 needs no agent.
on() {
  local name=$1 tty status
  shift
  [ "$name" = dom0 ] && { sh -c "$*"; return; }
  read -r tty <"/run/$name.tty" || { warn "there is no domain $name"; return 125; }
  vbdd-guest ask "$tty" "$LOGS/guest-$name.log" "$TIMEOUT" "$LOOK_MS" "$*"
  status=$?
  [ $status != 124 ] || warn "no answer from $name within $TIMEOUT s to: $*"
  return $status
}

destroy() { xl destroy "$1" 2>/dev/null; rm -f "/run/$1.domid" "/run/$1.tty"; }

halt() {
  echo "q0 poweroff -f" >"$(cat "/run/$1.tty")"
  wait_for gone "$1" || { warn "$1 does not power off"; return 1; }
  rm -f "/run/$1.domid" "/run/$1.tty"
}

gone() { ! xl domid "$1"; }

# ------------------------------------------------------------------------------------------------------ disks

# devid xvdX: the number in xenstore.
devid() {
  local letters=abcdefghijklmnop before
  before=${letters%%"${1#xvd}"*}
  echo $((51712 + 16 * ${#before}))
}

back() { echo "/local/domain/$(domid "$2")/backend/$1/$(domid "$3")/$(devid "$4")"; }
front() { echo "/local/domain/$(domid "$1")/device/vbd/$(devid "$2")"; }

# attach GUEST DISK BACKEND KIND MODE PARAMS [KEY VALUE]...: makes both ends in xenstore, as a toolstack would: first the
# two directories with their permissions, which children inherit, then every key of both ends in one transaction.
attach() {
  local guest=$1 disk=$2 backend=$3 kind=$4 mode=$5 params=$6 g b be fe key
  shift 6
  g=$(domid "$guest") b=$(domid "$backend") be=$(back "$kind" "$backend" "$guest" "$disk") fe=$(front "$guest" "$disk")
  xenstore-write "$be" "" "$fe" "" && xenstore-chmod "$be" "n$b" "r$g" && xenstore-chmod "$fe" "n$g" "r$b" || return 1
  for key in "$@"; do
    shift
    case $key in =*) set -- "$@" "${key#=}" ;; *) set -- "$@" "$be/$key" ;; esac
  done
  xenstore-write \
    "$be/frontend" "$fe" "$be/frontend-id" "$g" "$be/online" 1 "$be/removable" 0 "$be/bootable" 1 \
    "$be/dev" "$disk" "$be/type" phy "$be/mode" "$mode" "$be/device-type" disk "$be/params" "$params" "$@" \
    "$be/state" 1 \
    "$fe/backend" "$be" "$fe/backend-id" "$b" "$fe/virtual-device" "$(devid "$disk")" "$fe/device-type" disk \
    "$fe/state" 1
}

# plug GUEST DISK FLAVOUR BACKEND MODE FILE: a disk by whichever backend. FLAVOUR: vbdd, vbdd3 (the same under the kind
# vbd3, for where blkback owns vbd), blkback, qdisk.
plug() {
  local guest=$1 disk=$2 flavour=$3 backend=$4 mode=$5 file=$6 device
  echo "$flavour $backend $file" >"/run/plug.$guest.$disk"
  case $flavour in
    vbdd) attach "$guest" "$disk" "$backend" vbd "$mode" "$file" ;;
    vbdd3) attach "$guest" "$disk" "$backend" vbd3 "$mode" "aio:$file" ;;
    qdisk) attach "$guest" "$disk" "$backend" qdisk "$mode" "aio:$file" && qdisk_serve "$guest" ;;
    blkback)
      case $file in
        /dev/*) device=$file ;;
        *) device=$(on "$backend" "losetup -f") && on "$backend" "losetup $([ "$mode" = r ] && echo -r) $device $file" ;;
      esac || return 1
      attach "$guest" "$disk" "$backend" vbd "$mode" "$device" \
        physical-device "=$(on "$backend" "stat -c %t:%T $device")" hotplug-status =connected ;;
  esac
}

kind_of() { case $1 in vbdd | blkback) echo vbd ;; vbdd3) echo vbd3 ;; qdisk) echo qdisk ;; esac; }

# One QEMU serves all qdisk disks of one guest.
qdisk_serve() {
  local id
  id=$(domid "$1")
  [ -e "/run/qdisk.$id" ] && kill -0 "$(cat "/run/qdisk.$id")" 2>/dev/null && return
  xenstore-write "/local/domain/0/device-model/$id/state" ""
  LD_LIBRARY_PATH=/usr/lib /usr/libexec/xen-qemu-system-i386 -xen-domid "$id" -xen-attach -name "$1" \
    -nodefaults -no-user-config -nographic -machine xenpv -m 1 -monitor none -serial none >"/run/qdisk.$id.log" 2>&1 &
  echo $! >"/run/qdisk.$id"
}

be_of() {
  local flavour backend file
  read -r flavour backend file <"/run/plug.$1.$2"
  back "$(kind_of "$flavour")" "$backend" "$1" "$2"
}

state_is() { [ "$(xenstore-read "$1/state" 2>/dev/null)" = "$2" ]; }
absent() { ! xenstore-exists "$1"; }

connected() {
  wait_for state_is "$(be_of "$1" "$2")" 4 && wait_for state_is "$(front "$1" "$2")" 4 ||
    { warn "$2 of $1 did not connect"; xenstore-ls "$(be_of "$1" "$2")"; xenstore-ls "$(front "$1" "$2")"; return 1; }
}

# unplug GUEST DISK: the toolstack's polite way. Prints how the backend's directory went.
unplug() {
  local flavour backend file be fe
  read -r flavour backend file <"/run/plug.$1.$2"
  be=$(be_of "$1" "$2") fe=$(front "$1" "$2")
  xenstore-write "$be/online" 0 "$be/state" 5
  wait_for closed_or_gone "$be" || { warn "the backend of $2 did not reach state 6"; xenstore-ls "$be"; return 1; }
  if [ "$flavour" = qdisk ] || { [ "$backend" != dom0 ] && [ "$flavour" = vbdd ]; }; then
    # In a driver domain the backend removes its directory itself, and the toolstack waits 10 s for that. QEMU does so
    # everywhere.
    TIMEOUT=10 wait_for absent "$be" || { warn "$be is still there 10 s after state 6"; return 1; }
  else
    state_is "$be" 6 || { warn "the backend removed a directory that was dom0's to remove"; return 1; }
    xenstore-rm "$be"
  fi
  xenstore-rm "$fe" 2>/dev/null
  release "$flavour" "$backend" "$file"
  rm -f "/run/plug.$1.$2"
}

closed_or_gone() { state_is "$1" 6 || absent "$1"; }

# Gives a loop device back.
release() {
  case $1:$3 in
    blkback:/dev/*) ;;
    blkback:*) on "$2" "losetup -a | sed -n 's|^\(/dev/loop[0-9]*\): .* $3\$|\1|p' | xargs -n1 losetup -d" ;;
  esac
}

# ------------------------------------------------------------------------------------------------------ backends

# backend_up FLAVOUR DOMAIN: makes the domain ready to serve disks. DOMAIN: dom0 or storage, which must run already.
backend_up() {
  case $1:$2 in
    blkback:dom0) load loop xen-blkback ;;
    blkback:*) on "$2" "insmod /lib/vbdd/peer/loop.ko && insmod /lib/vbdd/peer/xen-blkback.ko" ;;
    qdisk:dom0) ;;
    vbdd:dom0) vbdd_start dom0 ;;
    vbdd3:dom0) VBDD_KIND=vbd3 vbdd_start dom0 ;;
    vbdd:*) wait_for vbdd_runs "$2" ;;
    *) warn "no backend $1 in $2"; return 1 ;;
  esac
}

# In dom0 a shell waits for vbdd, so that its exit status is known to every later step.
vbdd_start() {
  if [ "$1" = dom0 ]; then
    mkdir -p /srv/images
    rm -f /run/vbdd.status /run/vbdd.pid
    (
      sh -c 'echo $$ >/run/vbdd.pid; exec /usr/sbin/vbdd serve "$@"' vbdd \
        --kind "${VBDD_KIND:-vbd}" --root /srv/images $VBDD_OPTIONS >>/run/vbdd.log 2>&1 </dev/null
      echo $? >/run/vbdd.status
    ) &
  else
    on "$1" "rm -f /run/vbdd.hold /run/vbdd.status"
  fi
  wait_for vbdd_runs "$1"
}

vbdd_runs() { on "$1" "test ! -e /run/vbdd.status && pidof vbdd"; }

# vbdd_stop DOMAIN: SIGTERM, waits for the end, and wants exit status 0.
vbdd_stop() {
  on "$1" "touch /run/vbdd.hold; killall -TERM vbdd" || { warn "there was no vbdd to stop"; return 1; }
  wait_for on "$1" "test -s /run/vbdd.status" || { warn "vbdd did not end after SIGTERM"; return 1; }
  [ "$(on "$1" "cat /run/vbdd.status")" = 0 ] || { warn "vbdd ended with status $(on "$1" "cat /run/vbdd.status")"; return 1; }
}

# vbdd_kill DOMAIN: SIGKILL, and waits for the end.
vbdd_kill() {
  on "$1" "touch /run/vbdd.hold; killall -KILL vbdd" || { warn "there was no vbdd to kill"; return 1; }
  wait_for on "$1" "test -s /run/vbdd.status" || { warn "vbdd did not end after SIGKILL"; return 1; }
  [ "$(on "$1" "cat /run/vbdd.status")" = 137 ] || { warn "vbdd ended with status $(on "$1" "cat /run/vbdd.status")"; return 1; }
}

# What vbdd said: all of it.
vbdd_log() { [ "$1" = dom0 ] && cat /run/vbdd.log || tr -d '\r' <"$LOGS/guest-$1.log" | grep -vE '^c[0-9]+[|=]'; }

# storage_up DOMAIN: dom0's disk /dev/nvme0n1, an ext4 with the images, becomes /srv/images in DOMAIN.
storage_up() {
  wait_for test -b /dev/nvme0n1 || { warn "no NVMe disk"; return 1; }
  mkdir -p /srv/images
  if [ "$1" = dom0 ]; then
    mount -t ext4 /dev/nvme0n1 /srv/images
  else
    load xen-blkback
    storage_domain /dev/xvda && plug storage xvda blkback dom0 w /dev/nvme0n1 && start storage
  fi
}

storage_down() {
  if [ "$1" = dom0 ]; then
    [ ! -e /run/vbdd.pid ] || vbdd_stop dom0 || return 1
    umount /srv/images
  else
    on storage "/bin/sh /etc/vbdd/shutdown; ! grep /srv/images /proc/mounts" || { warn "/srv/images stays busy"; return 1; }
    local be
    be=$(be_of storage xvda)
    halt storage && xenstore-rm "$be"
  fi
}
