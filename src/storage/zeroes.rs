//! Ranges that are to read as zero.
//!
//! Short ones are written: a write of zeroes goes with the other transfers, where a call of the file system would wait for
//! all of them. Of longer ones the whole units of the file system are zeroed by calls that move no data, and what is ragged
//! is written, so that no half of a block is zeroed through the page cache beside a direct write of its other half.

use super::changes::{AT_ONCE_BYTES, Change, Order};
use super::linux::LinuxStorage;
use super::medium::Path;
use super::slots::Stage;
use super::{Identity, Io, IoKind, StorageError};
use crate::buffers::{SPAN_BYTES_MAX, Span};

/// Up to this many bytes are written, where the file does not live in memory: a cluster. A call costs a change of the file
/// system's journal, which the next flush has to write.
const WRITTEN_BYTES: u64 = 64 << 10;

/// The most that one call zeroes, in bytes: a call cannot be interrupted. A device may have to write it all.
const PART_BYTES: u64 = 256 << 20;
const DEVICE_PART_BYTES: u64 = 64 << 20;

/// The most that one write zeroes, in bytes: as much as there are zeroes in memory, and all that is zeroed at once.
const WRITE_BYTES: u64 = SPAN_BYTES_MAX as u64;
const _: () = assert!(WRITE_BYTES >= AT_ONCE_BYTES && WRITE_BYTES >= WRITTEN_BYTES);

/// How ranges of a file are zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// `FALLOC_FL_ZERO_RANGE`: the space stays.
    Range,
    /// `FALLOC_FL_PUNCH_HOLE`.
    Hole,
    /// `BLKZEROOUT`.
    Device,
    /// `NBD_CMD_WRITE_ZEROES`.
    Remote,
    /// By writing.
    Writing,
}

impl Way {
    /// What is tried first.
    pub(super) fn first(path: Path, identity: Identity) -> Way {
        match identity {
            Identity::Device { .. } => Way::Device,
            Identity::Remote { .. } => Way::Remote,
            Identity::File { .. } if path == Path::Memory => Way::Hole,
            Identity::File { .. } => Way::Range,
        }
    }

    /// What is tried where this is not known.
    fn next(self) -> Way {
        match self {
            Way::Range => Way::Hole,
            Way::Hole | Way::Device | Way::Remote | Way::Writing => Way::Writing,
        }
    }

    /// Whether an errno says that it is not known.
    fn is_unknown(self, errno: i32) -> bool {
        StorageError::Os(errno).is_unsupported()
            || (matches!(self, Way::Device | Way::Remote) && errno == libc::EINVAL)
    }
}

/// The next piece of a range, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Piece {
    Written(u64),
    Called(u64),
}

/// The next piece of `place..until`; `None` when nothing is left. `unit` is a power of two.
fn next_piece(place: u64, until: u64, unit: u64, way: Way) -> Option<Piece> {
    let left = until.saturating_sub(place);
    if left == 0 {
        return None;
    }
    let ragged = place % unit;
    let part = if way == Way::Device { DEVICE_PART_BYTES } else { PART_BYTES };
    Some(if way == Way::Writing {
        Piece::Written(left.min(WRITE_BYTES))
    } else if ragged > 0 {
        Piece::Written(left.min(unit - ragged).min(WRITE_BYTES))
    } else if left >= unit {
        Piece::Called((left - left % unit).min(part))
    } else {
        Piece::Written(left.min(WRITE_BYTES))
    })
}

impl LinuxStorage {
    fn zeroes(&self, length: u64) -> Span {
        u32::try_from(length).ok().and_then(|length| self.zeroes.part(0, length)).unwrap_or(Span::EMPTY)
    }

    /// A range of zeroes has been asked for.
    pub(super) fn queue_zero(&mut self, io: &Io, length: u64) {
        let Some(file) = self.files.at(io.file) else {
            return self.end(io.token, Err(StorageError::Os(libc::EBADF)));
        };
        if file.path == Path::Memory && length <= AT_ONCE_BYTES {
            let result = self.zero_now(io, length);
            return self.end(io.token, result);
        }
        let calls_cost = file.path != Path::Memory && file.zeroing != Way::Remote;
        if calls_cost && length <= WRITTEN_BYTES {
            let span = self.zeroes(length);
            return self.queue_transfer(Io { kind: IoKind::Write, span, ..*io });
        }
        let Some(number) = self.slots.take(*io) else {
            return self.end(io.token, Err(StorageError::Os(libc::ENOBUFS)));
        };
        file.in_flight += 1;
        let slot = self.slots.at_mut(number);
        (slot.stage, slot.place, slot.until) = (Stage::Zero, io.offset_bytes, io.offset_bytes + length);
        if let Some(hazards) = &mut file.hazards
            && !hazards.arrive(&mut self.slots, number)
        {
            return;
        }
        self.zero_next(number);
    }

