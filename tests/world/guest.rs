//! A sane frontend: it reads, writes and flushes at random, and checks all that comes back.
//!
//! It behaves as Linux's does: grants last as long as a request, responses are only looked at in the handler of an event,
//! the handler ends with the ring's final check, and two writes of one sector are never in flight together. Writing a
//! request, publishing it and sending the event are separate acts, so that the backend may run in between.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use rings::request::operation;
use rings::{Abi, FrontRing, Segment, SharedPages};
use vbdd::hypervisor::GrantRef;
use vbdd::pump::RingPlan;
use vbdd::storage::IoKind;

use super::memory::GuestMemory;
use super::model::{Covered, DiskModel};
use super::storage::Injected;
use super::{Actor, Shared};

/// What a sane guest does.
#[derive(Clone, Debug)]
pub struct Habits {
    pub domain: u16,
    /// Index of its disk's model.
    pub disk: usize,
    pub queues: usize,
    pub abi: Abi,
    pub ring_pages: usize,
    /// Requests of each queue until it rests.
    pub requests: u32,
    /// Pages of each queue for data.
    pub frames: usize,
    /// Most requests in flight in each queue.
    pub depth: u32,
    /// Segments of a request, at least.
    pub segments_min: u64,
    /// Every segment is a whole page.
    pub whole_pages: bool,
    /// Segments of a request, at most.
    pub segments_max: u64,
    /// How many of 16 reads and writes are indirect, and their segments at most. A guest with fewer frames sends none.
    pub indirect: u64,
    pub indirect_max: u64,
    /// Numerators over 16: reads, flushes without and with data, discards, barriers with and without data, operations
    /// that nobody offers. The rest are writes.
    pub reads: u64,
    pub flushes: u64,
    pub flushes_with_data: u64,
    pub discards: u64,
    pub barriers: u64,
    pub odd: u64,
    /// Its answers must come in the order of its requests.
    pub in_order: bool,
    /// The disk has fewer sectors than the model: what lies past this must be refused.
    pub end: Option<u64>,
    /// Its pages stay granted from one request to the next.
    pub persistent: bool,
}

impl Habits {
    pub fn new(domain: u16, disk: usize) -> Habits {
        Habits {
            domain,
            disk,
            queues: 1,
            abi: Abi::X86_64,
            ring_pages: 1,
            requests: 100,
            frames: 64,
            depth: 32,
            segments_min: 1,
            whole_pages: false,
            segments_max: 11,
            indirect: 4,
            indirect_max: 24,
            reads: 6,
            flushes: 1,
            flushes_with_data: 1,
            discards: 1,
            barriers: 0,
            odd: 1,
            in_order: false,
            end: None,
            persistent: false,
        }
    }
}

#[derive(Clone, Debug)]
enum Want {
    Read { read: u64 },
    Write { first: u64 },
    Flush { covered: Covered },
    FlushWrite { first: u64, covered: Covered },
    Discard,
    Odd,
}

#[derive(Debug)]
struct Pending {
    operation: u8,
    want: Want,
    sector: u64,
    count: u64,
    segments: Vec<(Segment, usize)>,
    /// The page of descriptors: granted until the answer comes.
    descriptors: Option<(GrantRef, usize)>,
    sent_us: u64,
}

#[derive(Debug)]
struct GuestQueue {
    front: FrontRing,
    port: u32,
    grants: Vec<GrantRef>,
    free: Vec<usize>,
    /// Frames that stay granted.
    kept: BTreeMap<usize, GrantRef>,
    pending: BTreeMap<u64, Pending>,
    order: VecDeque<u64>,
    left: u32,
    sent: u64,
    in_handler: bool,
    owes_event: bool,
    sleeps_until: u64,
}

/// A guest with one disk.
pub struct SaneGuest {
    pub habits: Habits,
    memory: Rc<GuestMemory>,
    queues: Vec<GuestQueue>,
    /// The longest that an answer took.
    pub latency_us_max: Rc<std::cell::Cell<u64>>,
}

