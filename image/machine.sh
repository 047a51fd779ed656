# Runs the Xen machine. Sourced after common.sh, fetch.sh and build.sh.

# A folder of this run alone. Kept, and named, when the run fails.
new_work() {
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/vbdd-xen.XXXXXX")
  trap 'machine_cleanup' EXIT
  trap 'exit 130' INT TERM HUP
}

machine_cleanup() {
  local code=$?
  [ -z "${MACHINE_PID:-}" ] || kill -KILL -- "-$MACHINE_PID" 2>/dev/null || true
  if [ $code = 0 ] && [ -z "${VBDD_KEEP:-}" ]; then
    rm -rf "$WORK"
  else
    rm -f "$WORK"/*.cpio
    [ -e "$WORK/serial.log" ] && say "the machine's console is in $WORK/serial.log"
  fi
  exit $code
}

# machine TIMEOUT_SECONDS OVERLAY_FOLDER [ARCHIVE]...: boots Xen with dom0.cpio, the archives and the overlay as dom0's
# initramfs and passes each line that dom0 says to the function told_LINEKIND. Takes EXTRA_QEMU (array), DISKS (array),
# MEMORY. Returns what the scenario returned, 124 when time ran out, 125 when the machine ended without a word.
machine() {
  local limit=$1 overlay=$2 status=125 kind rest line
  shift 2
  archive "$overlay" "$WORK/overlay.cpio"
  cat "$BUILT/dom0.cpio" "$@" "$WORK/overlay.cpio" >"$WORK/dom0.cpio"
  local qemu=(qemu-system-x86_64 -accel tcg
    # SMAP makes this QEMU mishandle Xen's iret; XSAVE and AVX corrupt user state; an intercepted RDTSCP kills PVH guests.
    -cpu max,-smap,-rdtscp,-xsave,-avx,-avx2,-f16c,-fma
    -smp 1 -m "${MEMORY:-2048}" -nographic -no-reboot -nodefaults -net none -serial stdio -monitor none
    -kernel "$PACKAGES/xen.bin"
    -append "console=com1 com1=115200 dom0_mem=${DOM0_MEMORY:-768}M,max:${DOM0_MEMORY:-768}M dom0_max_vcpus=1 conring_size=256k loglvl=warning guest_loglvl=warning sched=credit ${XEN_OPTIONS:-}"
    -initrd "$PACKAGES/vmlinux console=hvc0 loglevel=3 ${KERNEL_OPTIONS:-},$WORK/dom0.cpio")
  local n=0 disk
  for disk in "${DISKS[@]}"; do
    qemu+=(-drive "if=none,id=d$n,file=$disk,format=raw,cache=unsafe" -device "nvme,drive=d$n,serial=disk$n")
    n=$((n + 1))
  done
  BOOT_START=$EPOCHREALTIME
  mkfifo "$WORK/console"
  # A session of its own, so that nothing of it can outlive us; timeout, so that it cannot outlive its welcome.
  setsid timeout -k 5 "$limit" "${qemu[@]}" "${EXTRA_QEMU[@]}" </dev/null >"$WORK/console" 2>"$WORK/qemu.log" &
  MACHINE_PID=$!
  : >"$WORK/serial.log"
  while IFS= read -r line; do
    line=${line//$'\r'/}
    printf '%s\n' "$line" >>"$WORK/serial.log"
    case $line in *@[a-z]*) ;; *) continue ;; esac
    line=@${line#*@}
    kind=${line%% *} rest=${line#"$kind"}
    rest=${rest# }
    case $kind in
      @say | @data | @warn | @ok | @fail | @skip) "told_${kind#@}" "$rest" ;;
      @end) status=$rest ;;
    esac
  done <"$WORK/console"
  wait "$MACHINE_PID" && n=0 || n=$?
  MACHINE_PID=""
  rm -f "$WORK/console"
  if [ $n = 124 ] || [ $n = 137 ]; then
    say "the machine did not end within $limit s and was stopped"
    [ "$status" = 125 ] && status=124
  fi
  if [ "$status" != 0 ]; then
    [ -s "$WORK/qemu.log" ] && tail -5 "$WORK/qemu.log" >&2
    say "---- the console's last 40 lines"
    tail -40 "$WORK/serial.log" >&2
    say "----"
  fi
  return "$status"
}

# Seconds since the machine was switched on, to a tenth.
elapsed() {
  local tenths=$(((${EPOCHREALTIME/./} - ${BOOT_START/./}) / 100000))
  printf '%3d.%d' $((tenths / 10)) $((tenths % 10))
}

told_say() { printf '%s s  %s\n' "$(elapsed)" "$1"; }
told_warn() { printf '%s s  warning: %s\n' "$(elapsed)" "$1"; }
told_data() { printf '%s\n' "$1" >>"$WORK/data"; }
told_ok() { printf 'ok    %s  (%s s)\n' "$1" "$(elapsed)"; }
told_fail() { printf 'FAIL  %s  (%s s)\n' "$1" "$(elapsed)"; }
told_skip() { printf 'skip  %s\n' "$1"; }

# overlay_domains OVERLAY [ARCHIVES OF THE STORAGE DOMAIN in STORAGE_ARCHIVES]: puts the kernel and the initramfs archives of the domains where dom0 looks for them, with the
# binaries under test and an agent on each console.
overlay_domains() {
  local overlay=$1 tools=$WORK/tools peer=$WORK/peer
  mkdir -p "$overlay/domains" "$overlay/scenario" "$tools/lib/vbdd" "$peer/lib/vbdd/peer"
  ln "$PACKAGES/vmlinux" "$overlay/domains/vmlinux" 2>/dev/null || cp "$PACKAGES/vmlinux" "$overlay/domains/vmlinux"
  touch "$tools/lib/vbdd/agent-wanted"
  install -D "$VBDD_GUEST" "$tools/usr/bin/vbdd-guest"
  install -D "$VBDD_GUEST" "$overlay/usr/bin/vbdd-guest"
  find "$PACKAGES/root/lib/modules" \( -name loop.ko -o -name xen-blkback.ko \) -exec cp {} "$peer/lib/vbdd/peer/" \;
  install -D "$REPO_DIR/scripts/block-vbdd" "$overlay/etc/xen/scripts/block-vbdd"
  install -D "$REPO_DIR/scripts/block-vbdd" "$peer/etc/xen/scripts/block-vbdd"
  local program
  for program in "${VBDD:-}:usr/sbin/vbdd" "${CONFORMANCE:-}:usr/bin/xenstore-conformance"; do
    [ -e "${program%%:*}" ] || continue
    install -D "${program%%:*}" "$peer/${program#*:}"
    install -D "${program%%:*}" "$overlay/${program#*:}"
  done
  archive "$tools" "$WORK/tools.cpio"
  archive "$peer" "$WORK/peer.cpio"
  cat "$BUILT/storage.cpio" ${STORAGE_ARCHIVES:-} "$WORK/tools.cpio" "$WORK/peer.cpio" >"$overlay/domains/storage.cpio"
  cat "$BUILT/guest.cpio" "$WORK/tools.cpio" >"$overlay/domains/guest.cpio"
}

xen_version() { local config=("$PACKAGES"/root/boot/xen-*.config); config=${config##*/xen-}; echo "${config%%-amd64*}"; }
