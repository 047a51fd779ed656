//! The process under test: a pump with its owner, called only when a reactor would call it, and mortal.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use rings::Offers;
use vbdd::params::Format;
use vbdd::pump::{DiskId, DiskPlan, Pump, PumpEvent, QueueId, RingPlan};
use vbdd::storage::{Access, Storage};

use super::hypervisor::SimXen;
use super::journals::SimJournals;
use super::storage::SimStorage;
use super::{Death, Shared};

/// One virtual block device: a disk and its rings.
#[derive(Clone, Debug)]
pub struct Vbd {
    pub image: usize,
    pub sectors: u64,
    pub read_only: bool,
    pub rings: Vec<RingPlan>,
}

/// A ring of a vbd, and how far it has come.
#[derive(Clone, Debug, Default)]
pub struct Line {
    pub vbd: usize,
    pub ring: usize,
    pub queue: Option<QueueId>,
    /// The ring was attached once: a successor resumes it.
    pub live: bool,
    pub drained: bool,
    /// The domain is to be forgotten, not served.
    pub gone: bool,
    pub misdeeds: u64,
    pub storage_failures: u64,
}

type SimPump = Pump<SimXen, SimStorage>;

/// The process, or the place where one may be started.
pub struct Backend {
    shared: Rc<Shared>,
    pub vbds: Vec<Vbd>,
    pub lines: Vec<Line>,
    pub pump: Option<SimPump>,
    pub disks: Vec<DiskId>,
    pub pool_bytes: usize,
    /// What every disk offers.
    pub offers: Offers,
    /// Every queue's answers come in the order of taking.
    pub in_order: bool,
    /// Pages that requests name stay mapped.
    pub persistent: bool,
    again: bool,
    /// Turns since the world began, and the most calls that one of them made.
    pub turns: u64,
    pub calls_per_turn_max: u64,
    /// Longest delay of an event channel that was ever asked for, in microseconds.
    pub delay_us_max: u64,
    pub deaths: u64,
    pub synced: Vec<(DiskId, bool)>,
}

impl Backend {
    pub fn new(shared: &Rc<Shared>, pool_bytes: usize) -> Backend {
        Backend {
            shared: shared.clone(),
            vbds: Vec::new(),
            lines: Vec::new(),
            pump: None,
            disks: Vec::new(),
            pool_bytes,
            offers: Offers { indirect_segments: 256, barrier: true, discard: true },
            in_order: false,
            persistent: false,
            again: false,
            turns: 0,
            calls_per_turn_max: 0,
            delay_us_max: 0,
            deaths: 0,
            synced: Vec::new(),
        }
    }

    pub fn add(&mut self, vbd: Vbd) {
        let at = self.vbds.len();
        self.lines.extend((0..vbd.rings.len()).map(|ring| Line { vbd: at, ring, ..Line::default() }));
        self.vbds.push(vbd);
    }

    /// Runs `what` as the process. False if it died of it.
    fn mortal(&mut self, what: impl FnOnce(&mut Backend)) -> bool {
        match catch_unwind(AssertUnwindSafe(|| what(self))) {
            Ok(()) => true,
            Err(payload) if payload.is::<Death>() => {
                self.die();
                false
            }
            Err(payload) => resume_unwind(payload),
        }
    }

    /// The process ends without any last word.
    pub fn die(&mut self) {
        self.deaths += 1;
        self.pump = None;
        self.disks.clear();
        self.again = false;
        for line in &mut self.lines {
            line.queue = None;
            line.drained = false;
        }
        let shared = self.shared.clone();
        shared.note("died", shared.calls.get(), 0);
        shared.countdown.set(None);
        shared.xen.borrow_mut().process_died();
        shared.media.borrow_mut().process_died(&mut || shared.chance(1, 2));
        shared.vault.borrow_mut().process_died();
    }

    /// Starts a process that takes over what is live and attaches what is new. False if it died of it.
    pub fn start(&mut self) -> bool {
        assert!(self.pump.is_none());
        let (shared, pool_bytes) = (self.shared.clone(), self.pool_bytes);
        let (offers, in_order) = (self.offers, self.in_order);
        self.mortal(|backend| {
            let storage = SimStorage::new(shared.clone(), pool_bytes);
            let journals = Box::new(SimJournals(shared.clone()));
            backend.pump = Some(Pump::new(SimXen(shared.clone()), storage, journals));
            for at in 0..backend.vbds.len() {
                let vbd = backend.vbds[at].clone();
                let pump = backend.pump.as_mut().unwrap();
                let image = shared.media.borrow().image(vbd.image);
                let (file, layers) = if image.format == Format::Raw {
                    (pump.storage.open_number(vbd.image), None)
                } else {
                    let access = if vbd.read_only { Access::ReadOnly } else { Access::ReadWrite };
                    pump.storage.open_image(0, &image, access);
                    let opened = pump.storage.opened().unwrap().1.unwrap();
                    (opened.file, pump.storage.layers(opened.file))
                };
                // What lies on no device of limited speed has one for itself.
                let device = shared.media.borrow().device_of.get(&vbd.image).copied();
                let device = device.unwrap_or(1000 + vbd.image) as u64;
                let plan = DiskPlan::new(file, vbd.sectors, vbd.read_only);
                let plan = DiskPlan { offers, in_order, device, ..plan };
                backend.disks.push(match layers {
                    Some(layers) => pump.add_chain(&plan, layers),
                    None => pump.add_disk(&plan),
                });
            }
            for at in 0..backend.lines.len() {
                backend.attach(at);
            }
        })
    }