    /// A short range of a file in memory.
    fn zero_now(&mut self, io: &Io, length: u64) -> Result<(), StorageError> {
        let Some(file) = self.files.at(io.file) else { return Err(StorageError::Os(libc::EBADF)) };
        if file.zeroing == Way::Hole {
            let (fd, offset) = (file.descriptor(false), io.offset_bytes);
            let order = Order { tag: 0, fd, change: Change::Hole, offset, length };
            loop {
                match order.now().result.checked_neg().unwrap_or(libc::EIO) {
                    libc::EINTR => {}
                    0 => {
                        self.maps.punched(&file.mapped, offset, length);
                        return Ok(());
                    }
                    errno if Way::Hole.is_unknown(errno) => break,
                    errno => return Err(StorageError::Os(errno)),
                }
            }
            file.zeroing = Way::Writing;
        }
        let span = self.zeroes(length);
        self.copy_now(&Io { kind: IoKind::Write, span, ..*io })
    }

    /// Has the next piece of a range zeroed, or ends the request.
    pub(super) fn zero_next(&mut self, number: u32) {
        let slot = *self.slots.at(number);
        let Some(file) = self.files.at(slot.io.file) else { return };
        match next_piece(slot.place, slot.until, file.unit_bytes.max(1).into(), file.zeroing) {
            None => self.finish(number, Ok(())),
            Some(Piece::Called(length)) => {
                self.slots.at_mut(number).piece = length;
                self.change_in_turn(number);
            }
            Some(Piece::Written(length)) => {
                self.slots.at_mut(number).piece = length;
                self.write_piece(number, length);
            }
        }
    }

    /// Writes a piece of a range by a request of its own. The range is in the list of writes under way, if there is one, so
    /// that its pieces are not.
    fn write_piece(&mut self, parent: u32, length: u64) {
        let slot = *self.slots.at(parent);
        let io = Io { kind: IoKind::Write, offset_bytes: slot.place, span: self.zeroes(length), ..slot.io };
        let Some(number) = self.slots.take(io) else {
            return self.finish(parent, Err(StorageError::Os(libc::ENOBUFS)));
        };
        self.slots.at_mut(number).parent = parent;
        if let Some(file) = self.files.at(io.file) {
            file.in_flight += 1;
        }
        self.continued = true;
        self.advance(number);
    }

    /// The call for the next piece of a range; never at once.
    pub(super) fn zero_order(&mut self, number: u32) -> (Order, bool) {
        let slot = *self.slots.at(number);
        let (offset, length) = (slot.place, slot.piece);
        let nothing = Order { tag: number, fd: -1, change: Change::Hole, offset, length };
        let Some(file) = self.files.at(slot.io.file) else { return (nothing, false) };
        self.maps.punched(&file.mapped, offset, length);
        let change = match file.zeroing {
            Way::Range => Change::ZeroRange,
            Way::Device => Change::ZeroDevice,
            Way::Hole | Way::Remote | Way::Writing => Change::Hole,
        };
        (Order { fd: file.descriptor(false), change, ..nothing }, false)
    }

    /// The call for a piece of a range has ended.
    pub(super) fn zero_landed(&mut self, number: u32, result: Result<u32, i32>) {
        let slot = *self.slots.at(number);
        let Some(file) = self.files.at(slot.io.file) else { return };
        // What was written meanwhile may have been marked as there, and be gone.
        self.maps.punched(&file.mapped, slot.place, slot.piece);
        match result {
            Err(errno) if file.zeroing != Way::Writing && file.zeroing.is_unknown(errno) => {
                file.zeroing = file.zeroing.next();
                self.zero_next(number);
            }
            other => self.piece_zeroed(number, other.map(|_| ()).map_err(StorageError::Os)),
        }
    }

    /// A piece of a range has been zeroed, or could not be.
    pub(super) fn piece_zeroed(&mut self, number: u32, result: Result<(), StorageError>) {
        if result.is_err() {
            return self.finish(number, result);
        }
        let slot = self.slots.at_mut(number);
        slot.place += slot.piece;
        self.zero_next(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_range_and_calls_whole_units() {
        let sectors = [0, 1, 7, 8, 9, 63, 127, 128, 129, 511, 512, 4095, 4096];
        for unit in [512, 4096, 65536, 2 << 20] {
            for way in [Way::Range, Way::Hole, Way::Device, Way::Writing] {
                for from in sectors {
                    for length in [1, 8, 120, 4096, 100_000, 2_000_000] {
                        let (mut place, until) = (from * 512, (from + length) * 512);
                        while let Some(piece) = next_piece(place, until, unit, way) {
                            let length = match piece {
                                Piece::Written(length) => {
                                    assert!(length <= WRITE_BYTES && (way == Way::Writing || length < unit));
                                    length
                                }
                                Piece::Called(length) => {
                                    assert!(way != Way::Writing && length <= PART_BYTES);
                                    assert_eq!((place % unit, length % unit), (0, 0));
                                    length
                                }
                            };
                            assert!(length > 0 && length.is_multiple_of(512) && place + length <= until);
                            place += length;
                        }
                        assert_eq!(place, until);
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_known_is_tried_by_other_ways_until_it_is_written() {
        for (way, tries) in [(Way::Range, 2), (Way::Hole, 1), (Way::Device, 1)] {
            let ways: Vec<Way> = std::iter::successors(Some(way), |way| Some(way.next())).take(4).collect();
            assert_eq!(ways.iter().position(|way| *way == Way::Writing), Some(tries));
        }
        assert!(Way::Device.is_unknown(libc::EINVAL) && !Way::Range.is_unknown(libc::EINVAL));
        assert!(Way::Range.is_unknown(libc::EOPNOTSUPP) && !Way::Hole.is_unknown(libc::ENOSPC));
    }
}
