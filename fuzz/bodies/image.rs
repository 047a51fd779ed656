//! What the targets of image formats share: an image in memory, a disk that is used by bytes of the input, and what must hold however an
//! image contradicts itself.
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use formats::{Disk, Extent, Failure, Medium, Op, Pages, Payload, Request, Work, WorkKind};

/// An image is never longer: what an entry names beyond it fails, and memory stays bounded.
const LENGTH_MAX: u64 = 64 << 20;
const PAGE: u64 = 4096;

/// Bytes that behave like a file, or a device, of bounded length; pages of zeroes take no memory, and a copy shares the others.
#[derive(Clone, Default)]
pub struct Sparse {
    pages: BTreeMap<u64, Rc<[u8; PAGE as usize]>>,
    pub length: u64,
    /// Its length is what it is.
    pub device: bool,
}

impl Sparse {
    /// So many zeroes.
    pub fn of_length(length: u64) -> Sparse {
        Sparse { length, ..Sparse::default() }
    }

    fn each(at: u64, length: usize, mut part: impl FnMut(u64, usize, std::ops::Range<usize>)) {
        let mut done = 0;
        while done < length {
            let place = at + done as u64;
            let within = (place % PAGE) as usize;
            let count = (PAGE as usize - within).min(length - done);
            part(place / PAGE, within, done..done + count);
            done += count;
        }
    }

    /// Fills `bytes`, with zeroes where there is nothing.
    pub fn peek(&self, at: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        if at < self.length {
            let length = bytes.len().min((self.length - at) as usize);
            Sparse::each(at, length, |page, within, range| {
                if let Some(page) = self.pages.get(&page) {
                    let count = range.len();
                    bytes[range].copy_from_slice(&page[within..within + count]);
                }
            });
        }
    }

    /// A number of so many bytes.
    pub fn number(&self, at: u64, bytes: usize) -> u64 {
        let mut found = [0; 8];
        self.peek(at, &mut found[8 - bytes..]);
        u64::from_be_bytes(found)
    }

    /// Changes bytes within the image, and none behind it.
    pub fn patch(&mut self, at: u64, bytes: &[u8]) {
        if at.checked_add(bytes.len() as u64).is_some_and(|end| end <= self.length) {
            let _ = self.write(at, bytes);
        }
    }
}

impl Medium for Sparse {
    fn length_bytes(&mut self) -> u64 {
        self.length
    }

    fn read(&mut self, at: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        self.peek(at, bytes);
        Ok(())
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Failure> {
        let end = at.checked_add(bytes.len() as u64).ok_or(Failure::Io(22))?;
        if end > self.length {
            self.set_length(end)?;
        }
        Sparse::each(at, bytes.len(), |page, within, range| {
            let bytes = &bytes[range];
            if !self.pages.contains_key(&page) && bytes.iter().all(|byte| *byte == 0) {
                return;
            }
            let page = self.pages.entry(page).or_insert_with(|| Rc::new([0; PAGE as usize]));
            Rc::make_mut(page)[within..within + bytes.len()].copy_from_slice(bytes);
        });
        Ok(())
    }

    fn zero(&mut self, at: u64, length: u64) -> Result<(), Failure> {
        let end = at.saturating_add(length).min(self.length);
        if at < end {
            Sparse::each(at, (end - at) as usize, |page, within, range| {
                if range.len() == PAGE as usize {
                    self.pages.remove(&page);
                } else if let Some(page) = self.pages.get_mut(&page) {
                    Rc::make_mut(page)[within..within + range.len()].fill(0);
                }
            });
        }
        Ok(())
    }

    fn set_length(&mut self, length: u64) -> Result<(), Failure> {
        if self.device {
            return if length <= self.length { Ok(()) } else { Err(Failure::NoSpace) };
        }
        if length > LENGTH_MAX {
            return Err(Failure::NoSpace);
        }
        if length < self.length {
            self.zero(length, self.length - length)?;
        }
        self.length = length;
        Ok(())
    }

    fn sync(&mut self) -> Result<(), Failure> {
        Ok(())
    }
}

/// The bytes of an input, one after another; zeroes behind its end.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    pub fn number(&mut self, bytes: usize) -> u64 {
        (0..bytes).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::from(self.byte()) % of.len()]
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A number that is at the edge of something.
pub fn edge(input: &mut Input<'_>) -> u64 {
    let base =
        input.pick(&[0, 1, 1 << 9, 1 << 16, 1 << 31, 1 << 32, 1 << 55, 1 << 56, 1 << 62, 1 << 63, u64::MAX]);
    base.wrapping_add(u64::from(input.byte())).wrapping_sub(8)
}

