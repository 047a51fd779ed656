//! Images on NBD servers: their sockets, and what becomes of them when they are lost.
//!
//! What is sent and what an answer means is the session's (`nbd::client`); which servers may be asked, and how they are
//! reached, is in `connect`. Here are the sockets, all of them below one epoll descriptor, which the caller polls. Requests
//! wait while there is no connection; threads make the next one. `docs/design/storage.md`, "Images on servers".

mod blocking;
mod connect;
mod link;

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags};

pub(super) use blocking::{Blocking, open};
pub(super) use connect::Servers;

use super::calls;
use super::engine::Landed;
use super::linux::LinuxStorage;
use super::slots::Stage;
use super::workers::{Bell, Workers};
use super::{IoKind, StorageError};
use crate::buffers::Span;
use crate::limits::{NBD_UNFLUSHED_BYTES, NBD_UNFLUSHED_IMAGE_BYTES};
use crate::nbd::client::{Address, Command, Export, Memory, Purpose, Request, Session};
use crate::nbd::wire::{error, transmission};
use link::Remote;

/// Threads that connect: as many servers may be dead and not answer before the others wait for them.
const CONNECTORS_MAX: usize = 8;

/// How often servers are looked at that do not answer.
const TICK: Duration = Duration::from_millis(250);

/// What is told by the kernel at a time.
const EVENTS: usize = 64;

/// Memory for replies, in bytes, and for their headers where data are received straight to where they belong.
const SCRATCH_BYTES: usize = 64 << 10;

/// What the epoll descriptor says of the timer.
const TIMER: u64 = u64::MAX;

/// A server that has been greeted.
#[derive(Debug)]
pub(super) struct Connected {
    socket: OwnedFd,
    export: Export,
    goal: Arc<Goal>,
}

impl Connected {
    /// It can make ranges read as zero.
    pub(super) fn can_zero(&self) -> bool {
        self.export.can(transmission::SEND_WRITE_ZEROES)
    }
}

/// What a connection is to.
#[derive(Debug)]
struct Goal {
    address: Address,
    /// As the caller spells it.
    path: String,
    servers: Arc<Servers>,
    purpose: Purpose,
}

/// A job for a thread.
#[derive(Debug)]
enum Errand {
    /// Connect again. Which image, and for which time in its place.
    Connect { number: u32, use_count: u64, goal: Arc<Goal> },
    /// Say good-bye, and flush before if something was written.
    Leave { socket: OwnedFd, export: Export, flush: bool, goal: Arc<Goal> },
}

/// A connection again, or why not.
type Answer = (u32, u64, Result<(OwnedFd, Export), String>);

/// All images on servers.
#[derive(Debug)]
pub(super) struct Remotes {
    epoll: OwnedFd,
    timer: OwnedFd,
    ticks: bool,
    remotes: Vec<Option<Remote>>,
    uses: u64,
    landed: VecDeque<Landed>,
    scratch: Vec<u8>,
    /// Those that have got requests since the last [`Remotes::submit`].
    dirty: Vec<u32>,
    connectors: Workers<Errand, Answer>,
    patience: Option<Duration>,
}

/// The memory of requests is the caller's; what has ended waits to be taken.
struct Room<'a>(&'a mut VecDeque<Landed>);

impl Memory<Span> for Room<'_> {
    fn bytes(&self, memory: Span, length: u32) -> &[u8] {
        calls::bytes(memory, length as usize)
    }

    fn store(&mut self, memory: Span, at: u32, bytes: &[u8]) {
        let part = memory.part(at, u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        let target = calls::bytes_mut(part.unwrap_or(Span::EMPTY), bytes.len());
        if target.len() == bytes.len() {
            target.copy_from_slice(bytes);
        }
    }

    fn zero(&mut self, memory: Span, at: u32, length: u32) {
        memory.part(at, length).unwrap_or(Span::EMPTY).zero();
    }

    fn done(&mut self, tag: u32, result: Result<u32, u32>) {
        let result = match result {
            Ok(moved) => i32::try_from(moved).unwrap_or(i32::MAX),
            Err(number) => -errno(number),
        };
        self.0.push_back(Landed { tag, result });
    }
}

/// The system's number of a protocol's error.
fn errno(number: u32) -> i32 {
    match number {
        error::EPERM => libc::EPERM,
        error::ENOMEM => libc::ENOMEM,
        error::EINVAL => libc::EINVAL,
        error::ENOSPC => libc::ENOSPC,
        error::EOVERFLOW => libc::EOVERFLOW,
        error::ENOTSUP => libc::EOPNOTSUPP,
        _ => libc::EIO,
    }
}

