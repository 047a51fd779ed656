//! The table of the contract names tests: each of them must exist.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;

/// Collects what follows `fn ` in Rust, and the functions of shell scripts.
fn collect(directory: &Path, names: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if !["target", "cache", ".git", "fuzz"].contains(&name.as_str()) {
                collect(&path, names);
            }
            continue;
        }
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        for line in text.lines() {
            let line = line.trim_start();
            let rust = line.strip_prefix("fn ").and_then(|rest| rest.split(['(', '<']).next());
            let shell = line.split_once("() {").map(|(name, _)| name);
            names.extend(rust.or(shell.filter(|_| name.ends_with(".sh"))).map(str::to_owned));
        }
    }
}

#[test]
fn every_test_that_the_contract_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut known = BTreeSet::new();
    for directory in ["src", "tests", "rings", "xenstore", "formats", "image"] {
        collect(&root.join(directory), &mut known);
    }
    let page = std::fs::read_to_string(root.join("docs/contract.md")).unwrap();
    let mut named = 0;
    for name in page.split('`').skip(1).step_by(2) {
        let is_name = name.len() > 8
            && name.contains('_')
            && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_' || b.is_ascii_digit());
        if is_name {
            named += 1;
            assert!(known.contains(name), "docs/contract.md names {name}, which is no test");
        }
    }
    assert!(named > 60, "only {named} names were found: the page or this test has changed its form");
}
