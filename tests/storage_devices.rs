//! Block devices: loop devices with blocks of 512 and 4096 bytes. Needs root and `losetup`; says so where it has neither.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

mod storage_support;

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use storage_support::{Dice, Directory, Rig, on_disk, options};
use vbdd::buffers::Span;
use vbdd::storage::engine::EngineChoice;
use vbdd::storage::linux::Options;
use vbdd::storage::{Access, Identity, IoKind, Storage, StorageError};

/// A loop device, released at the end.
struct Loop(String);

impl Loop {
    fn new(directory: &Directory, block: u32) -> Option<Loop> {
        let path = directory.file(&format!("backing{block}"), &vec![0x33; 1 << 20]);
        let block = block.to_string();
        let made = Command::new("losetup").args(["-f", "--show", "-b", &block, &path]).output();
        match made {
            Ok(output) if output.status.success() => {
                Some(Loop(String::from_utf8(output.stdout).unwrap().trim().to_string()))
            }
            _ => {
                println!("SKIPPED: no loop device can be made here (root and losetup are needed)");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn blocks_of_4096_and_of_512() {
    for engine in [EngineChoice::Uring, EngineChoice::Aio] {
        for block in [512, 4096] {
            let directory = on_disk(&format!("loop-{engine:?}-{block}"));
            let Some(device) = Loop::new(&directory, block) else { return };
            let options = Options { roots: vec![PathBuf::from("/dev")], ..options(&directory.0, engine) };
            let mut rig = Rig::new(&options);
            let opened = rig.open(&device.0, Access::ReadWrite).unwrap();
            assert!(matches!(opened.identity, Identity::Device { .. }));
            assert_eq!((opened.size_bytes, opened.direct), (1 << 20, true));
            assert_eq!(opened.physical_block_bytes, block);
            let mut shadow = vec![0x33u8; 1 << 20];
            let mut dice = Dice(u64::from(block));
            for round in 0..400u32 {
                let from = usize::try_from(dice.below(2000)).unwrap() * 512;
                let length = usize::try_from(1 + dice.below(24)).unwrap() * 512;
                let bytes = vec![u8::try_from(round % 251).unwrap(); length];
                rig.write(opened.file, from as u64, &bytes).unwrap();
                shadow[from..from + length].copy_from_slice(&bytes);
                let from = usize::try_from(dice.below(2000)).unwrap() * 512;
                assert_eq!(rig.read(opened.file, from as u64, length).unwrap(), shadow[from..from + length]);
            }
            rig.flush(opened.file).unwrap();
            assert_eq!(rig.write(opened.file, 1 << 20, &[0; 512]), Err(StorageError::PastEnd));
            assert!(std::fs::read(&device.0).unwrap() == shadow);
            let unit = opened.discard.unwrap();
            let (from, to) = unit.within(512, 600 * 1024);
            assert!(from < to && unit.granularity_bytes >= block, "{unit:?}");
            let kind = IoKind::Discard { length_bytes: 600 * 1024 };
            let token = rig.queue(opened.file, kind, 512, Span::EMPTY);
            rig.finish(token).unwrap();
            // A loop device's discard is a hole in its file, which reads as zeroes.
            shadow[usize::try_from(from).unwrap()..usize::try_from(to).unwrap()].fill(0);
            assert!(rig.read(opened.file, 0, 1 << 20).unwrap() == shadow, "{unit:?}");
            rig.write(opened.file, 0, &vec![0x44; 1 << 20]).unwrap();
            shadow.fill(0x44);
            for (offset, length) in [(512, 512), (8192 + 512, 65536 + 1024), (200 << 10, 600 << 10)] {
                let kind = IoKind::Zero { length_bytes: length };
                let token = rig.queue(opened.file, kind, offset, Span::EMPTY);
                rig.finish(token).unwrap();
                shadow[usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap()].fill(0);
                assert!(rig.read(opened.file, 0, 1 << 20).unwrap() == shadow, "{offset} {length}");
            }
            // A device has the length that it has.
            for (length, result) in
                [(1 << 20, Ok(())), (1 << 19, Ok(())), ((1 << 20) + 512, Err(StorageError::Os(libc::ENOSPC)))]
            {
                let token = rig.queue(opened.file, IoKind::SetLength, length, Span::EMPTY);
                assert_eq!(rig.finish(token), result, "{length}");
            }
            assert!(rig.read(opened.file, 0, 1 << 20).unwrap() == shadow);
        }
    }
}

#[test]
fn a_device_in_use_is_refused() {
    let directory = on_disk("busy");
    let Some(device) = Loop::new(&directory, 512) else { return };
    let link = directory.path("by-name");
    symlink(&device.0, &link).unwrap();
    let roots = vec![PathBuf::from("/dev"), directory.0.clone()];
    let mut rig = Rig::new(&Options { roots, ..options(&directory.0, EngineChoice::Auto) });
    let first = rig.open(&link, Access::ReadWrite).unwrap();
    let error = rig.open(&device.0, Access::ReadWrite).unwrap_err();
    assert!(error.reason.contains("is in use on this host"), "{error}");
    // Readers do not claim it.
    let reader = rig.open(&device.0, Access::ReadOnly).unwrap();
    assert_eq!(reader.identity, first.identity);
    rig.storage.close(reader.file);
    // Handed on at once, as from a boot loader to a kernel.
    rig.storage.close(first.file);
    let again = rig.open(&device.0, Access::ReadWrite).unwrap();
    rig.storage.close(again.file);
    // Only the device's own directory is a root: the link is not enough.
    let mut narrow = Rig::new(&options(&directory.0, EngineChoice::Auto));
    let error = narrow.open(&link, Access::ReadOnly).unwrap_err();
    assert!(error.reason.contains("which lies below no --root"), "{error}");
}
