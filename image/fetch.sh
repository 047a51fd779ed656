# Fetches and unpacks the packages of packages.txt. Sourced after common.sh; PACKAGES is where they lie afterwards.

PACKAGES=$CACHE/packages-$(hash_of "$IMAGE_DIR/packages.txt")

fetch_packages() {
  [ -e "$PACKAGES/done" ] || with_lock packages fetch_locked
}

fetch_locked() {
  [ -e "$PACKAGES/done" ] && return
  command -v apt-get >/dev/null || die "the Xen machine is made of Debian packages, and there is no apt-get here"
  say "fetching the packages of the Xen machine (about 80 MB, once)"
  local new=$PACKAGES.new names kernel
  rm -rf "$new"
  mkdir -p "$new/deb" "$new/root"
  kernel=$(newest_kernel) || { apt-get update -q >&2; kernel=$(newest_kernel); } || die "apt knows no linux-image-amd64"
  names=$(sed 's/#.*//' "$IMAGE_DIR/packages.txt")
  (cd "$new/deb" && apt-get -q -o APT::Sandbox::User=root download $names "$kernel" >"$new/apt.log" 2>&1) ||
    { apt-get update -q >&2
      (cd "$new/deb" && apt-get -q -o APT::Sandbox::User=root download $names "$kernel" >"$new/apt.log" 2>&1); } ||
    { tail -5 "$new/apt.log" >&2; die "apt-get could not download the packages of image/packages.txt"; }
  local deb
  for deb in "$new"/deb/*.deb; do dpkg -x "$deb" "$new/root"; done
  gzip -dc "$new"/root/boot/xen-4.17-amd64.gz >"$new/xen.bin"
  extract_vmlinux "$new"/root/boot/vmlinuz-* >"$new/vmlinux"
  # Debian makes modules.dep when the package is installed; here it never is.
  ln -sf ../bin/kmod "$new/root/sbin/depmod"
  "$new/root/sbin/depmod" -b "$new/root" "$(ls "$new/root/lib/modules")" ||
    die "depmod (of the package kmod) does not run on this host"
  rm -r "$new/deb"
  date -u +%F >"$new/done"
  rm -rf "$PACKAGES"
  mv "$new" "$PACKAGES"
}

newest_kernel() { apt-cache depends linux-image-amd64 2>/dev/null | awk '/Depends: linux-image-/ { print $2; found = 1; exit } END { exit !found }'; }

# The ELF inside a bzImage: booting the bzImage itself costs seconds of xz under emulation, for every domain.
extract_vmlinux() {
  local start
  start=$(LC_ALL=C grep -abom1 -P '\xFD7zXZ\x00' "$1" | head -1 | cut -d: -f1)
  [ -n "$start" ] || die "$1: no xz payload found"
  tail -c +$((start + 1)) "$1" | xz -dc --single-stream 2>/dev/null || true
}
