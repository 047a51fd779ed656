//! Indirect requests whose descriptors are rewritten while they are read, played from bytes against the data path. What
//! reaches the disk and the guest may be the guest's own, never what somebody else's requests left in our memory.

use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;

use rings::{Abi, Offers, Segment};
use vbdd::pump::RingPlan;

use super::puppet::{DATA_FRAMES, DOMAIN, Meddler, Puppet, Writes};
use super::script::Bytes;
use crate::world::backend::{Backend, Vbd};
use crate::world::model::sector_bytes;
use crate::world::{Faults, Shared};

const NEIGHBOUR: u16 = 100;
const SECTORS: u64 = 64;
const STEPS_MAX: usize = 300;

struct Play {
    shared: Rc<Shared>,
    backend: Backend,
    guest: Puppet,
    neighbour: Puppet,
    writes: Writes,
    /// Answers that are owed, as far as an honest index would know.
    sent: u32,
    taken: u32,
}

/// Plays a script. Panics are what fuzzing is looking for.
pub fn play(data: &[u8]) {
    let mut bytes = Bytes(data);
    let mut play = Play::new(bytes.byte());
    for _ in 0..STEPS_MAX {
        let Some(op) = bytes.next() else { break };
        play.step(op, &mut bytes);
        play.shared.check().unwrap();
    }
    play.end();
}

fn plan(puppet: &Puppet) -> RingPlan {
    RingPlan {
        domain: puppet.domain,
        grants: puppet.ring.clone(),
        remote_port: puppet.port,
        abi: puppet.abi,
        resume: false,
        journal: puppet.domain.to_string(),
    }
}

impl Play {
    fn new(setting: u8) -> Play {
        let shared = Shared::new(1);
        shared.preempt.set(false);
        let mut backend = Backend::new(&shared, 2 << 20);
        backend.offers =
            Offers { indirect_segments: 256, barrier: setting & 8 != 0, discard: setting & 16 != 0 };
        let abi = [Abi::X86_64, Abi::X86_32, Abi::Arm, Abi::X86_64][usize::from(setting % 4)];
        let guest = Puppet::new(&shared, DOMAIN, abi, 1);
        let neighbour = Puppet::new(&shared, NEIGHBOUR, Abi::X86_64, 1);
        for (n, puppet) in [&guest, &neighbour].into_iter().enumerate() {
            // The neighbour's half of its disk is unlike anything on the guest's.
            let sectors = SECTORS << n;
            let image = shared.media.borrow_mut().create(&format!("/{n}"), sectors as usize, false);
            let read_only = n == 0 && setting & 4 != 0;
            backend.add(Vbd { image, sectors, read_only, rings: vec![plan(puppet)] });
        }
        let writes: Rc<RefCell<VecDeque<_>>> = Rc::default();
        let meddler = Meddler { domain: DOMAIN, memory: guest.memory.clone(), writes: writes.clone() };
        shared.guests.borrow_mut().push(Box::new(meddler));
        assert!(backend.start());
        Play { shared, backend, guest, neighbour, writes, sent: 0, taken: 0 }
    }

    fn step(&mut self, op: u8, bytes: &mut Bytes<'_>) {
        match op % 13 {
            0 | 1 => self.describe(bytes),
            2 | 3 => self.send_indirect(bytes),
            4 => {
                let (frame, at) = (self.frame(bytes.byte()), usize::from(bytes.word()) % 4096);
                let value = bytes.some(48);
                if at + value.len() <= 4096 {
                    self.writes.borrow_mut().push_back((frame, at, value));
                }
            }
            5 => self.writes.borrow_mut().clear(),
            6 => self.shared.eager.set(bytes.byte().is_multiple_of(2)),
            7 => self.turns(bytes.byte() % 8),
            8 => {
                let now = self.shared.clock.now_us();
                self.shared.clock.advance_to(now + u64::from(bytes.byte()) * 8);
                self.turns(1);
            }
            9 => self.neighbour_reads(bytes.byte()),
            10 => self.regrant(bytes.byte()),
            11 => self.send_other(bytes),
            _ => {
                let choice = bytes.byte();
                let rate = |bit: u8, rate| if choice & bit != 0 { rate } else { 0 };
                self.shared.faults.set(Faults {
                    copy_batch: rate(1, 100),
                    read_error: rate(2, 100),
                    write_error: rate(4, 100),
                    flush_error: rate(8, 100),
                    latency_us_max: 500,
                    ..Faults::default()
                });
                self.shared.xen.borrow_mut().copies_max = (choice & 16 != 0).then_some(11);
            }
        }
    }

    /// Two pages of descriptors: the first data pages.
    fn frame(&self, choice: u8) -> usize {
        self.guest.frame(usize::from(choice % 2))
    }

    fn grant(&self, choice: u8) -> u32 {
        match choice {
            0..=219 => self.guest.pages[usize::from(choice) % DATA_FRAMES],
            // Not its ring: what a read puts there looks like any number of answers.
            220..=239 => self.guest.constant,
            _ => u32::from(choice) << 8,
        }
    }