impl SaneGuest {
    pub fn new(shared: &Shared, habits: Habits) -> SaneGuest {
        let frames = habits.ring_pages + habits.frames;
        let mut xen = shared.xen.borrow_mut();
        let memory = xen.create_domain(habits.domain, habits.queues * frames);
        let queues = (0..habits.queues).map(|n| {
            let base = n * frames;
            let grants =
                (0..habits.ring_pages).map(|page| xen.grant(habits.domain, base + page, false)).collect();
            // SAFETY: the frames lie one behind the other in the guest's mapping, which `memory` keeps.
            let pages = unsafe { SharedPages::new(memory.page(base), habits.ring_pages) };
            GuestQueue {
                front: FrontRing::create(pages, habits.abi),
                port: xen.offer_port(habits.domain),
                grants,
                free: (base + habits.ring_pages..base + frames).collect(),
                kept: BTreeMap::new(),
                pending: BTreeMap::new(),
                order: VecDeque::new(),
                left: habits.requests,
                sent: 0,
                in_handler: false,
                owes_event: false,
                sleeps_until: 0,
            }
        });
        let queues = queues.collect();
        SaneGuest { memory, queues, habits, latency_us_max: Rc::default() }
    }

    /// Where its rings are, as it would write into xenstore.
    pub fn rings(&self) -> Vec<RingPlan> {
        let plan = |(n, queue): (usize, &GuestQueue)| RingPlan {
            domain: self.habits.domain,
            grants: queue.grants.clone(),
            remote_port: queue.port,
            abi: self.habits.abi,
            resume: false,
            journal: format!("{}-{n}", self.habits.domain),
        };
        self.queues.iter().enumerate().map(plan).collect()
    }

    fn act_on(&mut self, n: usize, shared: &Shared) -> bool {
        let queue = &mut self.queues[n];
        if shared.stop_sending.get() {
            queue.left = 0;
        }
        if queue.owes_event && shared.chance(3, 4) {
            queue.owes_event = false;
            shared.note("event sent", self.habits.domain.into(), n as u64);
            shared.xen.borrow_mut().guest_notify(self.habits.domain, queue.port);
            return true;
        }
        if !queue.in_handler && shared.xen.borrow_mut().guest_event(self.habits.domain, queue.port) {
            queue.in_handler = true;
        }
        if queue.in_handler {
            for _ in 0..=shared.below(8) {
                let Some(response) = self.queues[n].front.take() else {
                    self.queues[n].in_handler = false;
                    break;
                };
                self.answered(n, response, shared);
            }
            return true;
        }
        let full = queue.pending.len() >= self.habits.depth as usize || queue.front.free() == 0;
        if queue.left > 0 && !full && shared.clock.now_us() >= queue.sleeps_until {
            if shared.chance(1, 16) {
                self.queues[n].sleeps_until = shared.clock.now_us() + shared.below(2000);
            }
            if self.send_some(n, shared) {
                return true;
            }
        }
        std::mem::take(&mut self.queues[n].owes_event) && {
            shared.xen.borrow_mut().guest_notify(self.habits.domain, self.queues[n].port);
            true
        }
    }

    fn send_some(&mut self, n: usize, shared: &Shared) -> bool {
        let burst = 1 + shared.below(if shared.chance(1, 4) { 32 } else { 4 });
        let mut sent = false;
        for _ in 0..burst {
            let queue = &self.queues[n];
            if queue.left == 0 || queue.pending.len() >= self.habits.depth as usize || queue.front.free() == 0
            {
                break;
            }
            sent |= self.send(n, shared);
        }
        let queue = &mut self.queues[n];
        let wanted = queue.front.publish();
        shared.note("published", self.habits.domain.into(), (n as u64) << 1 | u64::from(wanted));
        if wanted {
            queue.owes_event = true;
        }
        sent
    }

