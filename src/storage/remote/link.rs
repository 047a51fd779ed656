//! One image on a server, with its connection or without.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags};

use super::blocking::Blocking;
use super::{Answer, Connected, Errand, Goal, SCRATCH_BYTES, session_for};
use crate::buffers::Span;
use crate::nbd::client::{Export, Memory, Purpose, Request, Session};
use crate::nbd::wire::{error, transmission};
use crate::storage::calls;

/// Pieces that one call sends.
const PIECES_MAX: usize = 64;

/// Calls that receive from one server before the others have their turn.
const RECEIVES_MAX: u32 = 16;

/// Data that come are received straight to where they belong if they are at least so many bytes; of fewer, many replies are
/// received at once.
const STRAIGHT_BYTES: u32 = 16 << 10;

/// How much is received of what may be data that should go straight to where they belong, in bytes: a few headers.
const HEADERS_BYTES: usize = 256;

/// The longest pause between two tries to connect.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Tries to connect between two lines in the log.
const QUIET_TRIES: u32 = 60;

#[derive(Debug)]
enum Link {
    Up(OwnedFd),
    /// A thread is at it.
    Connecting,
    /// The next try is due then.
    Pausing(Instant),
    /// Nothing helps any more.
    Over,
}

/// One image.
#[derive(Debug)]
pub(super) struct Remote {
    pub session: Session<Span>,
    /// It has got requests that were not sent yet.
    pub dirty: bool,
    goal: Arc<Goal>,
    number: u32,
    use_count: u64,
    link: Link,
    /// The socket is full: the kernel tells when it is not.
    clogged: bool,
    /// Long data came last.
    long: bool,
    /// Tries to connect since anything was answered.
    tries: u32,
    /// When anything was last answered, or began to wait.
    progress: Instant,
    /// Requests have waited in vain: they fail at once until there is a connection.
    hopeless: bool,
}

impl Remote {
    /// `None` if it cannot be used after all, which its opener has ruled out.
    pub(super) fn new(connected: Connected, number: u32, use_count: u64, epoll: &OwnedFd) -> Option<Remote> {
        let Connected { socket, export, goal } = connected;
        let mut remote = Remote {
            session: session_for(export, goal.purpose).ok()?,
            dirty: false,
            goal,
            number,
            use_count,
            link: Link::Connecting,
            clogged: false,
            long: false,
            tries: 0,
            progress: Instant::now(),
            hopeless: false,
        };
        if let Err(why) = remote.watch(socket, epoll) {
            remote.not_connected(&why);
        }
        Some(remote)
    }

    fn watch(&mut self, socket: OwnedFd, epoll: &OwnedFd) -> Result<(), String> {
        let data = epoll::EventData::new_u64(self.number.into());
        epoll::add(epoll, &socket, data, epoll::EventFlags::IN).map_err(|errno| errno.to_string())?;
        self.link = Link::Up(socket);
        self.clogged = false;
        Ok(())
    }

    pub(super) fn is_up(&self) -> bool {
        matches!(self.link, Link::Up(_))
    }

    pub(super) fn is_clogged(&self) -> bool {
        self.clogged
    }

    /// Somebody has to look at it from time to time.
    pub(super) fn needs_ticks(&self, patience: Option<Duration>) -> bool {
        let waits = patience.is_some() && self.session.pending() > 0;
        matches!(self.link, Link::Connecting | Link::Pausing(_)) || waits
    }

    pub(super) fn push(&mut self, request: Request<Span>, room: &mut impl Memory<Span>) {
        if matches!(self.link, Link::Over) || (self.hopeless && !self.is_up()) {
            return room.done(request.tag, Err(error::EIO));
        }
        if self.session.pending() == 0 {
            self.progress = Instant::now();
        }
        self.session.push(request, room);
    }

    /// Sends what the socket takes.
    pub(super) fn send(&mut self, epoll: &OwnedFd, room: &mut impl Memory<Span>) -> Result<(), String> {
        let Link::Up(socket) = &self.link else { return Ok(()) };
        let mut full = false;
        while self.session.has_outgoing() && !full {
            let mut pieces = [IoSlice::new(&[]); PIECES_MAX];
            let mut count = 0;
            for (place, piece) in pieces.iter_mut().zip(self.session.outgoing(room)) {
                *place = IoSlice::new(piece);
                count += 1;
            }
            let pieces = pieces.get(..count).unwrap_or_default();
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::sendmsg(socket, pieces, &mut SendAncillaryBuffer::default(), flags) {
                Ok(bytes) => self.session.sent(bytes),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => full = true,
                Err(errno) => return Err(format!("sending: {errno}")),
            }
        }
        if full != self.clogged {
            self.clogged = full;
            let out = if full { epoll::EventFlags::OUT } else { epoll::EventFlags::empty() };
            let data = epoll::EventData::new_u64(self.number.into());
            epoll::modify(epoll, socket, data, epoll::EventFlags::IN | out)
                .map_err(|errno| format!("epoll: {errno}"))?;
        }
        Ok(())
    }

