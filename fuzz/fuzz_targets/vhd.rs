//! A VHD with patches of any bytes in its metadata: opened, checked, repaired, mapped, grown, given a parent, and used.
#![no_main]

use std::collections::BTreeMap;

use formats::vhd::change::{grow, set_hidden, set_parent};
use formats::vhd::check::{check, enable, info};
use formats::vhd::create::{Create, Parent, create};
use formats::vhd::map::map;
use formats::vhd::{Kind, Vhd, read_headers};
use formats::{Disk, Extent, Facts, Failure, Limits, Medium, Op, Pages, Payload, Request, WorkKind};
use libfuzzer_sys::fuzz_target;

/// Sectors that behave like a file of bounded length: blocks are of 2 MiB, and hardly any of it is ever written.
#[derive(Clone, Default)]
struct Sectors {
    sectors: BTreeMap<u64, [u8; 512]>,
    length: u64,
}

const LENGTH_MAX: u64 = 1 << 30;

impl Medium for Sectors {
    fn length_bytes(&mut self) -> u64 {
        self.length
    }
    fn read(&mut self, at: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        bytes.fill(0);
        for (byte, at) in bytes.iter_mut().zip(at..self.length.max(at)) {
            *byte = self.sectors.get(&(at / 512)).map_or(0, |sector| sector[(at % 512) as usize]);
        }
        Ok(())
    }
    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Failure> {
        let end = at.saturating_add(bytes.len() as u64);
        self.set_length(end.max(self.length))?;
        for (byte, at) in bytes.iter().zip(at..) {
            self.sectors.entry(at / 512).or_insert([0; 512])[(at % 512) as usize] = *byte;
        }
        Ok(())
    }
    fn zero(&mut self, at: u64, length: u64) -> Result<(), Failure> {
        let range = at / 512..at.saturating_add(length).div_ceil(512).max(at / 512);
        let gone: Vec<u64> = self.sectors.range(range).map(|(at, _)| *at).collect();
        gone.iter().for_each(|at| {
            self.sectors.remove(at);
        });
        Ok(())
    }
    fn set_length(&mut self, length: u64) -> Result<(), Failure> {
        if length > LENGTH_MAX {
            return Err(Failure::NoSpace);
        }
        self.length = length;
        self.sectors.split_off(&length.div_ceil(512));
        Ok(())
    }
    fn sync(&mut self) -> Result<(), Failure> {
        Ok(())
    }
}

/// Puts a checksum right.
fn sum_up(medium: &mut Sectors, at: u64, length: usize, place: usize) {
    let mut bytes = vec![0; length];
    let _ = medium.read(at, &mut bytes);
    bytes[place..place + 4].fill(0);
    let sum = bytes.iter().fold(0u32, |sum, &byte| sum.wrapping_add(u32::from(byte)));
    let _ = medium.write(at + place as u64, &(!sum).to_be_bytes());
}

struct User {
    disk: Disk,
    pages: Pages,
    medium: Sectors,
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
    let parent = Parent { uuid: Some([5; 16]), timestamp: 0, path: "dir/base.vhd".into() };
    let differencing = kind & 1 != 0;
    let what = Create {
        kind: if differencing { Kind::Differencing } else { Kind::Dynamic },
        disk_bytes: 8 << 20,
        room_bytes: if kind & 2 != 0 { 300 << 20 } else { 0 },
        uuid: [9; 16],
        seconds: 1_000_000_000,
        parent: differencing.then(|| parent.clone()),
    };
    let mut medium = Sectors::default();
    create(&mut medium, &what).unwrap();
    let end = medium.length;
    if kind & 4 != 0 {
        // Room for entries that name blocks.
        medium.set_length(end + (5 << 20)).unwrap();
    }
    let (patches, steps) = data.split_at(data.len() / 4 * 3);
    for patch in patches.chunks_exact(11) {
        let at = u64::from(u16::from_be_bytes([patch[0], patch[1]])) % 12_000;
        // Near the end, too: there is a footer.
        let at = if patch[2] & 8 != 0 { end.saturating_sub(1 + at % 512) } else { at };
        let _ = medium.write(at, &patch[3..4 + usize::from(patch[2] & 7)]);
    }
    if kind & 8 == 0 {
        sum_up(&mut medium, 0, 512, 64);
        sum_up(&mut medium, 512, 1024, 36);
        let last = medium.length.saturating_sub(512);
        sum_up(&mut medium, last, 512, 64);
    }
    let _ = info(&mut medium.clone());
    let _ = enable(&mut medium.clone());
    let _ = set_hidden(&mut medium.clone(), true);
    let _ = set_parent(&mut medium.clone(), true, &parent);
    let _ = grow(&mut medium.clone(), true, 16 << 20);
    let _ = check(&mut medium.clone(), true, true);
    if let Ok(headers) = read_headers(&mut medium)
        && headers.disk_bytes < 1 << 30
    {
        let _ = map(&mut medium.clone(), &headers, &mut |_, _| {});
    }
    let facts = Facts { length_bytes: medium.length, grows: kind & 16 == 0, new_space_is_zero: kind & 32 == 0 };
    let (image, read_only) = match Vhd::open_to_write(&mut medium, facts) {
        Ok(image) => (image, false),
        Err(_) => match Vhd::open(&mut medium) {
            Ok(image) => (image, true),
            Err(_) => return,
        },
    };
    let disk = Disk::new(1, vec![(0, Box::new(image))], read_only, Limits::default());
    let mut user = User { disk, pages: Pages::of_pages(24), medium };
    let sectors = user.disk.geometry().sectors.clamp(1, 16_384);
    for step in steps.chunks_exact(2) {
        let op = [Op::Read, Op::Write, Op::Discard, Op::WriteZeroes, Op::Flush][usize::from(step[0]) % 5];
        let sector = u64::from(step[1]) * 64 % sectors;
        let most = if op == Op::Discard { 4096 } else { 1 + u64::from(step[0] >> 3) };
        let extent = Extent { sector, sectors: most.min(sectors - sector) };
        user.disk.submit(&mut user.pages, Request { token: 1, op, extent });
        if step[1] & 1 == 0 {
            user.settle();
        }
    }
    user.settle();
    user.disk.close(&mut user.pages);
    user.settle();
});
