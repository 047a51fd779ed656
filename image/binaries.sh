# Builds the static binaries that go into the domains. Sourced after common.sh. Sets VBDD and VBDD_GUEST.

# build_binaries BACKEND...: vbdd only where one of the backends is vbdd.
build_binaries() {
  local packages="-p guest-tools" out=$REPO_DIR/target/$RUST_TARGET/release
  command -v cargo >/dev/null || die "cargo is needed to build what runs in the machine"
  case " $* " in *vbdd*) [ -n "${VBDD:-}" ] || packages="$packages -p vbdd" ;; esac
  (cd "$REPO_DIR" && RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --quiet --target "$RUST_TARGET" $packages) ||
    die "the build failed"
  VBDD_GUEST=$out/vbdd-guest
  case $packages in *vbdd*) VBDD=$out/vbdd ;; esac
}

# Sets CONFORMANCE: the check of the xenstore client against the real xenstored. Unoptimised, as it need not be fast.
build_conformance() {
  CONFORMANCE=$REPO_DIR/target/$RUST_TARGET/debug/examples/xenstore_conformance
  (cd "$REPO_DIR" && CARGO_PROFILE_DEV_DEBUG=0 CARGO_PROFILE_DEV_STRIP=debuginfo RUSTFLAGS="-C target-feature=+crt-static" \
    cargo build --quiet --target "$RUST_TARGET" -p vbdd --example xenstore_conformance) ||
    die "the build of the xenstore conformance program failed"
}
