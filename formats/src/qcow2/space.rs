//! Clusters: reserved ahead of writes, and given back.
//!
//! A reserved cluster's refcount is 1 and durable before it is handed out, so entries never wait for refcounts. What is reserved
//! when the process dies is a leak, which the next opening repairs: the dirty bit says that there may be some.

mod growth;

use alloc::collections::VecDeque;

use crate::error::Failure;
use crate::format::{Context, Facts, Order, OrderKind, Step, Wait};
use crate::ledger::{Stamp, Tick};
use crate::qcow2::{Qcow2, Shape};

use growth::Growth;

pub(super) const TAG_GROW: u64 = 2;
pub(super) const TAG_FREE: u64 = 3;

/// Freed runs that wait, above which a discard waits too.
const FREES_MAX: usize = 1024;
/// Freed runs above which syncs are made for them; below, they wait for a flush.
const FREES_URGENT: usize = 64;
/// Refcount pages that are searched before other space is taken.
const SCAN_PAGES: u32 = 8;

/// Clusters that no entry names yet.
#[derive(Clone, Copy, Debug)]
struct Reserved {
    first: u64,
    count: u64,
    /// They read as zero.
    zero: bool,
    /// When this is durable they may be handed out.
    counted: Stamp,
}

/// Clusters that no entry names any more.
#[derive(Clone, Copy, Debug)]
struct Freed {
    first: u64,
    count: u64,
    gone: Stamp,
    user: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Freeing {
    Idle,
    /// The first so many clusters of the first freed run are being punched.
    Punching(u64),
    Punched(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Finish {
    Drain,
    Release,
    Count(Stamp),
    Trim,
    Trimmed,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Space {
    /// Clusters of the file: what lies behind is new.
    end: u64,
    /// What entries may name; more than `end` on a device.
    bound: u64,
    grows: bool,
    new_is_zero: bool,
    /// Clusters to have in reserve.
    window: u64,
    pool: VecDeque<Reserved>,
    /// Below this, no free cluster is known.
    scan: u64,
    frees: VecDeque<Freed>,
    freeing: Freeing,
    growth: Growth,
    finish: Finish,
}

impl Space {
    /// `end` is the first cluster behind all that is used.
    pub(super) fn new(shape: &Shape, facts: Facts, end: u64, reserve_bytes: u64) -> Space {
        let length = facts.length_bytes.div_ceil(shape.cluster_bytes());
        Space {
            end: if facts.grows { end.max(length) } else { end },
            bound: if facts.grows { end.max(length) } else { length },
            grows: facts.grows,
            new_is_zero: facts.new_space_is_zero,
            window: (reserve_bytes >> shape.cluster_bits).clamp(4, 1024),
            pool: VecDeque::new(),
            scan: 0,
            frees: VecDeque::new(),
            freeing: Freeing::Idle,
            growth: Growth::Idle,
            finish: Finish::Drain,
        }
    }

    /// The byte behind all that entries may name.
    pub(super) fn end_bytes(&self, shape: &Shape) -> u64 {
        self.bound << shape.cluster_bits
    }

    fn reserved(&self) -> u64 {
        self.pool.iter().map(|run| run.count).sum()
    }

    fn extend(&mut self, end: u64) {
        self.end = self.end.max(end);
        self.bound = self.bound.max(end);
    }

    /// The clusters' entry is gone from memory; when that is durable they can be free.
    pub(super) fn free(&mut self, cx: &Context<'_>, first: u64, count: u64) {
        let (gone, user) = (cx.stamp(), cx.user());
        match self.frees.back_mut() {
            Some(last) if last.first + last.count == first && self.freeing == Freeing::Idle => {
                last.count += count;
                last.gone = gone;
                last.user = user;
            }
            _ => self.frees.push_back(Freed { first, count, gone, user }),
        }
    }

    /// Whether a discard may free more.
    pub(super) fn room_for_frees(&self) -> Step<()> {
        if self.frees.len() < FREES_MAX { Ok(()) } else { Err(Wait::Busy) }
    }

    /// Clusters that were handed out come back, with unknown content.
    pub(super) fn give_back(&mut self, first: u64, count: u64) {
        self.pool.push_back(Reserved { first, count, zero: false, counted: Stamp(0) });
    }
}

impl Qcow2 {
    /// Hands out up to `count` clusters in a row: first, how many, whether they read as zero.
    pub(super) fn take(&mut self, cx: &mut Context<'_>, count: u64) -> Step<(u64, u64, bool)> {
        let planted = self.planted.no_refcount_barrier;
        let ready = |run: &Reserved| planted || cx.ledger.is_durable(run.counted);
        let Some(place) = self.space.pool.iter().position(ready) else { return Err(Wait::Busy) };
        let Some(run) = self.space.pool.get_mut(place) else { return Err(Wait::Busy) };
        let (first, got, zero) = (run.first, run.count.min(count), run.zero);
        run.first += got;
        run.count -= got;
        if run.count == 0 {
            self.space.pool.remove(place);
        }
        self.check_host(first << self.shape.cluster_bits, got << self.shape.cluster_bits, 0)?;
        Ok((first, got, zero))
    }

    /// Keeps the reserve filled.
    pub(super) fn work_on_space(&mut self, cx: &mut Context<'_>) -> Step<()> {
        self.work_on_growth(cx)?;
        let low = self.space.window / 2;
        if self.space.reserved() < low {
            self.search(cx)?;
        }
        if self.space.reserved() < low {
            self.start_growth(cx)?;
        }
        let durable = |run: &&Reserved| cx.ledger.is_durable(run.counted);
        let ready: u64 = self.space.pool.iter().filter(durable).map(|run| run.count).sum();
        // More than enough is left: what was counted becomes durable with somebody's flush.
        if ready < (low / 4).max(1) {
            let newest = self.space.pool.iter().map(|run| run.counted).max();
            if newest.is_some_and(|stamp| !cx.durable(stamp)) {
                return Err(Wait::Busy);
            }
        }
        if self.space.growth.is_idle() { Ok(()) } else { Err(Wait::Busy) }
    }

    /// Looks for free clusters within the file.
    fn search(&mut self, cx: &mut Context<'_>) -> Step<()> {
        let per_block = self.shape.refcounts_per_block();
        for _ in 0..SCAN_PAGES {
            let from = self.space.scan;
            if from >= self.space.end || self.space.reserved() >= self.space.window {
                return Ok(());
            }
            let Some(at) = self.count_at(cx, from)? else {
                self.space.scan = (from / per_block + 1) * per_block;
                continue;
            };
            let count = at.left.min(self.space.end - from);
            self.space.scan = from + self.reserve(cx, (from, count), false, Tick::NONE)?;
        }
        Ok(())
    }

    /// Reserves what is free among `clusters` (first, how many), whose refcounts lie in one page. Says how many it looked at before
    /// it had enough.
    fn reserve(&mut self, cx: &mut Context<'_>, clusters: (u64, u64), zero: bool, after: Tick) -> Step<u64> {
        let (first, count) = clusters;
        let Some(at) = self.count_at(cx, first)? else { return Ok(count) };
        let mut have = self.space.reserved();
        let mut run: Option<(u64, u64)> = None;
        let mut looked = 0;
        while looked < count && have < self.space.window {
            let cluster = first + looked;
            if self.count(cx, at, looked) == 0 {
                let bytes = self.shape.cluster_bytes();
                self.check_host(cluster << self.shape.cluster_bits, bytes, 0)?;
                self.set_count(cx, at, looked, 1, after);
                have += 1;
                run = Some(run.map_or((cluster, 1), |(first, count)| (first, count + 1)));
            } else if let Some((first, count)) = run.take() {
                let counted = cx.stamp();
                self.space.pool.push_back(Reserved { first, count, zero, counted });
            }
            looked += 1;
        }
        if let Some((first, count)) = run {
            let counted = cx.stamp();
            self.space.pool.push_back(Reserved { first, count, zero, counted });
        }
        Ok(looked)
    }

    /// Frees clusters whose entries are durably gone, and that nobody looks at any more.
    pub(super) fn work_on_frees(&mut self, cx: &mut Context<'_>) -> Step<()> {
        loop {
            match self.space.freeing {
                Freeing::Punching(_) => return Err(Wait::Busy),
                Freeing::Punched(count) => {
                    self.uncount_first(cx, count)?;
                    self.space.freeing = Freeing::Idle;
                }
                Freeing::Idle => {
                    let Some(&freed) = self.space.frees.front() else { return Ok(()) };
                    let urgent = self.space.frees.len() > FREES_URGENT;
                    let gone = if urgent { cx.durable(freed.gone) } else { cx.ledger.is_durable(freed.gone) };
                    let gone = gone || self.planted.no_free_barrier;
                    if !gone || !(cx.unused(freed.user) || self.planted.no_free_grace) {
                        return Err(Wait::Busy);
                    }
                    self.free_some(cx, freed)?;
                }
            }
        }
    }

    /// Gives back the first clusters of a freed run: those that are shared are counted down, those that are not are punched.
    fn free_some(&mut self, cx: &mut Context<'_>, freed: Freed) -> Step<()> {
        let missing = "refcount of a cluster in use is 0";
        let at_bytes = freed.first << self.shape.cluster_bits;
        let Some(at) = self.count_at(cx, freed.first)? else { return Err(self.corrupt(missing, at_bytes)) };
        let count = at.left.min(freed.count);
        // A packed cluster's entry may name anything: what is always there is never given back.
        if let Err(what) = self.check_host(at_bytes, count << self.shape.cluster_bits, at_bytes) {
            return Err(self.corrupt(what.what, at_bytes));
        }
        let value = self.count(cx, at, 0);
        if value == 0 {
            return Err(self.corrupt(missing, at_bytes));
        }
        let alike =
            (1..count).take_while(|further| (self.count(cx, at, *further) == 1) == (value == 1)).count();
        let run = 1 + alike as u64;
        if value == 1 {
            self.space.freeing = Freeing::Punching(run);
            let length = run << self.shape.cluster_bits;
            cx.order(Order { tag: TAG_FREE, offset_bytes: at_bytes, kind: OrderKind::Punch(length) });
            return Ok(());
        }
        for further in 0..run {
            let value = self.count(cx, at, further);
            if value == 0 {
                return Err(self.corrupt(missing, at_bytes));
            }
            self.set_count(cx, at, further, value - 1, Tick::NONE);
        }
        self.drop_freed(run);
        Ok(())
    }

    /// Sets the refcounts of the first so many freed clusters to 0.
    fn uncount_first(&mut self, cx: &mut Context<'_>, count: u64) -> Step<()> {
        let Some(&freed) = self.space.frees.front() else { return Ok(()) };
        self.uncount(cx, freed.first, count)?;
        cx.forget(freed.first << self.shape.cluster_bits, count << self.shape.cluster_bits);
        self.space.scan = self.space.scan.min(freed.first);
        self.drop_freed(count);
        Ok(())
    }

    fn uncount(&mut self, cx: &mut Context<'_>, first: u64, count: u64) -> Step<()> {
        let Some(at) = self.count_at(cx, first)? else { return Ok(()) };
        for further in 0..count.min(at.left) {
            self.set_count(cx, at, further, 0, Tick::NONE);
        }
        Ok(())
    }

    fn drop_freed(&mut self, count: u64) {
        if let Some(freed) = self.space.frees.front_mut() {
            freed.first += count;
            freed.count -= count;
            if freed.count == 0 {
                self.space.frees.pop_front();
            }
        }
    }

    /// A punch ended. That it failed costs space, nothing else.
    pub(super) fn free_answered(&mut self, _: Result<&[u8], Failure>) {
        if let Freeing::Punching(count) = self.space.freeing {
            self.space.freeing = Freeing::Punched(count);
        }
    }

    /// Leaves no leak, and clears the dirty bit.
    pub(super) fn finish(&mut self, cx: &mut Context<'_>) -> Step<()> {
        loop {
            match self.space.finish {
                Finish::Drain => {
                    self.work_on_marks(cx)?;
                    despite_failures(|| self.work_on_tables(cx))?;
                    despite_failures(|| self.work_on_growth(cx))?;
                    let stamp = cx.stamp();
                    let durable = cx.durable(stamp);
                    self.work_on_frees(cx)?;
                    if !durable || !self.space.growth.is_idle() {
                        return Err(Wait::Busy);
                    }
                    self.space.finish = Finish::Release;
                }
                Finish::Release => {
                    self.release_reserve(cx)?;
                    self.space.finish = Finish::Count(cx.stamp());
                }
                Finish::Count(stamp) => {
                    if !cx.durable(stamp) && !self.planted.no_clean_barrier {
                        return Err(Wait::Busy);
                    }
                    self.space.finish = Finish::Trim;
                    let offset_bytes = self.space.end << self.shape.cluster_bits;
                    cx.order(Order { tag: TAG_GROW, offset_bytes, kind: OrderKind::SetLength });
                }
                Finish::Trim => return Err(Wait::Busy),
                Finish::Trimmed => {
                    self.clean(cx)?;
                    self.space.finish = Finish::Drain;
                    return Ok(());
                }
            }
        }
    }

    fn release_reserve(&mut self, cx: &mut Context<'_>) -> Step<()> {
        while let Some(run) = self.space.pool.back().copied() {
            let last = run.first + run.count - 1;
            let first = last - (last % self.counts_per_page()).min(run.count - 1);
            self.uncount(cx, first, last - first + 1)?;
            self.space.scan = self.space.scan.min(first);
            if last + 1 == self.space.end && self.space.grows {
                self.space.end = first;
                self.space.bound = first;
            }
            match self.space.pool.back_mut() {
                Some(run) if first > run.first => run.count = first - run.first,
                _ => {
                    self.space.pool.pop_back();
                }
            }
        }
        Ok(())
    }
}

/// Of what was made ready for writes that no longer come, failures are nobody's.
fn despite_failures(mut work: impl FnMut() -> Step<()>) -> Step<()> {
    loop {
        match work() {
            Err(Wait::Failed(Failure::Io(_) | Failure::NoSpace)) => {}
            step => return step,
        }
    }
}