type Blueprint = (u8, [u8; 2]);

thread_local! {
    static BUILT: RefCell<HashMap<Blueprint, Sparse>> = RefCell::default();
}

/// An image that is made once for each blueprint.
pub fn built(blueprint: Blueprint, build: impl FnOnce() -> Sparse) -> Sparse {
    if let Some(found) = BUILT.with_borrow(|all| all.get(&blueprint).cloned()) {
        return found;
    }
    let made = build();
    BUILT.with_borrow_mut(|all| drop(all.insert(blueprint, made.clone())));
    made
}

/// A request that has no outcome yet.
struct Asked {
    request: Request,
    /// Another one that overlaps was under way, too: nobody knows what is there afterwards.
    vague: bool,
}

/// Ranges of the leaf that no data may reach.
pub type Guarded = fn(&Sparse) -> Vec<(u64, u64)>;

/// Somebody who uses a disk.
pub struct User {
    pub disk: Disk,
    pages: Pages,
    pub media: Vec<Sparse>,
    guarded: Guarded,
    /// What lies behind the end of the leaf may be written up to here: the rest of its last unit.
    slack: u64,
    memory: HashMap<u64, Vec<u8>>,
    asked: HashMap<u64, Asked>,
    out: Vec<Work>,
    last: HashMap<u64, (Result<(), Failure>, Vec<u8>)>,
    tokens: u64,
    /// Whether the image said of itself that it is sound: then what was written must be read. In others data may lie over the very
    /// tables that name them.
    pub trusted: bool,
    changed: bool,
    known: BTreeMap<u64, u8>,
    /// Pieces of work until one fails.
    pub fail_after: u32,
    /// The image is known to be corrupt, and what was changed before is written.
    stopped: bool,
}

impl User {
    /// `media` in the order of the chain, by which the disk names them.
    pub fn new(disk: Disk, media: Vec<Sparse>, guarded: Guarded, slack: u64) -> User {
        User {
            disk,
            pages: Pages::of_pages(24),
            media,
            guarded,
            slack,
            memory: HashMap::new(),
            asked: HashMap::new(),
            out: Vec::new(),
            last: HashMap::new(),
            tokens: 0,
            trusted: false,
            changed: false,
            known: BTreeMap::new(),
            fail_after: u32::MAX,
            stopped: false,
        }
    }

    fn ask(&mut self, op: Op, extent: Extent) -> u64 {
        self.tokens += 1;
        let token = self.tokens;
        let mut vague = false;
        for other in self.asked.values_mut() {
            if op != Op::Flush && other.request.op != Op::Flush && other.request.extent.overlaps(&extent) {
                other.vague = true;
                vague = true;
            }
        }
        if !matches!(op, Op::Read | Op::Flush) {
            self.changed = true;
            (extent.sector..extent.end()).for_each(|sector| {
                self.known.remove(&sector);
            });
        }
        let fill = if op == Op::Read { 0xa5 } else { token as u8 };
        let length = if matches!(op, Op::Read | Op::Write) { extent.sectors as usize * 512 } else { 0 };
        self.memory.insert(token, vec![fill; length]);
        let request = Request { token, op, extent };
        self.asked.insert(token, Asked { request, vague });
        assert!(self.disk.submit(&mut self.pages, request), "a request is not taken");
        self.collect();
        token
    }

