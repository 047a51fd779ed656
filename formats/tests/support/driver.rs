//! Drives a disk over media in memory: work is done in random order, and may fail.

use std::collections::HashMap;

use formats::{
    Disk, Extent, Failure, InPlace, Medium, Op, Outcome, Pages, Payload, Request, STATUS_BYTES, StatusRun,
    Work, WorkKind,
};

use super::medium::SimMedium;
use super::rng::Rng;

/// What a piece of work does before it is done.
pub trait Faults {
    fn strike(&mut self, work: &Work, rng: &mut Rng) -> Option<Failure>;
}

pub struct NoFaults;

impl Faults for NoFaults {
    fn strike(&mut self, _: &Work, _: &mut Rng) -> Option<Failure> {
        None
    }
}

pub struct Driver<M> {
    pub disk: Disk,
    pub pages: Pages,
    pub media: HashMap<u32, M>,
    pub memory: HashMap<u64, Vec<u8>>,
    pub in_flight: Vec<(Work, usize)>,
    pub outcomes: Vec<Outcome>,
    pub rng: Rng,
    pub done: u64,
    /// Transfers of guests' own memory take longest.
    pub lazy: bool,
    /// Requests whose bytes the driver itself moves.
    pub in_place: Vec<(Request, InPlace)>,
    /// How many there were.
    pub moved_in_place: u64,
}

/// What the driver needs besides [`Medium`]: syncs that take time.
pub trait SlowSync: Medium {
    fn begins(&mut self) -> usize {
        0
    }
    fn ends(&mut self, _: usize) -> Result<(), Failure> {
        self.sync()
    }
    fn punched(&mut self, at: u64, length: u64) {
        let _ = self.zero(at, length);
    }
}

impl SlowSync for SimMedium {
    fn begins(&mut self) -> usize {
        self.sync_begins()
    }
    fn ends(&mut self, covered: usize) -> Result<(), Failure> {
        self.sync_ends(covered);
        Ok(())
    }
    fn punched(&mut self, at: u64, length: u64) {
        self.punch(at, length);
    }
}

impl<M: SlowSync> Driver<M> {
    pub fn new(disk: Disk, pages: Pages, media: HashMap<u32, M>, seed: u64) -> Driver<M> {
        Driver {
            disk,
            pages,
            media,
            memory: HashMap::new(),
            in_flight: Vec::new(),
            outcomes: Vec::new(),
            rng: Rng::new(seed),
            done: 0,
            lazy: false,
            in_place: Vec::new(),
            moved_in_place: 0,
        }
    }

    pub fn submit(&mut self, request: Request, memory: Vec<u8>) -> bool {
        self.memory.insert(request.token, memory);
        if self.rng.one_in(3)
            && let Some(place) = self.disk.begin_in_place(&mut self.pages, request.op, request.extent)
        {
            self.moved_in_place += 1;
            self.in_place.push((request, place));
            self.take();
            return true;
        }
        let taken = self.disk.submit(&mut self.pages, request);
        self.take();
        taken
    }

    pub fn take(&mut self) {
        while let Some(work) = self.disk.next_work() {
            let covered = match (work.kind, self.media.get_mut(&work.image)) {
                (WorkKind::Sync, Some(medium)) => medium.begins(),
                _ => 0,
            };
            self.in_flight.push((work, covered));
        }
        while let Some(outcome) = self.disk.next_outcome() {
            self.outcomes.push(outcome);
        }
    }

    /// The bytes that a write is about.
    pub fn data_of(&self, work: &Work) -> Vec<u8> {
        match work.payload {
            Payload::Guest { token, offset_bytes } => {
                let memory = &self.memory[&token];
                memory[offset_bytes as usize..(offset_bytes + work.length_bytes) as usize].to_vec()
            }
            _ => {
                let bytes = self.disk.bytes(work.id).to_vec();
                assert_eq!(bytes.len() as u64, work.length_bytes, "{work:?}");
                bytes
            }
        }
    }

    /// Does one piece of work, any of those that are out. False when none is.
    pub fn step(&mut self, faults: &mut dyn Faults) -> bool {
        if !self.in_place.is_empty() && (self.in_flight.is_empty() || self.rng.one_in(4)) {
            let at = self.rng.below(self.in_place.len() as u64) as usize;
            let (request, place) = self.in_place.swap_remove(at);
            self.move_in_place(request, place);
            return true;
        }
        if self.in_flight.is_empty() {
            return false;
        }
        let mut at = self.rng.below(self.in_flight.len() as u64) as usize;
        if self.lazy && !self.rng.one_in(12) {
            let own = |(work, _): &(Work, usize)| !matches!(work.payload, Payload::Guest { .. });
            at = self.in_flight.iter().position(own).unwrap_or(at);
        }
        let (work, covered) = self.in_flight.swap_remove(at);
        self.done += 1;
        let result = match faults.strike(&work, &mut self.rng) {
            Some(failure) => Err(failure),
            None => Ok(()),
        };
        let (result, read) = match result {
            Ok(()) => self.carry_out(&work, covered),
            Err(failure) => {
                // A write that fails may be there in part.
                if work.kind == WorkKind::Write && self.rng.one_in(2) {
                    let data = self.data_of(&work);
                    let _ = self.media.get_mut(&work.image).unwrap().write(work.offset_bytes, &data);
                }
                (Err(failure), Vec::new())
            }
        };
        self.disk.done(&mut self.pages, work.id, result, &read);
        self.take();
        true
    }