    /// Writes one request of any kind. False if what was chosen cannot be sent now.
    fn send(&mut self, n: usize, shared: &Shared) -> bool {
        let habits = &self.habits;
        let mut models = shared.models.borrow_mut();
        let model = &mut models[habits.disk];
        let mut roll = shared.below(16);
        let mut falls = |weight: u64| {
            let hit = roll < weight;
            roll = if hit { u64::MAX } else { roll.saturating_sub(weight) };
            hit
        };
        let (reads, flushes) = (falls(habits.reads), falls(habits.flushes));
        let (with_data, odd) = (falls(habits.flushes_with_data), falls(habits.odd));
        let (discard, barrier) = (falls(habits.discards), falls(habits.barriers));
        let op_flush = if barrier { operation::BARRIER } else { operation::FLUSH };
        let bare = barrier && shared.chance(1, 2);
        let (flushes, with_data) = (flushes || bare, with_data || barrier && !bare);
        let is_read = reads || (model.read_only && !flushes && !odd);
        if discard {
            return send_discard(&mut self.queues[n], model, shared);
        }
        let queue = &mut self.queues[n];
        let indirect = !flushes && !odd && !with_data && shared.chance(habits.indirect, 16);
        let pages = match (flushes || odd, indirect) {
            (true, _) => 0,
            // What never fits into its frames would look as if it were stuck.
            (_, true) => {
                let most = habits.indirect_max.min(model.size() / 8).min(habits.frames as u64 - 1);
                1 + shared.below(most)
            }
            (_, false) => habits.segments_min + shared.below(habits.segments_max - habits.segments_min + 1),
        };
        if queue.free.len() < pages as usize + usize::from(indirect) {
            return false;
        }
        let shape: Vec<(u8, u8)> = (0..pages).map(|_| shape_of_page(habits.whole_pages, shared)).collect();
        let count: u64 = shape.iter().map(|(first, last)| u64::from(last - first) + 1).sum();
        let sector = shared.below(model.size() - count + 1);
        let (op, want) = if flushes {
            (op_flush, Want::Flush { covered: model.flush_begins() })
        } else if odd {
            (if shared.chance(1, 2) { 4 } else { 7 }, Want::Odd)
        } else if is_read {
            (operation::READ, Want::Read { read: model.read_begins(sector, count) })
        } else {
            let covered = model.flush_begins();
            let Some(first) = model.write_begins(sector, count) else { return false };
            match with_data {
                true => (op_flush, Want::FlushWrite { first, covered }),
                false => (operation::WRITE, Want::Write { first }),
            }
        };
        let mut segments = Vec::new();
        let mut at = 0;
        for (first, last) in shape {
            let frame = queue.free.pop().unwrap();
            self.memory.write(frame, 0, &[0xEE; 4096]);
            for place in first..=last {
                if let Want::Write { first } | Want::FlushWrite { first, .. } = want {
                    let bytes = super::model::sector_bytes(first + at, sector + at);
                    self.memory.write(frame, usize::from(place) * 512, &bytes);
                }
                at += 1;
            }
            let grant = match queue.kept.get(&frame) {
                Some(grant) => *grant,
                None => shared.xen.borrow_mut().grant(habits.domain, frame, !is_read && !habits.persistent),
            };
            if habits.persistent {
                queue.kept.insert(frame, grant);
            }
            segments.push((Segment { grant, first, last }, frame));
        }
        queue.sent += 1;
        queue.left -= 1;
        let id = 0xFFFF_8880_0000_0000 | (queue.sent << 4);
        let slots: Vec<Segment> = segments.iter().map(|(segment, _)| *segment).collect();
        let mut descriptors = None;
        if indirect {
            let frame = queue.free.pop().unwrap();
            self.memory.write(frame, 0, &[0xEE; 4096]);
            for (n, segment) in slots.iter().enumerate() {
                self.memory.write(frame, n * 8, &segment.to_bytes());
            }
            let grant = shared.xen.borrow_mut().grant(habits.domain, frame, true);
            queue.front.write_indirect(op, id, sector, slots.len() as u16, &[grant]);
            descriptors = Some((grant, frame));
        } else {
            queue.front.write(op, id, sector, &slots, slots.len() as u8);
        }
        shared.note("sent", id, u64::from(op));
        let sent_us = shared.clock.now_us();
        queue.order.push_back(id);
        queue
            .pending
            .insert(id, Pending { operation: op, want, sector, count, segments, descriptors, sent_us });
        true
    }

