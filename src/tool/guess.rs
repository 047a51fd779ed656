//! What a file looks like: for the hint of an error, and for nothing else. A guest writes its raw disk, so what lies there must never
//! decide how it is read.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

/// The name of what a file begins or ends like.
#[must_use]
pub(super) fn looks_like(file: &File) -> Option<&'static str> {
    let mut first = [0; 8];
    file.read_exact_at(&mut first, 0).ok()?;
    let known: [(&[u8], &str); 7] = [
        (b"QFI\xfb", "qcow2"),
        (b"conectix", "vhd"),
        (b"vhdxfile", "vhdx"),
        (b"KDMV", "vmdk"),
        (b"# Disk D", "vmdk"),
        (b"<<< ", "vdi"),
        (b"LUKS\xba\xbe", "luks"),
    ];
    if let Some((_, name)) = known.iter().find(|(magic, _)| first.starts_with(magic)) {
        return Some(name);
    }
    let length = file.metadata().ok()?.size();
    let mut last = [0; 8];
    file.read_exact_at(&mut last, length.checked_sub(512)?).ok()?;
    (&last == b"conectix").then_some("vhd")
}

/// What to write instead of a path alone.
#[must_use]
pub(super) fn hint_of_path(path: &str) -> String {
    let is_file = std::fs::metadata(path).is_ok_and(|found| found.is_file());
    let found = if is_file { File::open(path).ok().and_then(|file| looks_like(&file)) } else { None };
    match found {
        Some(name @ ("qcow2" | "vhd")) => {
            format!("it looks like {name}: if you know that it is, say -f {name}")
        }
        Some(name) => format!("it looks like {name}, which cannot be read: convert it with another tool"),
        None => String::from("say -f raw, -f qcow2 or -f vhd, or FORMAT:PATH"),
    }
}
