//! A QCOW2 image with patches of any bytes in its metadata: opened, checked, repaired, mapped, and used.
#![no_main]

use formats::qcow2::check::{Fix, check};
use formats::qcow2::create::{Create, create};
use formats::qcow2::header::Header;
use formats::qcow2::map::map;
use formats::qcow2::{Options, Qcow2};
use formats::{Disk, Extent, Failure, Limits, Medium, Op, Pages, Payload, Request, WorkKind};
use libfuzzer_sys::fuzz_target;

/// Bytes that behave like a file of bounded length.
struct Bytes(Vec<u8>);

const LENGTH_MAX: u64 = 4 << 20;

impl Medium for Bytes {
    fn length_bytes(&mut self) -> u64 {
        self.0.len() as u64
    }
    fn read(&mut self, at: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        bytes.fill(0);
        let from = usize::try_from(at).map_or(self.0.len(), |at| at.min(self.0.len()));
        let length = bytes.len().min(self.0.len() - from);
        bytes[..length].copy_from_slice(&self.0[from..from + length]);
        Ok(())
    }
    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Failure> {
        let end = at.saturating_add(bytes.len() as u64);
        self.set_length(end.max(self.0.len() as u64))?;
        self.0[at as usize..end as usize].copy_from_slice(bytes);
        Ok(())
    }
    fn zero(&mut self, at: u64, length: u64) -> Result<(), Failure> {
        let end = at.saturating_add(length).min(self.0.len() as u64);
        if at < end {
            self.0[at as usize..end as usize].fill(0);
        }
        Ok(())
    }
    fn set_length(&mut self, length: u64) -> Result<(), Failure> {
        if length > LENGTH_MAX {
            return Err(Failure::NoSpace);
        }
        self.0.resize(length as usize, 0);
        Ok(())
    }
    fn sync(&mut self) -> Result<(), Failure> {
        Ok(())
    }
}

struct User {
    disk: Disk,
    pages: Pages,
    medium: Bytes,
}

impl User {
    fn settle(&mut self) {
        let mut left = 100_000;
        while let Some(work) = self.disk.next_work() {
            left -= 1;
            assert!(left > 0, "work without end");
            let length = work.length_bytes as usize;
            let (mut read, mut result) = (Vec::new(), Ok(()));
            match (work.kind, work.payload) {
                (WorkKind::Read, _) => {
                    read = vec![0; length];
                    result = self.medium.read(work.offset_bytes, &mut read);
                }
                (WorkKind::Write, Payload::Own) => {
                    let bytes = self.disk.bytes(work.id).to_vec();
                    result = self.medium.write(work.offset_bytes, &bytes);
                }
                (WorkKind::Write, _) => result = self.medium.write(work.offset_bytes, &vec![7; length]),
                (WorkKind::Zero, _) => result = self.medium.zero(work.offset_bytes, work.length_bytes),
                (WorkKind::SetLength, _) => result = self.medium.set_length(work.offset_bytes),
                _ => {}
            }
            self.disk.done(&mut self.pages, work.id, result, &read);
            while self.disk.next_outcome().is_some() {}
        }
        assert_eq!(self.disk.in_flight(), 0, "a request without an end");
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&kind, data)) = data.split_first() else { return };
    let mut what = Create::new(150 * 512);
    what.shape.cluster_bits = [9, 10, 12, 14][usize::from(kind & 3)];
    what.shape.version = if kind & 4 == 0 { 3 } else { 2 };
    what.shape.extended = kind & 8 != 0 && what.shape.cluster_bits == 14 && what.shape.version == 3;
    let mut medium = Bytes(Vec::new());
    create(&mut medium, &what).unwrap();
    // Room behind the tables, for entries that name it.
    let length = medium.length_bytes() + (64 << 10);
    medium.set_length(length).unwrap();
    let (patches, steps) = data.split_at(data.len() / 4 * 3);
    for patch in patches.chunks_exact(11) {
        let at = usize::from(u16::from_be_bytes([patch[0], patch[1]])) % medium.0.len();
        let count = (usize::from(patch[2] & 7) + 1).min(medium.0.len() - at);
        medium.0[at..at + count].copy_from_slice(&patch[3..3 + count]);
    }
    let _ = check(&mut Bytes(medium.0.clone()), Fix::All);
    if let Ok(header) = Header::read(&mut medium) {
        if header.size_bytes < 1 << 26 {
            let _ = map(&mut medium, &header, &mut |_, _| {});
        }
    }
    let options = Options { writable: true, reserve_bytes: 8192, ..Options::default() };
    let Ok((image, _)) = Qcow2::open(&mut medium, options) else { return };
    let disk = Disk::new(1, vec![(0, Box::new(image))], false, Limits::default());
    let mut user = User { disk, pages: Pages::of_pages(24), medium };
    let sectors = user.disk.geometry().sectors.clamp(1, 200);
    for step in steps.chunks_exact(2) {
        let op = [Op::Read, Op::Write, Op::Discard, Op::WriteZeroes, Op::Flush][usize::from(step[0]) % 5];
        let sector = u64::from(step[1]) % sectors;
        let extent = Extent { sector, sectors: (1 + u64::from(step[0] >> 3)).min(sectors - sector) };
        user.disk.submit(&mut user.pages, Request { token: 1, op, extent });
        if step[1] & 1 == 0 {
            user.settle();
        }
    }
    user.settle();
    user.disk.close(&mut user.pages);
    user.settle();
});