    /// Moves the bytes of a request that lie in one piece.
    fn move_in_place(&mut self, request: Request, place: InPlace) {
        let length = request.extent.sectors as usize * 512;
        let memory = self.memory.get_mut(&request.token).unwrap();
        let medium = self.media.get_mut(&place.image).unwrap();
        let result = match request.op {
            Op::Read => medium.read(place.offset_bytes, &mut memory[..length]),
            _ => medium.write(place.offset_bytes, &memory[..length]),
        };
        self.done += 1;
        self.disk.done(&mut self.pages, place.id, Ok(()), &[]);
        self.outcomes.push(Outcome { token: request.token, result });
        self.take();
    }

    fn carry_out(&mut self, work: &Work, covered: usize) -> (Result<(), Failure>, Vec<u8>) {
        let length = work.length_bytes as usize;
        let mut read = Vec::new();
        let data = match work.kind {
            WorkKind::Write | WorkKind::CopyToGuest => match (work.kind, work.payload) {
                (WorkKind::CopyToGuest, _) => self.disk.bytes(work.id).to_vec(),
                _ => self.data_of(work),
            },
            _ => Vec::new(),
        };
        let medium = self.media.get_mut(&work.image).unwrap();
        let result = match work.kind {
            WorkKind::Read => {
                let mut bytes = vec![0; length];
                let result = medium.read(work.offset_bytes, &mut bytes);
                match work.payload {
                    Payload::Guest { token, offset_bytes } => {
                        let memory = self.memory.get_mut(&token).unwrap();
                        memory[offset_bytes as usize..offset_bytes as usize + length].copy_from_slice(&bytes);
                    }
                    _ => read = bytes,
                }
                result
            }
            WorkKind::Write => medium.write(work.offset_bytes, &data),
            WorkKind::Zero => medium.zero(work.offset_bytes, work.length_bytes),
            WorkKind::Punch => {
                medium.punched(work.offset_bytes, work.length_bytes);
                Ok(())
            }
            WorkKind::Yield => Ok(()),
            WorkKind::SetLength => medium.set_length(work.offset_bytes),
            WorkKind::Sync => medium.ends(covered),
            WorkKind::ZeroGuest | WorkKind::CopyToGuest => {
                let Payload::Guest { token, offset_bytes } = work.payload else { panic!("{work:?}") };
                let memory = self.memory.get_mut(&token).unwrap();
                let place = &mut memory[offset_bytes as usize..offset_bytes as usize + length];
                if work.kind == WorkKind::ZeroGuest {
                    place.fill(0);
                } else {
                    place.copy_from_slice(&data);
                }
                Ok(())
            }
        };
        (result, read)
    }

    /// Works until nothing is left to do.
    pub fn settle(&mut self) {
        while self.step(&mut NoFaults) {}
        assert_eq!(self.disk.in_flight(), 0, "requests without end");
        assert!(self.in_place.is_empty());
        assert_eq!(self.disk.stalls, 0);
    }

    /// One request, alone.
    pub fn run(&mut self, op: Op, extent: Extent, memory: Vec<u8>) -> (Result<(), Failure>, Vec<u8>) {
        let token = u64::MAX;
        assert!(self.submit(Request { token, op, extent }, memory));
        self.settle();
        let at = self.outcomes.iter().position(|outcome| outcome.token == token).unwrap();
        let outcome = self.outcomes.swap_remove(at);
        (outcome.result, self.memory.remove(&token).unwrap())
    }

    /// Of each sector, whether status says that there is nothing of it.
    pub fn status(&mut self) -> Vec<bool> {
        let (all, mut zero) = (self.disk.geometry().sectors, Vec::new());
        while (zero.len() as u64) < all {
            let sector = zero.len() as u64;
            let rest = Extent { sector, sectors: all - sector };
            let (result, memory) = self.run(Op::Status, rest, vec![0x5a; STATUS_BYTES]);
            result.unwrap();
            for run in StatusRun::all(&memory) {
                zero.extend(std::iter::repeat_n(run.zero, run.sectors as usize));
            }
            assert!(zero.len() as u64 > sector && zero.len() as u64 <= all, "{rest:?}: {} runs", zero.len());
        }
        zero
    }

    pub fn close(&mut self) -> Result<(), Failure> {
        self.disk.close(&mut self.pages);
        self.take();
        while self.disk.closed().is_none() {
            assert!(self.step(&mut NoFaults), "closing hangs");
        }
        while self.step(&mut NoFaults) {}
        self.disk.closed().unwrap()
    }
}
