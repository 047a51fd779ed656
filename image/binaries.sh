# Builds the static binaries that go into the domains. Sourced after common.sh. Sets VBDD, VBDD_GUEST and
# CONFORMANCE (the check of the xenstore client against the real xenstored).

# build_binaries BACKEND...: vbdd only where one of the backends is vbdd.
build_binaries() {
  local packages="-p guest-tools" out=$REPO_DIR/target/$RUST_TARGET/release
  command -v cargo >/dev/null || die "cargo is needed to build what runs in the machine"
  case " $* " in *vbdd*) [ -n "${VBDD:-}" ] || packages="$packages -p vbdd" ;; esac
  (cd "$REPO_DIR" && RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --quiet --target "$RUST_TARGET" $packages) ||
    die "the build failed"
  VBDD_GUEST=$out/vbdd-guest
  if [ -e "$REPO_DIR/examples/xenstore_conformance.rs" ]; then
    (cd "$REPO_DIR" && RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --quiet --target "$RUST_TARGET" \
      -p vbdd --example xenstore_conformance) || die "the build of the xenstore conformance program failed"
    CONFORMANCE=$out/examples/xenstore_conformance
  fi
  case $packages in *vbdd*) VBDD=$out/vbdd ;; esac
}