    fn collect(&mut self) {
        while let Some(work) = self.disk.next_work() {
            self.judge(&work);
            self.out.push(work);
        }
        while let Some(outcome) = self.disk.next_outcome() {
            let asked = self.asked.remove(&outcome.token).expect("an outcome twice");
            let memory = self.memory.remove(&outcome.token).unwrap_or_default();
            self.ended(&asked, outcome.result, &memory);
            self.last.insert(outcome.token, (outcome.result, memory));
        }
    }

    /// What was read or written against what is known.
    fn ended(&mut self, asked: &Asked, result: Result<(), Failure>, memory: &[u8]) {
        if result.is_err() || asked.vague {
            return;
        }
        let extent = asked.request.extent;
        for (sector, at) in (extent.sector..extent.end()).zip((0..).step_by(512)) {
            match asked.request.op {
                Op::Write => {
                    self.known.insert(sector, asked.request.token as u8);
                }
                Op::WriteZeroes => {
                    self.known.insert(sector, 0);
                }
                Op::Read => {
                    let read = &memory[at..at + 512];
                    let Some(&known) = self.known.get(&sector).filter(|_| self.trusted) else { continue };
                    let all = read.iter().all(|byte| *byte == known);
                    assert!(all, "sector {sector} reads {:x?} and was written {known:x}", &read[..8]);
                }
                Op::Discard | Op::Flush | Op::Status => {}
            }
        }
    }

    /// What a piece of work may be.
    fn judge(&mut self, work: &Work) {
        let end = work.offset_bytes.checked_add(work.length_bytes).expect("work beyond all files");
        let changes = !matches!(
            work.kind,
            WorkKind::Read | WorkKind::Sync | WorkKind::Yield | WorkKind::ZeroGuest | WorkKind::CopyToGuest
        );
        assert!(end < 1 << 63, "{work:?} where no file can be");
        if !changes {
            return;
        }
        assert_eq!(work.image, 0, "a parent is changed: {work:?}");
        let mark = work.kind == WorkKind::Write && work.offset_bytes == 0 && work.length_bytes == 512;
        assert!(!self.stopped || mark, "{work:?} of a corrupt image");
        if work.kind == WorkKind::SetLength {
            return;
        }
        let bound = self.media[0].length.saturating_add(self.slack);
        assert!(end <= bound, "{work:?} in a file of {} bytes", self.media[0].length);
        if work.kind == WorkKind::Write && work.payload == Payload::Own {
            return;
        }
        for (from, to) in (self.guarded)(&self.media[0]) {
            assert!(end <= from || to <= work.offset_bytes, "{work:?} over metadata at {from}..{to}");
        }
    }

    fn perform(&mut self, work: &Work) -> (Result<(), Failure>, Vec<u8>) {
        if self.fail_after == 0 {
            self.fail_after = u32::MAX;
            let writes = !matches!(work.kind, WorkKind::Read | WorkKind::Sync);
            return (Err(if writes { Failure::NoSpace } else { Failure::Io(5) }), Vec::new());
        }
        self.fail_after -= u32::from(self.fail_after != u32::MAX);
        let length = work.length_bytes as usize;
        let mut own = Vec::new();
        let data = match work.payload {
            Payload::Own if work.kind != WorkKind::Read => self.disk.bytes(work.id).to_vec(),
            _ if work.kind == WorkKind::CopyToGuest => self.disk.bytes(work.id).to_vec(),
            _ => Vec::new(),
        };
        let medium = &mut self.media[work.image as usize];
        let memory = match work.payload {
            Payload::Guest { token, offset_bytes } => {
                let memory = self.memory.get_mut(&token).expect("memory of nobody");
                memory
                    .get_mut(offset_bytes as usize..offset_bytes as usize + length)
                    .expect("beyond the memory")
            }
            _ => {
                own = vec![0; length];
                &mut own[..]
            }
        };
        let result = match work.kind {
            WorkKind::Read => medium.read(work.offset_bytes, memory),
            WorkKind::Write if work.payload == Payload::Own => medium.write(work.offset_bytes, &data),
            WorkKind::Write => medium.write(work.offset_bytes, memory),
            WorkKind::Zero | WorkKind::Punch => medium.zero(work.offset_bytes, work.length_bytes),
            WorkKind::SetLength => medium.set_length(work.offset_bytes),
            WorkKind::ZeroGuest => {
                memory.fill(0);
                Ok(())
            }
            WorkKind::CopyToGuest => {
                memory.copy_from_slice(&data);
                Ok(())
            }
            WorkKind::Sync | WorkKind::Yield => Ok(()),
        };
        (result, own)
    }

