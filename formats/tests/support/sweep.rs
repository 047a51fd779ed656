//! The crash sweep: after every piece of work the machine may have died, with any subset of unsynced sectors on the medium.

use std::panic::{AssertUnwindSafe, catch_unwind};

use formats::qcow2::check::{Fix, check};
use formats::{Failure, Medium, Work, WorkKind};

use super::driver::Faults;
use super::medium::SimMedium;
use super::requests::{Mortal, Requests};
use super::rng::Rng;
use super::witness::{Found, Witness};
use super::world::{World, open};

/// I/O errors and full media, now and then.
pub struct Weather {
    pub one_in: u64,
    pub full: bool,
}

impl Faults for Weather {
    fn strike(&mut self, work: &Work, rng: &mut Rng) -> Option<Failure> {
        if work.kind == WorkKind::Sync || !rng.one_in(self.one_in) {
            return None;
        }
        let writes = !matches!(work.kind, WorkKind::Read);
        Some(if self.full && writes { Failure::NoSpace } else { Failure::Io(5) })
    }
}

impl World {
    /// What a crash now may leave, once.
    fn crashed(&mut self) -> Vec<u8> {
        let half_done = self.all.half_done();
        let mut rng = self.all.driver.rng.clone();
        self.all.driver.rng.next();
        self.leaf().crash(&mut rng, &half_done)
    }

    /// Crashes, and looks at what is left: nothing but leaks is wrong, and every sector holds what it may.
    fn look(&mut self, deep: bool) {
        self.crashes += 1;
        let bytes = self.crashed();
        let witness = Witness::new(&bytes);
        let leaks = witness.leaks();
        assert!(!witness.corrupt_bit, "marked as corrupt");
        assert!(
            witness.dirty || leaks == 0 || self.setup.shape.version == 2,
            "{leaks} leaks without the dirty bit"
        );
        for sector in 0..self.setup.sectors {
            let value = match witness.sector(sector) {
                Found::Value(value) => value,
                Found::Parent => self.below(sector),
                Found::Torn => panic!("sector {sector} is torn"),
            };
            let fine = self.all.oracle.allows(sector, value);
            assert!(fine, "sector {sector} holds {value:x}, of {}", self.all.oracle.describe(sector));
        }
        if deep {
            self.reopen(bytes);
        }
    }

    /// Repairs and opens what is left, goes on with it for a while, and closes it.
    fn reopen(&self, bytes: Vec<u8>) {
        let leaks = Witness::new(&bytes).leaks();
        let mut medium: SimMedium = self.leaf().with_bytes(bytes);
        let report = check(&mut medium, Fix::Leaks).unwrap();
        assert_eq!(
            (report.corruptions, report.leaks, report.leaks_repaired),
            (0, leaks, leaks),
            "{report:?}"
        );
        let mut driver = open(&self.setup, medium, &self.parents, 5, self.planted);
        let all = formats::Extent { sector: 0, sectors: self.setup.sectors };
        let memory = vec![0x11; self.setup.sectors as usize * 512];
        let (result, memory) = driver.run(formats::Op::Read, all, memory);
        result.unwrap();
        for (sector, bytes) in (0..).zip(memory.chunks(512)) {
            let value = super::oracle::value_of(bytes).expect("torn");
            assert!(self.all.oracle.allows(sector, value), "sector {sector} reads {value:x} after reopening");
        }
        driver.run(formats::Op::Write, all, memory).0.unwrap();
        driver.close().unwrap();
        let medium: &mut SimMedium = driver.media.get_mut(&0).unwrap();
        let mut bytes = vec![0; medium.length_bytes() as usize];
        medium.read(0, &mut bytes).unwrap();
        let witness = Witness::new(&bytes);
        assert_eq!((witness.leaks(), witness.dirty), (0, false), "after closing");
    }
}

impl Mortal for World {
    type Medium = SimMedium;

    fn requests(&mut self) -> &mut Requests<SimMedium> {
        &mut self.all
    }

    fn depth(&self) -> u64 {
        self.setup.depth
    }

    fn ask(&mut self) {
        World::ask(self);
    }

    fn crash_and_look(&mut self, deep: bool) {
        self.look(deep);
    }

    fn deep_while_closing(&self) -> bool {
        false
    }

    fn look_closed(&mut self) {
        self.look(true);
        let witness = Witness::new(&self.leaf().now);
        assert_eq!((witness.leaks(), witness.dirty), (0, false), "after closing");
    }
}

/// Runs something that may panic, quietly; says why it did.
pub fn failure_of(run: impl FnOnce()) -> Option<String> {
    let result = catch_unwind(AssertUnwindSafe(run));
    result.err().map(|cause| {
        let text = cause.downcast_ref::<String>().cloned();
        text.or_else(|| cause.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
    })
}