impl Remotes {
    /// None yet. Requests that wait longer than `patience` fail.
    pub(super) fn new(patience: Option<Duration>, bell: &Arc<Bell>) -> Result<Remotes, String> {
        let failed = |what: &str| format!("no descriptor for NBD servers ({what})");
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|errno| failed(&errno.to_string()))?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)
            .map_err(|errno| failed(&errno.to_string()))?;
        epoll::add(&epoll, &timer, epoll::EventData::new_u64(TIMER), epoll::EventFlags::IN)
            .map_err(|errno| failed(&errno.to_string()))?;
        let connectors = Workers::new("vbdd-nbd", CONNECTORS_MAX, Arc::clone(bell), link::work);
        Ok(Remotes {
            epoll,
            timer,
            ticks: false,
            remotes: Vec::new(),
            uses: 0,
            landed: VecDeque::new(),
            scratch: Vec::new(),
            dirty: Vec::new(),
            connectors,
            patience,
        })
    }

    /// What becomes readable when there is something to do.
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Takes an image that was opened; answers with its number.
    pub(super) fn insert(&mut self, connected: Connected) -> u32 {
        self.uses += 1;
        self.scratch.resize(SCRATCH_BYTES, 0);
        let number = self.remotes.iter().position(Option::is_none).unwrap_or(self.remotes.len());
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        let remote = Remote::new(connected, number, self.uses, &self.epoll);
        match self.remotes.get_mut(number as usize) {
            Some(place) => *place = remote,
            None => self.remotes.push(remote),
        }
        self.share_memory();
        number
    }

    /// Lets go of an image that nobody uses any more.
    pub(super) fn remove(&mut self, number: u32) {
        let Some(remote) = self.remotes.get_mut(number as usize).and_then(Option::take) else { return };
        while self.remotes.pop_if(|last| last.is_none()).is_some() {}
        if let Some(errand) = remote.leave() {
            // Without a thread it just hangs up.
            drop(self.connectors.give(errand));
        }
        self.share_memory();
    }

    /// Divides what there is for unflushed writes.
    fn share_memory(&mut self) {
        let (least, most) = NBD_UNFLUSHED_IMAGE_BYTES;
        let count = self.remotes.iter().flatten().count().max(1) as u64;
        let each = (NBD_UNFLUSHED_BYTES / count).clamp(least, most);
        self.remotes.iter_mut().flatten().for_each(|remote| remote.session.bound_unflushed(each));
    }

    /// Gives memory back that is not needed now.
    pub(super) fn trim(&mut self) {
        self.remotes.iter_mut().flatten().for_each(|remote| remote.session.trim());
    }

    /// Takes a request, to be sent by [`Remotes::submit`].
    fn push(&mut self, number: u32, request: Request<Span>) {
        let mut room = Room(&mut self.landed);
        let Some(remote) = self.remotes.get_mut(number as usize).and_then(Option::as_mut) else {
            return room.done(request.tag, Err(error::EIO));
        };
        remote.push(request, &mut room);
        if !std::mem::replace(&mut remote.dirty, true) {
            self.dirty.push(number);
        }
        if !self.ticks && remote.needs_ticks(self.patience) {
            self.tick_from_now_on(true);
        }
    }

    /// Sends what is to be sent.
    pub(super) fn submit(&mut self) {
        while let Some(number) = self.dirty.pop() {
            let number = number as usize;
            let Some(Some(remote)) = self.remotes.get_mut(number) else { continue };
            remote.dirty = false;
            if remote.is_up() && remote.session.has_outgoing() && !remote.is_clogged() {
                let mut room = Room(&mut self.landed);
                if let Err(why) = remote.send(&self.epoll, &mut room) {
                    self.lost(number, &why);
                }
            }
        }
    }

    /// Takes a request that has ended.
    pub(super) fn landed(&mut self) -> Option<Landed> {
        self.landed.pop_front()
    }

    /// Looks at what has come. To be called when [`Remotes::fd`] is readable, or the bell was rung.
    pub(super) fn ready(&mut self) {
        while let Some((number, use_count, result)) = self.connectors.take() {
            self.connected(number, use_count, result);
        }
        if self.remotes.is_empty() {
            return;
        }
        let nothing = epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
        let mut events = [nothing; EVENTS];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // An interruption is made up for by the next call: the descriptor stays readable.
        let count = epoll::wait(&self.epoll, &mut events, Some(&now)).unwrap_or(0);
        for event in events.iter().take(count) {
            if event.data.u64() == TIMER {
                self.tick();
            } else if let Ok(number) = usize::try_from(event.data.u64()) {
                self.move_bytes(number, event.flags);
            }
        }
    }

    fn move_bytes(&mut self, number: usize, flags: epoll::EventFlags) {
        let Some(Some(remote)) = self.remotes.get_mut(number) else { return };
        let mut room = Room(&mut self.landed);
        let sends = flags.contains(epoll::EventFlags::OUT) || remote.is_clogged();
        let mut result = Ok(());
        if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
            result = remote.receive(&mut self.scratch, &mut room);
        }
        if result.is_ok() && (sends || remote.session.has_outgoing()) {
            result = remote.send(&self.epoll, &mut room);
        }
        if let Err(why) = result {
            self.lost(number, &why);
        }
    }

    /// A connection is lost.
    fn lost(&mut self, number: usize, why: &str) {
        let mut room = Room(&mut self.landed);
        let Some(Some(remote)) = self.remotes.get_mut(number) else { return };
        remote.lost(why, &mut room);
        self.connect_if_due(number);
        self.tick_from_now_on(true);
    }

    fn connect_if_due(&mut self, number: usize) {
        let Some(Some(remote)) = self.remotes.get_mut(number) else { return };
        if let Some(errand) = remote.connect_if_due()
            && self.connectors.give(errand).is_err()
        {
            remote.not_connected("no thread could be started");
        }
    }

    /// A thread has connected, or could not.
    fn connected(&mut self, number: u32, use_count: u64, result: Result<(OwnedFd, Export), String>) {
        let Some(Some(remote)) = self.remotes.get_mut(number as usize) else { return };
        if !remote.waits_for(use_count) {
            return;
        }
        let number = number as usize;
        let result = result.and_then(|(socket, export)| remote.connected(socket, &export, &self.epoll));
        match result {
            Ok(()) => {
                let mut room = Room(&mut self.landed);
                if let Err(why) = remote.send(&self.epoll, &mut room) {
                    self.lost(number, &why);
                }
            }
            Err(why) => remote.not_connected(&why),
        }
    }

    /// Time has passed.
    fn tick(&mut self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.timer, &mut count);
        let (mut ticks, now) = (false, Instant::now());
        for number in 0..self.remotes.len() {
            let Some(Some(remote)) = self.remotes.get_mut(number) else { continue };
            let mut room = Room(&mut self.landed);
            if remote.is_overdue(now, self.patience) {
                remote.give_up(&mut room);
            }
            ticks |= remote.needs_ticks(self.patience);
            self.connect_if_due(number);
        }
        if !ticks {
            self.tick_from_now_on(false);
        }
    }

    fn tick_from_now_on(&mut self, ticks: bool) {
        if self.ticks == ticks {
            return;
        }
        self.ticks = ticks;
        let nanoseconds = if ticks { i64::from(TICK.subsec_nanos()) } else { 0 };
        let interval = Timespec { tv_sec: 0, tv_nsec: nanoseconds };
        let every = Itimerspec { it_interval: interval, it_value: interval };
        if let Err(errno) = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &every) {
            log::error!("the timer of the NBD servers cannot be set: {errno}");
        }
    }
}