    fn attach(&mut self, at: usize) {
        let line = &self.lines[at];
        if line.gone {
            return;
        }
        let vbd = &self.vbds[line.vbd];
        let plan = RingPlan { resume: line.live, ..vbd.rings[line.ring].clone() };
        let disk = self.disks[line.vbd];
        for _ in 0..4 {
            match self.pump.as_mut().unwrap().attach(disk, &plan) {
                Ok(queue) => {
                    self.lines[at].queue = Some(queue);
                    if self.persistent {
                        self.pump.as_mut().unwrap().keep_grants(queue);
                    }
                    self.lines[at].live = true;
                    self.again = true;
                    return;
                }
                Err(vbdd::pump::AttachError::Hypervisor(vbdd::hypervisor::HypervisorError::Failed(..))) => {}
                Err(error) => return self.shared.fail(format!("attach of {plan:?}: {error:?}")),
            }
        }
        self.shared.fail("attach failed again and again");
    }

    /// True when a reactor would call the pump.
    pub fn wants_turn(&self) -> bool {
        let Some(pump) = &self.pump else { return false };
        let now = self.shared.clock.now();
        self.again
            || self.shared.xen.borrow().readable()
            || self.shared.media.borrow().next_due().is_some_and(|due| due <= self.shared.clock.now_us())
            || pump.deadline().is_some_and(|deadline| deadline <= now)
    }

    /// When a reactor would call it though nothing happens until then.
    pub fn wakes_at(&self) -> Option<u64> {
        let deadline = self.pump.as_ref()?.deadline().map(|deadline| deadline.as_micros() as u64);
        deadline.into_iter().chain(self.shared.media.borrow().next_due()).min()
    }

    /// One pass of the reactor. False if the process died of it.
    pub fn turn(&mut self) -> bool {
        let shared = self.shared.clone();
        let before = shared.calls.get();
        self.turns += 1;
        let alive = self.mortal(|backend| {
            let Some(pump) = &mut backend.pump else { return };
            if shared.xen.borrow().readable() || shared.strikes(shared.faults.get().spurious) {
                pump.take_events();
            }
            backend.again = pump.turn(shared.clock.now());
        });
        self.calls_per_turn_max = self.calls_per_turn_max.max(shared.calls.get() - before);
        if alive {
            self.read_events();
        }
        alive
    }

    fn read_events(&mut self) {
        let Some(pump) = &mut self.pump else { return };
        if let Some(deadline) = pump.deadline() {
            let delay = deadline.saturating_sub(self.shared.clock.now()).as_micros() as u64;
            self.delay_us_max = self.delay_us_max.max(delay);
        }
        while let Some(event) = pump.event() {
            let of = match &event {
                PumpEvent::Drained(queue)
                | PumpEvent::Misbehaved(queue, _)
                | PumpEvent::StorageFailed(queue, _) => *queue,
                PumpEvent::Synced(disk, durable) => {
                    self.synced.push((*disk, *durable));
                    continue;
                }
                PumpEvent::Corrupt(_, corruption) => {
                    self.shared.fail(format!("a sound image is said to be damaged: {corruption}"));
                    continue;
                }
            };
            let Some(line) = self.lines.iter_mut().find(|line| line.queue == Some(of)) else {
                self.shared.fail(format!("{event:?} of a queue that is not attached"));
                continue;
            };
            match event {
                PumpEvent::Drained(_) if line.drained => self.shared.fail("drained twice"),
                PumpEvent::Drained(queue) => {
                    line.drained = true;
                    if pump.unanswered(queue) > 0 {
                        self.shared.fail("drained with requests unanswered");
                    }
                }
                PumpEvent::Misbehaved(..) => line.misdeeds += 1,
                PumpEvent::StorageFailed(..) => line.storage_failures += 1,
                PumpEvent::Synced(..) | PumpEvent::Corrupt(..) => {}
            }
        }
    }

    /// Does `what` to the pump and has it called again, as its owner would. False if the process died of it.
    pub fn with(&mut self, what: impl FnOnce(&mut SimPump)) -> bool {
        self.again = true;
        self.mortal(|backend| {
            if let Some(pump) = &mut backend.pump {
                what(pump);
            }
        })
    }

    /// Detaches a drained queue.
    pub fn detach(&mut self, at: usize, forget: bool) -> bool {
        let Some(queue) = self.lines[at].queue else { return true };
        let shared = self.shared.clone();
        let alive = self.with(|pump| {
            if !pump.detach(queue, forget) {
                shared.fail("a drained queue cannot be detached");
            }
        });
        if alive {
            let line = &mut self.lines[at];
            (line.queue, line.drained) = (None, false);
            if forget {
                (line.live, line.gone) = (false, true);
            }
        }
        alive
    }

    /// Checks that a process without queues holds nothing.
    pub fn check_empty(&mut self) -> Result<(), String> {
        self.shared.countdown.set(None);
        if self.pump.is_none() {
            assert!(self.start());
        }
        for disk in std::mem::take(&mut self.disks) {
            self.with(|pump| pump.remove_disk(disk));
        }
        let pump = self.pump.as_mut().unwrap();
        let (used, refused) = (pump.storage.buffers().used_bytes(), pump.storage.buffers().refused_frees());
        let held = self.shared.xen.borrow().held();
        let journals = self.shared.vault.borrow().open;
        let files = pump.storage.open_files();
        if (used, refused, held, journals, files) != (0, 0, (0, 0), 0, 0) {
            return Err(format!(
                "leaks: {used} bytes, {refused} frees refused, {held:?} rings and ports, {journals} journals, {files} files"
            ));
        }
        Ok(())
    }
}
