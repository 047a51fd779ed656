//! A frontend that does what none should.

use std::rc::Rc;

use rings::{Abi, FrontRing, LARGEST_STRIDE, Segment, SharedPages};
use vbdd::hypervisor::GrantRef;
use vbdd::pump::RingPlan;

use super::memory::GuestMemory;
use super::{Actor, Shared};

/// How bad it is.
#[derive(Clone, Copy, Debug)]
pub struct Malice {
    /// May break its ring for good.
    pub breaks_ring: bool,
    /// Sends events without end.
    pub storms: bool,
    /// Sends nothing but well-formed requests, as many as fit.
    pub greedy: bool,
}

/// A hostile guest with one ring.
pub struct HostileGuest {
    pub domain: u16,
    malice: Malice,
    memory: Rc<GuestMemory>,
    front: FrontRing,
    ring_grant: GrantRef,
    port: u32,
    grants: Vec<GrantRef>,
    sent: u64,
}

const FRAMES: usize = 17;

impl HostileGuest {
    pub fn new(shared: &Shared, domain: u16, malice: Malice) -> HostileGuest {
        let mut xen = shared.xen.borrow_mut();
        let memory = xen.create_domain(domain, FRAMES);
        let ring_grant = xen.grant(domain, 0, false);
        let grants = (1..FRAMES).map(|frame| xen.grant(domain, frame, frame % 3 == 0)).collect();
        // SAFETY: the frame stays mapped as long as `memory` lives, which this value keeps.
        let pages = unsafe { SharedPages::new(memory.page(0), 1) };
        let front = FrontRing::create(pages, Abi::X86_64);
        let port = xen.offer_port(domain);
        HostileGuest { domain, malice, memory, front, ring_grant, port, grants, sent: 0 }
    }

    pub fn ring(&self) -> RingPlan {
        RingPlan {
            domain: self.domain,
            grants: vec![self.ring_grant],
            remote_port: self.port,
            abi: Abi::X86_64,
            resume: false,
            journal: format!("{}-hostile", self.domain),
        }
    }

    /// Takes answers. Its own header may be such that there is no end of them.
    fn take_some(&mut self) {
        for _ in 0..64 {
            if self.front.take().is_none() {
                break;
            }
        }
    }

    /// A request that looks like one.
    fn plausible(&mut self, shared: &Shared) {
        let count = shared.below(13) as u8;
        let segments: Vec<Segment> = (0..count.min(11))
            .map(|_| {
                let grant = match shared.below(8) {
                    0 => shared.below(1 << 32) as u32,
                    1 => self.ring_grant,
                    _ => self.grants[shared.index(self.grants.len())],
                };
                let (first, last) = match shared.below(8) {
                    0 => (shared.below(256) as u8, shared.below(256) as u8),
                    1 => (7, 0),
                    _ => (0, 7),
                };
                Segment { grant, first, last }
            })
            .collect();
        let sector = match shared.below(4) {
            0 => u64::MAX - shared.below(64),
            1 => shared.below(1 << 40),
            _ => shared.below(64),
        };
        self.front.write(shared.below(8) as u8, shared.below(4), sector, &segments, count);
    }

    /// A well-formed request of one page.
    fn greedy(&mut self, shared: &Shared) {
        // Frames divisible by 3 are granted to be read only.
        let frame = 1 + shared.index(5) * 3;
        let segment = Segment { grant: self.grants[frame - 1], first: 0, last: 7 };
        self.sent += 1;
        self.front.write(shared.below(2) as u8, self.sent, shared.below(64), &[segment], 1);
    }

    fn misbehave(&mut self, shared: &Shared) {
        match shared.below(24) {
            0..8 => self.plausible(shared),
            8..12 => {
                let mut bytes = [0_u8; LARGEST_STRIDE];
                for byte in &mut bytes {
                    *byte = shared.below(256) as u8;
                }
                bytes[0] %= 8;
                self.front.write_raw(&bytes);
            }
            12..16 => {
                // Any slot is rewritten, published or not.
                let word = shared.below(4).to_le_bytes();
                self.memory.write(0, 64 + shared.index(4000), &word);
            }
            16 | 17 => {
                let at = shared.index(self.grants.len());
                let mut xen = shared.xen.borrow_mut();
                xen.revoke(self.domain, self.grants[at]);
                self.grants[at] = xen.grant(self.domain, 1 + at, shared.chance(1, 3));
            }
            18 => self.front.force_response_event(shared.below(1 << 32) as u32),
            19 => self.take_some(),
            20 if self.malice.breaks_ring && shared.chance(1, 8) => {
                let producer = shared.below(1 << 32) as u32;
                self.front.force_request_producer(producer);
            }
            21 if self.malice.breaks_ring && shared.chance(1, 8) => self.memory.write(0, 0, &[0; 16]),
            _ => {
                if shared.chance(1, 2) {
                    self.take_some();
                }
                let _ = self.front.publish();
                shared.xen.borrow_mut().guest_notify(self.domain, self.port);
            }
        }
    }
}

impl Actor for HostileGuest {
    fn act(&mut self, shared: &Shared) -> bool {
        if self.malice.greedy {
            self.take_some();
            while self.front.free() > 0 {
                self.greedy(shared);
            }
            let _ = self.front.publish();
            shared.xen.borrow_mut().guest_notify(self.domain, self.port);
        } else if self.malice.breaks_ring || self.front.free() > 2 || shared.chance(1, 2) {
            self.misbehave(shared);
        }
        if self.malice.storms {
            shared.xen.borrow_mut().guest_notify(self.domain, self.port);
        }
        // It never gives time a reason to stand still.
        false
    }

    fn domain(&self) -> u16 {
        self.domain
    }

    fn finished(&self) -> bool {
        true
    }

    fn describe(&self) -> String {
        format!("hostile guest {}", self.domain)
    }

    /// It is never at rest for long.
    fn wakes_at(&self) -> Option<u64> {
        None
    }
}
