//! Requests on a disk beside the oracle that knows what reads may find: whatever the format.

use std::collections::HashMap;

use formats::{Extent, Failure, Op, Request};

use super::driver::{Driver, Faults, NoFaults, SlowSync};
use super::medium::SECTOR;
use super::oracle::{Oracle, sector_of, value_of};

pub struct Requests<M> {
    pub driver: Driver<M>,
    pub oracle: Oracle,
    /// Under way: with the moment at which each began.
    pub requests: HashMap<u64, (Request, u64)>,
    next: u64,
    pub reads_checked: u64,
    /// Sectors that status said to be nowhere.
    pub zeroes_told: u64,
}

impl<M: SlowSync> Requests<M> {
    pub fn new(driver: Driver<M>, oracle: Oracle) -> Requests<M> {
        Requests { driver, oracle, requests: HashMap::new(), next: 1, reads_checked: 0, zeroes_told: 0 }
    }

    /// Submits a request; what it writes is told apart from all else.
    pub fn begin(&mut self, op: Op, extent: Extent) {
        let token = self.next;
        self.next += 1;
        let value = |sector: u64| (token << 32) | 0x8000_0000 | sector;
        let memory = match op {
            Op::Write => (extent.sector..extent.end()).flat_map(|sector| sector_of(value(sector))).collect(),
            Op::Read => vec![0xee; extent.sectors as usize * SECTOR],
            _ => Vec::new(),
        };
        let begun = match op {
            Op::Read | Op::Flush => self.oracle.tick(),
            _ => self.oracle.begins(extent, op, value),
        };
        let request = Request { token, op, extent };
        self.requests.insert(token, (request, begun));
        assert!(self.driver.submit(request, memory));
        self.settle_outcomes();
    }

    /// Does one piece of work.
    pub fn step(&mut self, faults: &mut dyn Faults) -> bool {
        let worked = self.driver.step(faults);
        self.settle_outcomes();
        worked
    }

    fn settle_outcomes(&mut self) {
        for outcome in std::mem::take(&mut self.driver.outcomes) {
            let (request, begun) = self.requests.remove(&outcome.token).unwrap();
            let memory = self.driver.memory.remove(&outcome.token).unwrap();
            let ok = outcome.result.is_ok();
            if let Err(Failure::Corrupt(what)) = outcome.result {
                panic!("{request:?}: {what}");
            }
            match request.op {
                Op::Read if ok => self.check_read(request.extent, &memory, begun),
                Op::Read => {}
                Op::Flush if ok => self.oracle.flushed(begun),
                Op::Flush => {}
                _ => self.oracle.ends(request.extent, begun, ok),
            }
        }
    }

    fn check_read(&mut self, extent: Extent, memory: &[u8], begun: u64) {
        for (sector, bytes) in (extent.sector..).zip(memory.chunks(SECTOR)) {
            let value = value_of(bytes);
            let fine = value.is_some_and(|value| self.oracle.reads(sector, value, begun));
            assert!(fine, "sector {sector} reads {value:x?}, of {}", self.oracle.describe(sector));
            self.reads_checked += 1;
        }
    }

    /// Waits for every request.
    pub fn drain(&mut self) {
        while self.step(&mut NoFaults) {}
        assert!(self.requests.is_empty(), "requests without end: {:?}", self.requests);
    }

    /// Reads the whole disk.
    pub fn read_all(&mut self) {
        let extent = Extent { sector: 0, sectors: self.oracle.sectors() };
        let begun = self.oracle.tick();
        let memory = vec![0xee; extent.sectors as usize * SECTOR];
        let (result, memory) = self.driver.run(Op::Read, extent, memory);
        result.unwrap();
        self.check_read(extent, &memory, begun);
        for (zero, bytes) in self.driver.status().into_iter().zip(memory.chunks(SECTOR)) {
            assert!(!zero || bytes.iter().all(|byte| *byte == 0), "a sector is said to be nowhere");
            self.zeroes_told += u64::from(zero);
        }
    }

    /// Has what is being changed written.
    pub fn close(&mut self) {
        self.driver.disk.close(&mut self.driver.pages);
        self.driver.take();
    }

    /// Writes that had begun and may be there in part.
    pub fn half_done(&self) -> Vec<(u64, Vec<u8>)> {
        let is_write = |work: &formats::Work| work.image == 0 && work.kind == formats::WorkKind::Write;
        let flying = self.driver.in_flight.iter().filter(|(work, _)| is_write(work));
        flying.map(|(work, _)| (work.offset_bytes, self.driver.data_of(work))).collect()
    }
}

/// A world in which a machine can die after every piece of work.
pub trait Mortal {
    type Medium: SlowSync;

    fn requests(&mut self) -> &mut Requests<Self::Medium>;
    /// Requests that are under way all the time.
    fn depth(&self) -> u64;
    /// Submits a random request.
    fn ask(&mut self);
    /// Crashes, and looks at what is left; `deep`, also repairs it and goes on with it.
    fn crash_and_look(&mut self, deep: bool);
    /// Whether what a crash in closing leaves is repaired, too, and gone on with: that takes its time.
    fn deep_while_closing(&self) -> bool {
        true
    }
    /// The last that happens before closing.
    fn before_closing(&mut self) {}
    /// What must be true of a closed image.
    fn look_closed(&mut self);

    /// Random requests, and so many crashes after each piece of work; closing, and crashes in that.
    fn sweep(&mut self, steps: u64, per_step: u64, faults: &mut dyn Faults) {
        for step in 0..steps {
            while (self.requests().requests.len() as u64) < self.depth() {
                self.ask();
            }
            self.requests().step(faults);
            for turn in 0..per_step {
                self.crash_and_look(turn == 0 && step % 64 == 5);
            }
        }
        self.requests().drain();
        self.requests().read_all();
        self.before_closing();
        self.requests().close();
        loop {
            for turn in 0..per_step {
                let deep = turn == 0 && self.deep_while_closing();
                self.crash_and_look(deep);
            }
            if !self.requests().driver.step(&mut NoFaults) {
                break;
            }
        }
        assert_eq!(self.requests().driver.disk.closed(), Some(Ok(())), "closing");
        self.look_closed();
        assert_eq!(self.requests().driver.disk.stalls, 0, "stalls");
    }
}