    /// Does so much of what is to be done, the newest first or the oldest.
    pub fn work(&mut self, most: u32, newest: bool) {
        for _ in 0..most {
            self.collect();
            if self.out.is_empty() {
                return;
            }
            let at = if newest { self.out.len() - 1 } else { 0 };
            let work = self.out.remove(at);
            let (result, bytes) = self.perform(&work);
            let read: &[u8] = if work.kind == WorkKind::Read { &bytes } else { &[] };
            self.disk.done(&mut self.pages, work.id, result, read);
        }
        assert!(most < ENDLESS, "work without end");
    }

    /// Does all.
    pub fn settle(&mut self) {
        self.work(ENDLESS, false);
        assert_eq!((self.disk.in_flight(), self.asked.len()), (0, 0), "a request without an end");
        self.last.clear();
    }

    /// One request, alone.
    pub fn run(&mut self, op: Op, extent: Extent) -> (Result<(), Failure>, Vec<u8>) {
        let token = self.ask(op, extent);
        self.work(ENDLESS, false);
        self.last.remove(&token).expect("a request without an end")
    }

    /// Uses the disk as the input says, then looks whether reads are what they should be, and closes it.
    pub fn play(&mut self, input: &mut Input<'_>, spread: u64) {
        let sectors = self.disk.geometry().sectors.max(1);
        let mut steps = 0;
        while !input.is_empty() && steps < 48 {
            steps += 1;
            let (what, place) = (input.byte(), input.byte());
            let op = [
                Op::Write,
                Op::Read,
                Op::Write,
                Op::Discard,
                Op::WriteZeroes,
                Op::Flush,
                Op::Write,
                Op::Read,
            ];
            let op = op[usize::from(what & 7)];
            let sector = (u64::from(place) * spread + u64::from(what >> 6)) % sectors;
            let most = [1, 8, 33, spread * 3][usize::from(what >> 3 & 3)];
            let most = if matches!(op, Op::Read | Op::Write) { most.min(300) } else { most };
            let extent = Extent { sector, sectors: most.clamp(1, sectors - sector) };
            self.ask(op, extent);
            match what >> 5 & 3 {
                0 => self.settle(),
                1 => self.work(3, true),
                2 => self.work(9, false),
                _ => {}
            }
        }
        self.settle();
        self.fail_after = u32::MAX;
        // The first may be what lets space be given back, and that may be where a contradiction shows.
        for _ in 0..2 {
            let _ = self.run(Op::Flush, Extent { sector: 0, sectors: 1 });
        }
        self.stopped = self.disk.corruption().is_some();
        if self.stopped {
            let (result, _) = self.run(Op::Write, Extent { sector: 0, sectors: 1 });
            assert!(result.is_err(), "a corrupt image is written");
        }
        for sector in (0..sectors).step_by((sectors as usize / 24).max(1)) {
            let extent = Extent { sector, sectors: spread.min(64).min(sectors - sector) };
            let alike = self.run(Op::Read, extent) == self.run(Op::Read, extent);
            assert!(
                alike || self.changed && !self.trusted,
                "two reads of sector {sector} find different things"
            );
        }
        self.disk.close(&mut self.pages);
        self.settle();
        assert!(self.disk.closed().is_some(), "closing without an end");
    }
}

/// No input has so much to do.
const ENDLESS: u32 = 200_000;