    fn describe(&mut self, bytes: &mut Bytes<'_>) {
        let (frame, first, count) = (self.frame(bytes.byte()), usize::from(bytes.byte()), bytes.byte());
        let step = bytes.byte();
        for n in 0..usize::from(count).min(256 - first) {
            let choice = step.wrapping_mul(n as u8);
            let (from, to) = if choice < 200 { (0, 7) } else { (choice & 7, (choice >> 3) & 15) };
            let segment = Segment { grant: self.grant(choice), first: from, last: to };
            self.guest.memory.write(frame, (first + n) * 8, &segment.to_bytes());
        }
    }

    fn send_indirect(&mut self, bytes: &mut Bytes<'_>) {
        if self.guest.front.free() == 0 {
            return;
        }
        let inner = bytes.byte() % 4;
        let count = match bytes.byte() {
            near @ 0..=199 => u16::from(near) % 66,
            far => bytes.word() | u16::from(far & 1) << 8,
        };
        let sector = u64::from(bytes.byte() % 70);
        let page = self.guest.pages[usize::from(bytes.byte() % 2)];
        self.guest.front.write_indirect(inner, u64::from(self.sent), sector, count, &[page]);
        self.published();
    }

    fn send_other(&mut self, bytes: &mut Bytes<'_>) {
        if self.guest.front.free() == 0 {
            return;
        }
        let id = u64::from(self.sent);
        let (op, sector) = (bytes.byte(), u64::from(bytes.byte() % 70));
        if op % 8 == 5 {
            self.guest.front.write_discard(id, sector, u64::from(bytes.byte()), op >> 7);
        } else {
            let count = bytes.byte() % 13;
            let segments: Vec<Segment> =
                (0..count).map(|_| Segment { grant: self.grant(bytes.byte()), first: 0, last: 7 }).collect();
            self.guest.front.write(op % 4, id, sector, &segments, count);
        }
        self.published();
    }

    fn published(&mut self) {
        self.sent += 1;
        let _ = self.guest.front.publish();
        self.shared.xen.borrow_mut().guest_notify(DOMAIN, self.guest.port);
    }

    fn neighbour_reads(&mut self, choice: u8) {
        while self.neighbour.front.take().is_some() {}
        if self.neighbour.front.free() == 0 {
            return;
        }
        let count = 1 + choice % 8;
        let segments: Vec<Segment> = (0..count).map(|n| self.neighbour.whole(n.into())).collect();
        self.neighbour.front.write(0, 1, SECTORS, &segments, count);
        let _ = self.neighbour.front.publish();
        self.shared.xen.borrow_mut().guest_notify(NEIGHBOUR, self.neighbour.port);
        self.turns(1);
    }

    fn regrant(&mut self, choice: u8) {
        let page = usize::from(choice) % DATA_FRAMES;
        let frame = self.guest.frame(page);
        let mut xen = self.shared.xen.borrow_mut();
        xen.revoke(DOMAIN, self.guest.pages[page]);
        self.guest.pages[page] = xen.grant(DOMAIN, frame, choice & 0x40 != 0);
    }

    fn turns(&mut self, count: u8) {
        for _ in 0..count {
            if self.backend.wants_turn() {
                assert!(self.backend.turn());
            }
        }
        self.take();
    }

    fn take(&mut self) {
        while self.guest.front.take().is_some() {
            self.taken += 1;
            assert!(self.taken <= self.sent, "more answers than requests");
        }
    }

    /// Until nothing is to come.
    fn settle(&mut self) {
        for _ in 0..100_000 {
            self.turns(1);
            if !self.backend.wants_turn() {
                match self.backend.wakes_at() {
                    Some(at) => self.shared.clock.advance_to(at),
                    None => return,
                }
            }
        }
        panic!("never at rest");
    }

    fn end(mut self) {
        self.writes.borrow_mut().clear();
        self.shared.eager.set(false);
        self.settle();
        assert_eq!(self.taken, self.sent, "each request is answered");
        self.nothing_foreign();
        {
            let mut xen = self.shared.xen.borrow_mut();
            xen.copies_max = None;
        }
        self.shared.faults.set(Faults { latency_us_max: 500, ..Faults::default() });
        for at in 0..2 {
            let queue = self.backend.lines[at].queue.unwrap();
            self.backend.with(|pump| if at == 0 { pump.abort(queue) } else { pump.close(queue) });
            self.settle();
            assert!(self.backend.lines[at].drained);
            assert!(self.backend.detach(at, true));
        }
        self.backend.check_empty().unwrap();
        self.shared.check().unwrap();
        self.shared.guests.borrow_mut().clear();
        self.backend.pump = None;
        self.shared.xen.borrow_mut().process_died();
    }

    /// Neither the guest's memory nor its disk holds what the neighbour read, or what our memory is filled with.
    fn nothing_foreign(&self) {
        let foreign: BTreeSet<Vec<u8>> = (SECTORS..SECTORS * 2)
            .map(|sector| sector_bytes(0, sector).to_vec())
            .chain([vec![0xA5; 512]])
            .collect();
        let media = self.shared.media.borrow();
        for sector in 0..SECTORS as usize {
            assert!(
                !foreign.contains(media.visible(0, sector).as_slice()),
                "foreign data in sector {sector}"
            );
        }
        for frame in 1..=DATA_FRAMES {
            for part in 0..8 {
                let mut bytes = vec![0; 512];
                self.guest.memory.read(frame, part * 512, &mut bytes);
                assert!(!foreign.contains(&bytes), "foreign data in frame {frame}");
            }
        }
    }
}
