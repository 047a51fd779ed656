# Builds the initramfs archives. Sourced after common.sh and fetch.sh; BUILT is where they lie afterwards:
#   dom0.cpio     xenstored, xl and friends; the scenarios come in an overlay
#   qdisk.cpio    QEMU as a block backend, added to dom0's where a peer is wanted
#   devd.cpio     xl and Xen's hotplug scripts, added to the storage domain's where "xl devd" shall run beside vbdd
#   storage.cpio  the storage domain without vbdd itself (an overlay brings it): the appliance
#   guest.cpio    a Linux guest

BUILT=$CACHE/built-$(hash_of "$IMAGE_DIR/packages.txt" "$IMAGE_DIR/build.sh" "$IMAGE_DIR/domains" "$IMAGE_DIR/fetch.sh")

XEN_MODULES="xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs"
EXT4_MODULES="crc32c_generic ext4"

build_archives() {
  [ -e "$BUILT/done" ] || with_lock built build_locked
  touch "$BUILT"
}

build_locked() {
  [ -e "$BUILT/done" ] && return
  say "building the initramfs archives"
  local new=$BUILT.new
  rm -rf "$new"
  mkdir -p "$new"
  build_storage "$new/storage"
  build_guest "$new/guest"
  build_dom0 "$new/dom0"
  build_qdisk "$new/qdisk"
  build_devd "$new/devd"
  local name
  for name in dom0 qdisk devd storage guest; do
    archive "$new/$name" "$new/$name.cpio"
    rm -r "${new:?}/$name"
  done
  touch "$new/done"
  rm -rf "$BUILT"
  mv "$new" "$BUILT"
  # What older versions of these scripts built and nobody has used for a day.
  find "$CACHE" -maxdepth 1 -name 'built-*' ! -path "$BUILT" -mtime +1 -exec rm -rf {} +
}

