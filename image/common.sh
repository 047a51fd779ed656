# Shared by the host scripts of image/: places, messages, host tools. Sourced by bash scripts, never run.
set -euo pipefail

IMAGE_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPO_DIR=$(cd "$IMAGE_DIR/.." && pwd)
CACHE=${VBDD_CACHE:-$IMAGE_DIR/cache}
RUST_TARGET=x86_64-unknown-linux-gnu

# The program, and the Debian package that brings it.
HOST_TOOLS="qemu-system-x86_64:qemu-system-x86 cpio:cpio busybox:busybox-static xz:xz-utils mke2fs:e2fsprogs
            debugfs:e2fsprogs qemu-img:qemu-utils flock:util-linux timeout:coreutils setsid:util-linux zstd:zstd"

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 2; }

# Installs the missing host tools when that is possible, names them otherwise.
need_host_tools() {
  local pair packages="" library
  for pair in $HOST_TOOLS; do
    command -v "${pair%%:*}" >/dev/null || packages="$packages ${pair#*:}"
  done
  # A busybox that is not static cannot be an initramfs's /bin/sh; -L follows Debian's links.
  case " $packages " in *busybox-static*) ;; *)
    ldd "$(command -v busybox)" >/dev/null 2>&1 && packages="$packages busybox-static" ;;
  esac
  for library in libcrypto.so.3 libglib-2.0.so.0; do
    [ -e "/usr/lib/x86_64-linux-gnu/$library" ] || case $library in
      libcrypto*) packages="$packages libssl3" ;;
      libglib*) packages="$packages libglib2.0-0" ;;
    esac
  done
  [ -z "$packages" ] && return
  packages=$(tr ' ' '\n' <<<"$packages" | sort -u | tr '\n' ' ')
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    die "these Debian packages are needed on the host: $packages(as root this script installs them itself)"
  fi
  say "installing on the host: $packages"
  local had_utils
  had_utils=$(command -v qemu-img || true)
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-upgrade --no-install-recommends $packages >&2 ||
    { apt-get update -q >&2; DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-upgrade --no-install-recommends $packages >&2; }
  # A qemu-utils of another release (backports) cannot stay beside this QEMU, and apt removes it: its own comes instead.
  [ -z "$had_utils" ] || command -v qemu-img >/dev/null ||
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends qemu-utils >&2
}

# A hash of the contents of files and folders: names what was built from them.
hash_of() {
  { for path in "$@"; do
      if [ -d "$path" ]; then find "$path" -type f | LC_ALL=C sort | xargs sha256sum; else sha256sum "$path"; fi
    done; } | sed "s|$IMAGE_DIR||" | sha256sum | cut -c1-16
}

# with_lock NAME COMMAND...: one at a time, for what runs at the same time would otherwise build twice.
with_lock() {
  local name=$1
  shift
  mkdir -p "$CACHE"
  ( flock -w 900 9 || die "another run has held $CACHE/$name.lock for 15 minutes"
    "$@" ) 9>"$CACHE/$name.lock"
}

# archive FOLDER FILE: an uncompressed cpio archive, owned by root. Decompression costs seconds a boot under emulation.
archive() {
  (cd "$1" && find . -mindepth 1 | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) >"$2"
}