    fn answered(&mut self, n: usize, response: rings::front::Response, shared: &Shared) {
        let domain = self.habits.domain;
        shared.note("answered", response.id, response.status as u64);
        let queue = &mut self.queues[n];
        let Some(pending) = queue.pending.remove(&response.id) else {
            return shared
                .fail(format!("guest {domain} got an answer to nothing it has asked: {response:?}"));
        };
        if self.habits.in_order && queue.order.front() != Some(&response.id) {
            shared.fail(format!(
                "guest {domain} is answered out of order: {response:?} before {:?}",
                queue.order
            ));
        }
        queue.order.retain(|id| *id != response.id);
        if response.operation != pending.operation {
            shared.fail(format!("guest {domain} sent {pending:?} and was answered {response:?}"));
        }
        let latency = shared.clock.now_us() - pending.sent_us;
        self.latency_us_max.set(self.latency_us_max.get().max(latency));
        if let Err(what) = self.judge(&pending, response.status, shared) {
            shared.fail(format!("guest {domain}, {pending:?}, answered {}: {what}", response.status));
        }
        let queue = &mut self.queues[n];
        let pages = pending.segments.iter().map(|(segment, frame)| (segment.grant, *frame));
        for (grant, frame) in pages.chain(pending.descriptors) {
            if queue.kept.get(&frame) != Some(&grant) {
                shared.xen.borrow_mut().revoke(domain, grant);
            }
            queue.free.push(frame);
        }
    }

    fn judge(&self, pending: &Pending, status: i16, shared: &Shared) -> Result<(), String> {
        let mut models = shared.models.borrow_mut();
        let model = &mut models[self.habits.disk];
        let okay = status == 0;
        match &pending.want {
            Want::Odd if status == -2 => return Ok(()),
            Want::Odd => return Err("an operation that was not offered".to_owned()),
            Want::Read { read } => {
                let mut bytes = vec![0; pending.count as usize * 512];
                let mut rest = bytes.as_mut_slice();
                for (segment, frame) in &pending.segments {
                    let (own, behind) = rest.split_at_mut(usize::from(segment.length_bytes()));
                    self.memory.read(*frame, segment.offset_bytes().into(), own);
                    rest = behind;
                }
                model.read_ends(*read, okay.then_some(bytes.as_slice()))?;
                self.check_page_edges(pending)?;
            }
            Want::Write { first } => model.write_ends(pending.sector, pending.count, *first, okay),
            Want::Flush { covered } if okay => model.flush_ends(covered),
            Want::FlushWrite { first, covered } => {
                model.write_ends(pending.sector, pending.count, *first, okay);
                if okay {
                    model.flush_ends(covered);
                    model.written_through(pending.sector, pending.count, *first);
                }
            }
            Want::Discard => model.discard_ends(pending.sector, pending.count),
            Want::Flush { .. } => {}
        }
        let cause = self.cause(pending, model.image, okay, shared);
        if self.habits.end.is_some_and(|end| pending.count > 0 && pending.sector + pending.count > end) {
            return if status == -1 { Ok(()) } else { Err("though it lies past the end".to_owned()) };
        }
        match (status, cause) {
            (0, Some(true)) => Err("though it was made to fail".to_owned()),
            (0, _) | (-1, Some(_)) => Ok(()),
            (-1, None) => Err("without a cause".to_owned()),
            _ => Err("a status that does not belong here".to_owned()),
        }
    }

    /// Bytes of a page outside the segment are none of the backend's business.
    fn check_page_edges(&self, pending: &Pending) -> Result<(), String> {
        for (segment, frame) in &pending.segments {
            let mut page = [0; 4096];
            self.memory.read(*frame, 0, &mut page);
            let (from, to) = (usize::from(segment.first) * 512, (usize::from(segment.last) + 1) * 512);
            if page[..from].iter().chain(&page[to..]).any(|byte| *byte != 0xEE) {
                return Err("a read wrote beside its segment".to_owned());
            }
        }
        Ok(())
    }