    /// Takes what has come.
    pub(super) fn receive(&mut self, scratch: &mut [u8], room: &mut impl Memory<Span>) -> Result<(), String> {
        let replies = self.session.replies();
        for _ in 0..RECEIVES_MAX {
            let Link::Up(socket) = &self.link else { return Ok(()) };
            let straight = self.session.expects().filter(|(_, _, left)| *left >= STRAIGHT_BYTES);
            let limit = if straight.is_some() || self.long { HEADERS_BYTES } else { SCRATCH_BYTES };
            self.long = straight.is_some() || (self.long && self.session.expects().is_none());
            let scratch = scratch.get_mut(..limit).unwrap_or_default();
            let target = straight.and_then(|(memory, at, left)| memory.part(at, left)).unwrap_or(Span::EMPTY);
            let ahead = target.length_bytes() as usize;
            let mut pieces = [IoSliceMut::new(calls::bytes_mut(target, ahead)), IoSliceMut::new(scratch)];
            let wanted = ahead + limit;
            let count = match rustix::io::readv(socket, &mut pieces) {
                Ok(0) => return Err(String::from("the server has hung up")),
                Ok(count) => count,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(format!("receiving: {errno}")),
            };
            if ahead > 0 {
                self.session.received(count.min(ahead), room);
            }
            let rest = scratch.get(..count.saturating_sub(ahead)).unwrap_or_default();
            self.session.receive(rest, room).map_err(|misbehaved| misbehaved.0.to_owned())?;
            if count < wanted {
                break;
            }
        }
        if self.session.replies() != replies {
            self.tries = 0;
            self.progress = Instant::now();
        }
        Ok(())
    }

    /// The connection is lost. Requests wait.
    pub(super) fn lost(&mut self, why: &str, room: &mut impl Memory<Span>) {
        let waiting = self.session.pending();
        self.session.lost(room);
        if self.session.is_broken() {
            log::error!("{}: the connection is lost ({why}), and with it what was written", self.goal.path);
            self.link = Link::Over;
            return;
        }
        log::warn!("{}: the connection is lost ({why}); {waiting} requests wait", self.goal.path);
        self.progress = Instant::now();
        self.link = Link::Pausing(self.progress + self.pause());
    }

    fn pause(&self) -> Duration {
        match self.tries {
            0 => Duration::ZERO,
            tries => PAUSE_MAX.min(Duration::from_millis(100) * 2_u32.saturating_pow(tries.min(10))),
        }
    }

    /// What a thread has to do now, if anything.
    pub(super) fn connect_if_due(&mut self) -> Option<Errand> {
        let Link::Pausing(until) = self.link else { return None };
        if Instant::now() < until {
            return None;
        }
        self.link = Link::Connecting;
        let goal = Arc::clone(&self.goal);
        Some(Errand::Connect { number: self.number, use_count: self.use_count, goal })
    }

    /// Whether a thread's answer is for it.
    pub(super) fn waits_for(&self, use_count: u64) -> bool {
        self.use_count == use_count && matches!(self.link, Link::Connecting)
    }

    /// A thread could not connect.
    pub(super) fn not_connected(&mut self, why: &str) {
        if self.tries.is_multiple_of(QUIET_TRIES) {
            log::warn!("{}: there is no connection yet: {why}", self.goal.path);
        }
        self.tries += 1;
        self.link = Link::Pausing(Instant::now() + self.pause());
    }

    /// A thread has connected. The export must be what it was.
    pub(super) fn connected(
        &mut self,
        socket: OwnedFd,
        export: &Export,
        epoll: &OwnedFd,
    ) -> Result<(), String> {
        let old = self.session.export();
        let needed = old.flags & (transmission::SEND_FLUSH | transmission::SEND_FUA);
        let may_write = self.goal.purpose == Purpose::Reading || !export.can(transmission::READ_ONLY);
        let blocks = export.least_bytes <= old.least_bytes && export.most_bytes >= old.most_bytes;
        if export.size_bytes != old.size_bytes {
            let (is, was) = (export.size_bytes, old.size_bytes);
            return Err(format!("the export has {is} bytes now and had {was}: it is another one"));
        }
        if !export.can(needed) || !may_write || !blocks {
            return Err(String::from("the server can less than before"));
        }
        self.watch(socket, epoll)?;
        let (requests, bytes) = (self.session.pending(), self.session.unflushed_bytes());
        log::info!(
            "{}: connected again; {requests} requests go on, {bytes} bytes are written again",
            self.goal.path
        );
        self.tries = self.tries.max(1);
        self.hopeless = false;
        self.progress = Instant::now();
        self.session.connected(export.structured);
        Ok(())
    }

    /// Requests have waited too long.
    pub(super) fn is_overdue(&self, now: Instant, patience: Option<Duration>) -> bool {
        let waited = now.saturating_duration_since(self.progress);
        self.session.pending() > 0 && patience.is_some_and(|patience| waited >= patience)
    }

    /// They fail, and so does what comes until the server answers again.
    pub(super) fn give_up(&mut self, room: &mut impl Memory<Span>) {
        log::error!(
            "{}: the server does not answer: {} requests fail",
            self.goal.path,
            self.session.pending()
        );
        self.session.fail_all(error::EIO, room);
        self.hopeless = true;
        if self.is_up() {
            // What is sent late must not reach memory that is somebody else's by now.
            self.link = Link::Pausing(Instant::now());
        }
    }

    /// Nobody uses it any more: how to say good-bye, if anybody listens.
    pub(super) fn leave(self) -> Option<Errand> {
        let flush = self.session.unflushed_bytes() > 0;
        match self.link {
            Link::Up(socket) if self.session.is_idle() => {
                let export = *self.session.export();
                Some(Errand::Leave { socket, export, flush, goal: self.goal })
            }
            _ => None,
        }
    }
}

/// What the threads do.
pub(super) fn work(errand: Errand) -> Option<Answer> {
    match errand {
        Errand::Connect { number, use_count, goal } => {
            let result = goal.servers.connect(&goal.address);
            Some((number, use_count, result.map(|(stream, export)| (stream.into_fd(), export))))
        }
        Errand::Leave { socket, export, flush, goal } => {
            if let Err(why) = Blocking::leave(socket, export, flush, goal.purpose) {
                log::warn!("{}: the server did not flush at the end: {why}", goal.path);
            }
            None
        }
    }
}
