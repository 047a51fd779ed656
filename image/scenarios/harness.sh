# What the test scenarios share. Sourced in dom0 by boot-*.sh, after /scenario/config has set FLAVOUR and DOMAIN.

IMAGES=/srv/images
PASSED=0
FAILED=0

# scenario TITLE FUNCTION: runs one test in a shell of its own. Status 77 means "does not apply to this backend".
scenario() {
  local title=$1 status
  shift
  echo "$title" | grep -qE -- "$ONLY" || return
  ( "$@" ) >/run/scenario.out 2>&1
  status=$?
  case $status in
    0) echo "@ok $DOMAIN: $title"; PASSED=$((PASSED + 1)) ;;
    77) echo "@skip $DOMAIN: $title: $(tail -1 /run/scenario.out)" ;;
    *)
      echo "@fail $DOMAIN: $title: $(grep '^reason:' /run/scenario.out | tail -1)"
      FAILED=$((FAILED + 1))
      echo "---- output of the failed scenario"; tail -40 /run/scenario.out | tr -cd '\n -~'
      echo "---- vbdd's last words"; only_vbdd_log
      echo "----"
      for name in $(cd /run && ls ./*.domid 2>/dev/null | sed 's|^\./||; s/\.domid$//'); do
        [ "$name" = storage ] || destroy "$name"
      done ;;
  esac
  sweep
}

# tell WORDS: a line of the whole run's log. told COMMAND...: likewise each line that it prints.
tell() { echo "@say $DOMAIN: $*" >/dev/hvc0; }
told() { "$@" 2>&1 | while IFS= read -r word; do tell "  $word"; done; }

only_vbdd_log() { case $FLAVOUR in vbdd*) vbdd_log "$DOMAIN" | tail -30 ;; esac; }
fail() { echo "reason: $*"; exit 1; }
skip() { echo "$*"; exit 77; }

only_vbdd() { case $FLAVOUR in vbdd*) ;; *) skip "needs vbdd" ;; esac; }

# Removes what a scenario left attached, and its images; the guest KEEP and images not called t-… stay for the next one.
sweep() {
  local file name disk be
  for file in /run/plug.*; do
    [ -e "$file" ] || continue
    name=${file#/run/plug.} disk=${name#*.} name=${name%%.*}
    [ "$name" = storage ] && continue
    [ "$name" = "${KEEP:-}" ] && [ -e "/run/$name.domid" ] && continue
    [ -e "/run/$name.domid" ] && force_unplug "$name" "$disk"
    rm -f "$file"
  done
  on "$DOMAIN" "rm -f $IMAGES/t-*"
}

# force_unplug GUEST DISK: what a toolstack does when it does not want to wait for the guest.
force_unplug() {
  local be fe
  be=$(be_of "$1" "$2") fe=$(front "$1" "$2")
  xenstore-exists "$be" || { xenstore-rm "$fe" 2>/dev/null; return 0; }
  xenstore-write "$be/online" 0 "$be/state" 5
  xenstore-rm "$fe"
  wait_for closed_or_gone "$be" || return 1
  [ "$DOMAIN" = dom0 ] && xenstore-rm "$be" 2>/dev/null
  TIMEOUT=12 wait_for absent "$be" || xenstore-rm "$be"
  return 0
}

# have_guest NAME [KIND]: boots it unless an earlier scenario left it running.
have_guest() {
  [ -e "/run/$1.domid" ] && ! gone "$1" && { on "$1" "dmesg -c >/dev/null"; return; }
  guest "$@" && start "$1" || fail "the guest $1 did not boot"
}

# image NAME MEGABYTES [PREFIX]: a fresh image PREFIX-NAME (t) for one scenario. Prints its path in the backend's domain.
image() {
  on "$DOMAIN" "rm -f $IMAGES/${3:-t}-$1; truncate -s ${2}M $IMAGES/${3:-t}-$1" || fail "cannot make the image $1"
  echo "$IMAGES/${3:-t}-$1"
}

# disk GUEST DISK MODE FILE: attaches and waits until the guest has it.
disk() {
  plug "$1" "$2" "$FLAVOUR" "$DOMAIN" "$3" "$4" || fail "attaching $2 to $1"
  connected "$1" "$2" || fail "$2 of $1 did not connect"
  wait_for on "$1" "test -b /dev/$2" || fail "$1 has no /dev/$2"
}

# verify_start GUEST DISK [PAUSE_MS]: verified writes in the background, until verify_stop.
verify_start() {
  on "$1" "rm -f /tmp/stop.$2; (vbdd-guest verify /dev/$2 64 /tmp/stop.$2 900 1 ${3:-0}; echo status=\$?) >/tmp/verify.$2 2>&1 &"
}

# verify_stop GUEST DISK: ends it and wants every block right.
verify_stop() {
  on "$1" "touch /tmp/stop.$2"
  wait_for on "$1" "grep -q status= /tmp/verify.$2" || fail "the verifier on $2 of $1 hangs: $(on "$1" "dmesg | tail -5")"
  on "$1" "cat /tmp/verify.$2" >"/run/verify.$1.$2"
  cat "/run/verify.$1.$2"
  grep -q "^status=0" "/run/verify.$1.$2" && grep -q "^errors=0" "/run/verify.$1.$2" ||
    fail "the verifier on $2 of $1: $(head -1 "/run/verify.$1.$2")"
}

# verified GUEST DISK SECONDS
verified() { verify_start "$1" "$2"; sleep "$3"; verify_stop "$1" "$2"; }

# Writes that the guest has seen completed.
writes() { on "$1" "awk '{ print \$5 }' /sys/block/$2/stat"; }
writes_beyond() { [ "$(writes "$1" "$2")" -gt "$3" ]; }

# quiet GUEST: its kernel has nothing to complain about.
quiet() {
  local complaints
  complaints=$(on "$1" "dmesg | grep -iE 'I/O error|blk_update_request|EXT4-fs (error|warning)|blkfront.*(error|fail|inconsist|bad)'")
  [ -z "$complaints" ] || fail "the kernel of $1 complains: $(echo "$complaints" | head -1)"
}

gracefully() { unplug "$1" "$2" || fail "unplugging $2 of $1"; }

# xen_section KEY: what Xen prints for a debug key.
xen_section() { xl dmesg -c >/dev/null; xl debug-keys "$1"; sleep 0.3; xl dmesg; }

# port_lines BACKEND_ID GUEST_ID: Xen's lines about interdomain event channels that the backend's domain holds to that guest
# (s=3 is "interdomain"; d is the domain at the other end). ports_to counts them.
port_lines() {
  xen_section e | awk -v own="domain $1:" -v far="d=$2" '
    /Event channel information/ { inside = index($0, own) > 0 }
    inside && / s=3 / { for (i = 1; i <= NF; i++) if ($i == far) print }'
}
ports_to() { port_lines "$@" | wc -l; }

# grant_lines GUEST_ID BACKEND_ID: Xen's lines about entries of the guest's grant table that the backend's domain has in
# use. grants_of counts them.
grant_lines() {
  xen_section g | awk -v own="d$1" -v by="$2" '
    /grant-table for/ { inside = 0; for (i = 1; i <= NF; i++) if ($i == own) inside = 1 }
    inside && /\[0x/ { line = $0; sub(/.*\] */, "", line); split(line, word, " "); if (word[1] == by) print }'
}
grants_of() { grant_lines "$@" | wc -l; }