    /// The injected failure that hit this request: certain, possible, or none.
    fn cause(&self, pending: &Pending, image: usize, okay: bool, shared: &Shared) -> Option<bool> {
        let mut cause = None;
        let mut xen = shared.xen.borrow_mut();
        xen.failed_copies.retain(|failed| {
            let hit = failed.domain == self.habits.domain
                && (pending.segments.iter().any(|(segment, _)| segment.grant == failed.grant)
                    || pending.descriptors.is_some_and(|(grant, _)| grant == failed.grant));
            if hit {
                cause = Some(failed.certain || cause == Some(true));
            }
            !hit
        });
        let kind = match pending.want {
            Want::Read { .. } => IoKind::Read,
            Want::Write { .. } | Want::FlushWrite { .. } => IoKind::Write,
            Want::Discard => IoKind::Discard { length_bytes: pending.count * 512 },
            Want::Flush { .. } | Want::Odd => IoKind::Flush,
        };
        let mut media = shared.media.borrow_mut();
        let range = pending.sector * 512..(pending.sector + pending.count) * 512;
        let hits = |error: &Injected| {
            (error.image, error.kind) == (image, kind) && range.contains(&error.offset_bytes)
        };
        // Where several fit a read, it cannot be told whose they are: they stay, for the others. Of a write every part may
        // fail, and nobody else writes there.
        let reads = kind == IoKind::Read;
        let several = reads && media.injected.iter().filter(|error| hits(error)).count() > 1;
        media.injected.retain_mut(|error| {
            let hit = hits(error) && !(reads && okay);
            if hit {
                cause = Some(error.certain || cause == Some(true));
                error.certain &= !several;
            }
            !hit || several
        });
        let flushes = matches!(pending.want, Want::Flush { .. } | Want::FlushWrite { .. });
        if cause.is_none() && flushes && media.flush_failed.contains(&image) {
            cause = Some(false);
        }
        cause
    }
}

fn send_discard(queue: &mut GuestQueue, model: &mut DiskModel, shared: &Shared) -> bool {
    let most = [8, 64, model.size()][shared.index(3)].min(model.size());
    let count = 1 + shared.below(most);
    let sector = shared.below(model.size() - count + 1);
    if model.read_only || !model.discard_begins(sector, count) {
        return false;
    }
    queue.sent += 1;
    queue.left -= 1;
    let id = 0xFFFF_8880_0000_0000 | (queue.sent << 4);
    queue.front.write_discard(id, sector, count, 0);
    shared.note("sent", id, operation::DISCARD.into());
    queue.order.push_back(id);
    let pending = Pending {
        operation: operation::DISCARD,
        want: Want::Discard,
        sector,
        count,
        segments: Vec::new(),
        descriptors: None,
        sent_us: shared.clock.now_us(),
    };
    queue.pending.insert(id, pending);
    true
}

/// Sectors within a page: mostly whole pages.
fn shape_of_page(whole: bool, shared: &Shared) -> (u8, u8) {
    if whole || shared.chance(1, 2) {
        return (0, 7);
    }
    let first = shared.below(8);
    ((first) as u8, (first + shared.below(8 - first)) as u8)
}

impl Actor for SaneGuest {
    fn act(&mut self, shared: &Shared) -> bool {
        let count = self.queues.len();
        let start = shared.index(count);
        (0..count).any(|n| self.act_on((start + n) % count, shared))
    }

    fn domain(&self) -> u16 {
        self.habits.domain
    }

    fn finished(&self) -> bool {
        self.queues.iter().all(|queue| queue.left == 0 && queue.pending.is_empty() && !queue.owes_event)
    }

    fn describe(&self) -> String {
        let frames = self.habits.ring_pages + self.habits.frames;
        let queue = |(n, queue): (usize, &GuestQueue)| {
            let mut head = [0; 16];
            self.memory.read(n * frames, 0, &mut head);
            let word = |word: &[u8; 4]| u32::from_le_bytes(*word);
            let indices: Vec<u32> = head.as_chunks::<4>().0.iter().map(word).collect();
            let (left, waits) = (queue.left, queue.pending.len());
            format!("{left} to send, waits for {waits}, requests and responses {indices:?}")
        };
        let queues: Vec<String> = self.queues.iter().enumerate().map(queue).collect();
        format!("guest {}: {}", self.habits.domain, queues.join("; "))
    }

    fn wakes_at(&self) -> Option<u64> {
        let waits = |queue: &&GuestQueue| queue.left > 0;
        self.queues.iter().filter(waits).map(|queue| queue.sleeps_until).min()
    }
}