impl LinuxStorage {
    /// Starts the current transfer of a request to a server from where it stands.
    pub(super) fn launch_remotely(&mut self, number: u32) {
        let slot = *self.slots.at(number);
        let command = match slot.stage {
            Stage::Fetch | Stage::Fill => Command::Read,
            Stage::Move if slot.io.kind == IoKind::Read => Command::Read,
            Stage::Move | Stage::Store => Command::Write,
            Stage::Sync | Stage::Discard | Stage::Zero | Stage::Length => Command::Flush,
        };
        let Some(remote) = self.files.at(slot.io.file).and_then(|file| file.remote) else {
            return self.finish(number, Err(StorageError::Os(libc::EIO)));
        };
        let Some(remotes) = &mut self.remotes else { return };
        let left = slot.memory.length_bytes() - slot.moved;
        let length_bytes = if command == Command::Flush { 0 } else { left.min(remotes.most_bytes(remote)) };
        let memory = slot.memory.part(slot.moved, length_bytes).unwrap_or(Span::EMPTY);
        let offset_bytes = if command == Command::Flush { 0 } else { slot.place + u64::from(slot.moved) };
        remotes.push(remote, Request { tag: number, command, offset_bytes, length_bytes, memory });
    }

    /// Has a server do what would be a call; false where there is none.
    pub(super) fn starts_remotely(&mut self, number: u32, command: Command) -> bool {
        let slot = *self.slots.at(number);
        let remote = self.files.at(slot.io.file).and_then(|file| file.remote);
        let (Some(remote), Some(remotes)) = (remote, &mut self.remotes) else { return false };
        let length_bytes = u32::try_from(slot.piece).unwrap_or(u32::MAX);
        let request =
            Request { tag: number, command, offset_bytes: slot.place, length_bytes, memory: Span::EMPTY };
        remotes.push(remote, request);
        self.continued = true;
        true
    }
}

impl Remotes {
    /// What a request to a server moves at most, in bytes.
    fn most_bytes(&self, number: u32) -> u32 {
        let remote = self.remotes.get(number as usize).and_then(Option::as_ref);
        remote.map_or(0, |remote| remote.session.export().most_bytes)
    }
}

/// A session for an image that is used from now on.
fn session_for<M: Copy>(export: Export, purpose: Purpose) -> Result<Session<M>, &'static str> {
    Session::new(export, purpose, NBD_UNFLUSHED_IMAGE_BYTES.1)
}