# base FOLDER MODULE...: busybox, the folders every domain wants, and kernel modules with what they depend on.
base() {
  local root=$1
  shift
  mkdir -p "$root"/{bin,sbin,dev,proc,sys,run,tmp,mnt,etc,lib/vbdd,usr/bin,usr/sbin,usr/lib,usr/lib64,var/log}
  ln -s usr/lib64 "$root/lib64" 2>/dev/null || true
  cp "$(command -v busybox)" "$root/bin/busybox"
  "$root/bin/busybox" --list-full | while read -r applet; do
    mkdir -p "$root/$(dirname "$applet")"
    [ -e "$root/$applet" ] || ln -s /bin/busybox "$root/$applet"
  done
  cp "$IMAGE_DIR"/domains/common/* "$root/lib/vbdd/"
  ln -s ../run "$root/var/run"
  ln -s ../run/lock "$root/var/lock"
  modules "$root" "$@"
}

modules() {
  local root=$1 tree version name file
  shift
  version=$(ls "$PACKAGES/root/lib/modules")
  tree=lib/modules/$version
  for name in "$@"; do
    file=$(grep -E "/(${name//[-_]/[-_]})\.ko:" "$PACKAGES/root/$tree/modules.dep") || die "the kernel has no module $name"
    for file in ${file/:/}; do
      mkdir -p "$root/$tree/$(dirname "$file")"
      cp "$PACKAGES/root/$tree/$file" "$root/$tree/$file"
    done
  done
  cp "$PACKAGES/root/$tree"/modules.{builtin,builtin.modinfo,order} "$root/$tree/"
  "$PACKAGES/root/sbin/depmod" -b "$root" "$version"
}

# program FOLDER DESTINATION FILE: copies a program with the libraries that it needs, the unpacked packages' first.
program() {
  local root=$1 to=$2 file=$3 libraries library
  local path=$PACKAGES/root/usr/lib/x86_64-linux-gnu:$PACKAGES/root/lib/x86_64-linux-gnu
  mkdir -p "$root/$(dirname "$to")" "$root/usr/lib" "$root/usr/lib64"
  rm -f "$root/$to"
  cp "$file" "$root/$to"
  libraries=$(LD_LIBRARY_PATH=$path ldd "$file" 2>/dev/null) || return 0
  grep -q 'not found' <<<"$libraries" && die "$file needs libraries that this host has not:
$(grep 'not found' <<<"$libraries")"
  for library in $(awk '$2 == "=>" { print $3 }' <<<"$libraries"); do
    [ -e "$root/usr/lib/$(basename "$library")" ] || cp -L "$library" "$root/usr/lib/"
  done
  # glibc loads the second one by name when a thread is cancelled.
  cp -L /lib64/ld-linux-x86-64.so.2 "$root/usr/lib64/"
  cp -L /lib/x86_64-linux-gnu/libgcc_s.so.1 "$root/usr/lib/"
}

build_dom0() {
  local root=$1 bin=$PACKAGES/root/usr/lib/xen-4.17/bin tool
  base "$root" $XEN_MODULES $EXT4_MODULES loop nvme xen-blkback
  for tool in xl xenstored xenconsoled xen-init-dom0; do program "$root" "usr/sbin/$tool" "$bin/$tool"; done
  # Where libxl looks for it.
  program "$root" usr/lib/xen-4.17/bin/libxl-save-helper "$bin/libxl-save-helper"
  program "$root" usr/bin/lsevtchn "$bin/lsevtchn"
  xenstore_tools "$root"
  mkdir -p "$root/etc/xen/scripts" "$root/usr/lib/grub-xen"
  printf 'autoballoon="off"\nclaim_mode=0\n' >"$root/etc/xen/xl.conf"
  cp "$PACKAGES"/root/usr/lib/grub-xen/grub-{x86_64-xen,i386-xen_pvh}.bin "$root/usr/lib/grub-xen/"
  cp -r "$IMAGE_DIR"/domains/dom0/. "$root/"
  chmod 755 "$root/init"
}

xenstore_tools() {
  local tool
  for tool in read write rm chmod ls list exists watch; do
    program "$1" "usr/bin/xenstore-$tool" "$PACKAGES/root/usr/bin/xenstore-$tool"
  done
}

# A driver domain as distributions ship it: the scripts want bash and util-linux' flock.
build_devd() {
  local root=$1
  program "$root" usr/sbin/xl "$PACKAGES/root/usr/lib/xen-4.17/bin/xl"
  xenstore_tools "$root"
  program "$root" bin/bash /bin/bash
  program "$root" usr/bin/flock "$(command -v flock)"
  mkdir -p "$root/etc/xen"
  cp -r "$PACKAGES/root/etc/xen/scripts" "$root/etc/xen/"
}

build_qdisk() {
  local root=$1
  mkdir -p "$root/usr/share/qemu"
  program "$root" usr/libexec/xen-qemu-system-i386 "$PACKAGES/root/usr/libexec/xen-qemu-system-i386"
  cp -rL "$PACKAGES/root/usr/share/qemu/keymaps" "$root/usr/share/qemu/" 2>/dev/null || mkdir -p "$root/usr/share/qemu/keymaps"
  [ -e "$root/usr/share/qemu/keymaps/en-us" ] || cp /usr/share/qemu/keymaps/en-us "$root/usr/share/qemu/keymaps/"
}

build_storage() {
  local root=$1
  base "$root" $XEN_MODULES $EXT4_MODULES xen-blkfront
  cp -r "$IMAGE_DIR"/domains/storage/. "$root/"
  ln -sf /bin/busybox "$root/init"
}

build_guest() {
  local root=$1
  base "$root" $XEN_MODULES $EXT4_MODULES xen-blkfront
  program "$root" sbin/mke2fs /sbin/mke2fs
  ln -s mke2fs "$root/sbin/mkfs.ext4"
  cp -r "$IMAGE_DIR"/domains/guest/. "$root/"
  chmod 755 "$root/init"
}
