//! Compressed clusters. What comes out is exactly one cluster, or an error: the work is bounded by its size.

use alloc::vec::Vec;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use ruzstd::io::Read;

use crate::qcow2::header::Compression;

/// The largest window that a zstd frame may ask memory for: qemu writes frames no larger than a cluster.
const WINDOW_MAX: u64 = 8 << 20;

/// Unpacks one cluster of `length` bytes. Says whether that is what the packed bytes were.
#[must_use]
pub fn unpack(kind: Compression, packed: &[u8], unit: &mut Vec<u8>, length: usize) -> bool {
    unit.clear();
    unit.resize(length, 0);
    match kind {
        Compression::Zlib => inflate(packed, unit),
        Compression::Zstd => unzstd(packed, unit),
    }
}

/// Raw deflate; what follows the end is ignored, as is what would not fit.
fn inflate(packed: &[u8], unit: &mut [u8]) -> bool {
    let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (status, _, written) = decompress(&mut DecompressorOxide::new(), packed, unit, 0, flags);
    matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput) && written == unit.len()
}

/// Frame after frame until the cluster is full.
fn unzstd(packed: &[u8], unit: &mut [u8]) -> bool {
    let (mut source, mut filled) = (packed, 0);
    while filled < unit.len() {
        if !window_is_small(source) {
            return false;
        }
        let mut decoder = FrameDecoder::new();
        if decoder.init(&mut source).is_err() {
            return false;
        }
        loop {
            let step = BlockDecodingStrategy::UptoBlocks(1);
            let Ok(finished) = decoder.decode_blocks(&mut source, step) else { return false };
            while decoder.can_collect() > 0 && filled < unit.len() {
                let Some(rest) = unit.get_mut(filled..) else { return false };
                let Ok(count) = decoder.read(rest) else { return false };
                if count == 0 {
                    break;
                }
                filled += count;
            }
            if finished || filled == unit.len() {
                break;
            }
        }
    }
    true
}

/// Whether the frame at the start of `source` asks for a bearable window.
fn window_is_small(source: &[u8]) -> bool {
    if source.get(..4) != Some(&[0x28, 0xb5, 0x2f, 0xfd]) {
        return false;
    }
    let Some(&descriptor) = source.get(4) else { return false };
    let single_segment = descriptor & 0x20 != 0;
    if !single_segment {
        let Some(&window) = source.get(5) else { return false };
        let base = 1_u64 << (10 + u32::from(window >> 3));
        return base + base / 8 * u64::from(window & 7) <= WINDOW_MAX;
    }
    let dictionary = [0, 1, 2, 4].get(usize::from(descriptor & 3)).copied().unwrap_or(0);
    let width = [1, 2, 4, 8].get(usize::from(descriptor >> 6)).copied().unwrap_or(1);
    let Some(size) = source.get(5 + dictionary..5 + dictionary + width) else { return false };
    let size = size.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
    size <= WINDOW_MAX
}
