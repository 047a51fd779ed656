//! A frontend whose every byte the test decides.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use rings::front::Response;
use rings::{Abi, FrontRing, Segment, SharedPages};
use vbdd::hypervisor::GrantRef;

use crate::host::Host;
use crate::world::memory::GuestMemory;
use crate::world::{Actor, Shared};

/// Frames for data behind the ring's.
pub const DATA_FRAMES: usize = 16;

/// The hostile guest's domain. Others of the same test have numbers from 100 on.
pub const DOMAIN: u16 = 7;

/// What the guest writes at a call of the backend yet to come: frame, offset, bytes.
pub type Writes = Rc<RefCell<VecDeque<(usize, usize, Vec<u8>)>>>;

pub struct Puppet {
    pub domain: u16,
    pub abi: Abi,
    pub memory: Rc<GuestMemory>,
    pub front: FrontRing,
    /// The ring's pages, frames from 0 on.
    pub ring: Vec<GrantRef>,
    /// Data pages that may be written, frames behind the ring's.
    pub pages: Vec<GrantRef>,
    /// A page that may only be read, the last frame.
    pub constant: GrantRef,
    pub port: u32,
}

impl Puppet {
    /// A domain with a ring of `ring_pages` and nothing announced.
    pub fn new(shared: &Shared, domain: u16, abi: Abi, ring_pages: usize) -> Puppet {
        let mut xen = shared.xen.borrow_mut();
        let memory = xen.create_domain(domain, ring_pages + DATA_FRAMES + 1);
        let ring = (0..ring_pages).map(|frame| xen.grant(domain, frame, false)).collect();
        let pages = (0..DATA_FRAMES).map(|n| xen.grant(domain, ring_pages + n, false)).collect();
        let constant = xen.grant(domain, ring_pages + DATA_FRAMES, true);
        let port = xen.offer_port(domain);
        // SAFETY: the frames lie one behind the other in the guest's mapping, which `memory` keeps.
        let shared_pages = unsafe { SharedPages::new(memory.page(0), ring_pages) };
        let front = FrontRing::create(shared_pages, abi);
        Puppet { domain, abi, memory, front, ring, pages, constant, port }
    }

    /// The frame behind a data page.
    pub fn frame(&self, page: usize) -> usize {
        self.ring.len() + page
    }

    /// A whole page as a segment.
    pub fn whole(&self, page: usize) -> Segment {
        Segment { grant: self.pages[page], first: 0, last: 7 }
    }

    /// Starts the ring anew, as a frontend does that connects again.
    pub fn renew(&mut self) {
        // SAFETY: as in `new`.
        let pages = unsafe { SharedPages::new(self.memory.page(0), self.ring.len()) };
        self.front = FrontRing::create(pages, self.abi);
    }

    /// The nodes that announce its ring.
    pub fn nodes(&self) -> Vec<(String, String)> {
        let mut nodes = vec![
            ("event-channel".to_owned(), self.port.to_string()),
            ("protocol".to_owned(), self.abi.protocol().to_owned()),
        ];
        match self.ring.as_slice() {
            [one] => nodes.push(("ring-ref".to_owned(), one.to_string())),
            several => {
                nodes.push(("ring-page-order".to_owned(), several.len().ilog2().to_string()));
                nodes.extend(
                    several.iter().enumerate().map(|(n, grant)| (format!("ring-ref{n}"), grant.to_string())),
                );
            }
        }
        nodes
    }

    /// Writes its nodes and a state.
    pub fn announce(&self, host: &mut Host, state: &str) {
        let nodes = self.nodes();
        let pairs: Vec<(&str, &str)> =
            nodes.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        host.set_fe(self.domain, &pairs);
        host.set_fe(self.domain, &[("state", state)]);
    }

    /// Plugs a disk for a fresh puppet and connects it.
    pub fn connected(host: &mut Host, domain: u16, abi: Abi, path: &str, mode: &str) -> Puppet {
        host.attach(domain, path, &[("mode", Some(mode))]);
        host.wait_be(domain, "2");
        let puppet = Puppet::new(&host.shared, domain, abi, 1);
        puppet.announce(host, "3");
        host.wait_be(domain, "4");
        host.set_fe(domain, &[("state", "4")]);
        puppet
    }

    /// Sends an event.
    pub fn kick(&self, host: &Host) {
        host.shared.xen.borrow_mut().guest_notify(self.domain, self.port);
    }

    /// Publishes what was written, sends an event and waits for `count` answers.
    pub fn answers(&mut self, host: &mut Host, count: usize) -> Vec<Response> {
        let _ = self.front.publish();
        self.kick(host);
        let mut answers = Vec::new();
        for _ in 0..100_000 {
            answers.extend(std::iter::from_fn(|| self.front.take()).take(count - answers.len()));
            if answers.len() == count {
                break;
            }
            host.round();
        }
        assert_eq!(answers.len(), count, "answers never came");
        answers
    }

    /// Sends one request; its status.
    pub fn ask(&mut self, host: &mut Host, op: u8, sector: u64, segments: &[Segment], count: u8) -> i16 {
        self.front.write(op, 0xABCD, sector, segments, count);
        let answer = self.answers(host, 1)[0];
        assert_eq!(answer.id, 0xABCD);
        answer.status
    }
}

/// Runs inside the backend's calls, and writes into its memory what it was told to, in turns.
pub struct Meddler {
    pub domain: u16,
    pub memory: Rc<GuestMemory>,
    /// Frame, offset, bytes.
    pub writes: Writes,
}

impl Actor for Meddler {
    fn act(&mut self, _: &Shared) -> bool {
        let mut writes = self.writes.borrow_mut();
        if let Some((frame, offset, bytes)) = writes.pop_front() {
            self.memory.write(frame, offset, &bytes);
            writes.push_back((frame, offset, bytes));
        }
        // It never gives time a reason to stand still.
        false
    }

    fn finished(&self) -> bool {
        true
    }

    fn domain(&self) -> u16 {
        self.domain
    }

    fn describe(&self) -> String {
        format!("meddler of {}", self.domain)
    }
}
