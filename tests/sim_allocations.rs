//! The data path allocates nothing once its tables have their size.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod counting;
mod world;

use std::collections::VecDeque;
use std::time::Duration;

use rings::request::operation::{BARRIER, READ, WRITE};
use rings::{Abi, FrontRing, Offers, Segment, SharedPages};
use vbdd::buffers::Pool;
use vbdd::hypervisor::{CopySegment, DomainId, GrantRef, Hypervisor, HypervisorError, Port, RingMapping};
use vbdd::journal::{JournalStore, Memory};
use vbdd::keep::Left;
use vbdd::params::Image;
use vbdd::pump::{DiskPlan, Pump, RingPlan};
use vbdd::storage::{Access, Done, FileId, Io, Layer, OpenError, Opened, Storage};
use world::memory::GuestMemory;

/// One guest, all of whose grants are good, with a port that always has an event.
struct Bare(GuestMemory);

impl Hypervisor for Bare {
    fn map(&mut self, _: DomainId, grants: &[GrantRef]) -> Result<RingMapping, HypervisorError> {
        Ok(RingMapping { id: 0, address: self.0.page(0), length_bytes: grants.len() * 4096 })
    }
    fn unmap(&mut self, _: RingMapping) {}
    fn copy(&mut self, segments: &mut [CopySegment]) -> Result<(), HypervisorError> {
        segments.iter_mut().for_each(|segment| segment.copied = true);
        Ok(())
    }
    fn bind(&mut self, _: DomainId, _: u32) -> Result<Port, HypervisorError> {
        Ok(Port(1))
    }
    fn unbind(&mut self, _: Port) {}
    fn pending(&mut self, ports: &mut Vec<Port>) {
        ports.push(Port(1));
    }
    fn unmask(&mut self, _: &[Port]) {}
    fn notify(&mut self, _: Port) {}
}

/// Storage that is done at once, the last transfer first.
struct Inline {
    pool: Pool,
    running: VecDeque<u64>,
}

impl Storage for Inline {
    fn open_image(&mut self, _: u64, _: &Image, _: Access) {}
    fn set_left(&mut self, _: Left) {}
    fn layers(&mut self, _: FileId) -> Option<Vec<Layer>> {
        None
    }
    fn opened(&mut self) -> Option<(u64, Result<Opened, OpenError>)> {
        None
    }
    fn close(&mut self, _: FileId) {}
    fn buffers(&mut self) -> &mut Pool {
        &mut self.pool
    }
    fn queue(&mut self, io: Io) {
        self.running.push_back(io.token);
    }
    fn submit(&mut self) {}
    fn done(&mut self) -> Option<Done> {
        Some(Done { token: self.running.pop_back()?, result: Ok(()) })
    }
}

#[repr(align(4096))]
struct Room([u8; 4 * 4096]);

struct OneJournal(Box<Room>);

impl JournalStore for OneJournal {
    fn open(&mut self, _: &str, length_bytes: usize) -> Option<Memory> {
        // SAFETY: aligned, in a box that lives as long as the pump; nobody else touches it.
        (length_bytes <= 4 * 4096).then(|| unsafe { Memory::new(self.0.0.as_mut_ptr(), length_bytes) })
    }
    fn close(&mut self, _: &str, _: Memory, _: bool) {}
}

#[test]
fn no_request_allocates_at_steady_state() {
    let guest = GuestMemory::new(2);
    // SAFETY: the guest's memory lives in the hypervisor, which lives as long as the pump.
    let mut front = FrontRing::create(unsafe { SharedPages::new(guest.page(0), 1) }, Abi::X86_64);
    let storage = Inline { pool: Pool::new(4 << 20).unwrap(), running: VecDeque::with_capacity(64) };
    let mut pump = Pump::new(Bare(guest), storage, Box::new(OneJournal(Box::new(Room([0; 4 * 4096])))));
    let offers = Offers { indirect_segments: 256, barrier: true, discard: true };
    let disk = pump.add_disk(&DiskPlan { offers, ..DiskPlan::new(FileId(0), 1 << 20, false) });
    let plan = RingPlan {
        domain: 1,
        grants: vec![8],
        remote_port: 1,
        abi: Abi::X86_64,
        resume: false,
        journal: "1".to_owned(),
    };
    let queue = pump.attach(disk, &plan).unwrap();
    let segment = Segment { grant: 9, first: 0, last: 7 };
    let mut served = 0_u64;
    let mut first = 0;
    for round in 0..1000_u64 {
        if round == 100 {
            first = counting::allocations_here();
            served = 0;
        }
        for n in 0..32_u64 {
            match (round + n) % 10 {
                0 => front.write_flush(n),
                1 => front.write(3, n, n * 8, &[segment; 2], 2),
                // Descriptors that nobody copies say what the memory held before: zeroes, one sector each.
                8 => front.write_indirect((n % 2) as u8, n, n * 8, 256, &[9]),
                9 if n % 2 == 0 => front.write_discard(n, n * 8, 100, 0),
                9 => front.write(BARRIER, n, n * 8, &[segment; 2], 2),
                2..5 => front.write(WRITE, n, n * 8, &[segment; 11], 11),
                _ => front.write(READ, n, n * 8, &[segment; 11], 11),
            }
        }
        let _ = front.publish();
        pump.take_events();
        while pump.turn(Duration::from_micros(round)) {}
        while let Some(response) = front.take() {
            assert_eq!(response.status, 0);
            served += 1;
        }
    }
    let allocations = counting::allocations_here() - first;
    assert_eq!((served, pump.unanswered(queue)), (900 * 32, 0));
    assert_eq!(allocations, 0, "for {served} requests");
}
