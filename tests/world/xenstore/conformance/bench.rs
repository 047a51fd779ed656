//! The bench that checks work on: our client on one connection, and bare messages on another.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path as FsPath;
use std::time::{Duration, Instant};

use ::xenstore::wire::{self, Decoder, MessageType};
use ::xenstore::{Edit, ErrorCode, Job, JobId, Outcome, Path, WatchToken};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vbdd::xenbus::{Event, Options, Xenbus};

use super::ensure;

/// How long anything may take: a Xen machine without hardware support is slow.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection on which messages are made by hand, one at a time.
#[derive(Debug)]
pub(super) struct Raw {
    fd: OwnedFd,
    decoder: Decoder,
    arrived: VecDeque<(wire::Header, Vec<u8>)>,
    last_request: u32,
}

impl Raw {
    fn open(place: &FsPath, socket: bool) -> Result<Raw, String> {
        let failed = |error: std::io::Error| format!("{}: {error}", place.display());
        let fd = if socket {
            OwnedFd::from(std::os::unix::net::UnixStream::connect(place).map_err(failed)?)
        } else {
            OwnedFd::from(std::fs::File::options().read(true).write(true).open(place).map_err(failed)?)
        };
        Ok(Raw { fd, decoder: Decoder::default(), arrived: VecDeque::new(), last_request: 0x7000_0000 })
    }

    /// Sends one message and waits for its reply.
    pub(super) fn ask(
        &mut self,
        kind: MessageType,
        transaction: u32,
        payload: &[u8],
    ) -> Result<Result<Vec<u8>, ErrorCode>, String> {
        let request = self.send(kind.number(), transaction, payload)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let Some((header, payload)) = self.next(deadline)? else {
                return Err(format!("no reply to {kind:?}"));
            };
            if header.kind == MessageType::WatchEvent.number() {
                continue;
            }
            ensure!(header.request == request, "reply to {} instead of {request}", header.request);
            ensure!(header.transaction == transaction, "the reply is of transaction {}", header.transaction);
            if header.kind == MessageType::Error.number() {
                return Ok(Err(ErrorCode::from_payload(&payload)));
            }
            ensure!(header.kind == kind.number(), "reply of type {} to {kind:?}", header.kind);
            return Ok(Ok(payload));
        }
    }

    /// Sends one message; its request number.
    pub(super) fn send(&mut self, kind: u32, transaction: u32, payload: &[u8]) -> Result<u32, String> {
        self.last_request += 7;
        let length = u32::try_from(payload.len()).map_err(|error| error.to_string())?;
        let header = wire::Header { kind, request: self.last_request, transaction, length };
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend_from_slice(payload);
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match rustix::io::write(&self.fd, rest) {
                Ok(written) => rest = &rest[written..],
                Err(Errno::INTR) => {}
                Err(error) => return Err(format!("write: {error}")),
            }
        }
        Ok(self.last_request)
    }

    /// The next message of any kind; `None` when none comes in time. A closed connection is an error.
    pub(super) fn next(&mut self, deadline: Instant) -> Result<Option<(wire::Header, Vec<u8>)>, String> {
        loop {
            if let Some(message) = self.arrived.pop_front() {
                return Ok(Some(message));
            }
            if !wait(self.fd.as_fd(), PollFlags::IN, deadline)? {
                return Ok(None);
            }
            let mut buffer = [0_u8; 4096];
            let bytes = match rustix::io::read(&self.fd, &mut buffer[..]) {
                Ok(0) => return Err("the connection was closed".to_owned()),
                Ok(bytes) => bytes,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(format!("read: {error}")),
            };
            let mut input = &buffer[..bytes];
            while let Some(message) = self.decoder.next(&mut input).map_err(|e| format!("{e:?}"))? {
                self.arrived.push_back(message);
            }
        }
    }

    pub(super) fn write(&mut self, path: &Path, value: &str) -> Result<(), String> {
        let payload = format!("{path}\0{value}");
        self.ask(MessageType::Write, 0, payload.as_bytes())?
            .map(drop)
            .map_err(|code| format!("write: {code}"))
    }

    /// Starts a transaction; its number.
    pub(super) fn start(&mut self) -> Result<u32, String> {
        let reply = self.ask(MessageType::TransactionStart, 0, b"\0")?;
        let text = reply.map_err(|code| format!("transaction start: {code}"))?;
        let text = String::from_utf8_lossy(&text);
        text.trim_end_matches('\0').parse().map_err(|_| format!("transaction number {text:?}"))
    }
}

/// Where checks work.
#[derive(Debug)]
pub(super) struct Bench {
    pub(super) raw: Raw,
    pub(super) xenbus: Xenbus,
    pub(super) domain: u16,
    pub(super) socket: bool,
    /// Another domain that exists: real servers drop permissions for those that do not.
    pub(super) peer: Option<u16>,
    root: Path,
    /// The directory of the check at work.
    pub(super) scratch: Path,
    checks: u32,
    started: Instant,
    /// Watch events that came while something else was waited for.
    events: VecDeque<(WatchToken, Path)>,
}

impl Bench {
    pub(super) fn open(place: Option<&FsPath>) -> Result<Bench, String> {
        let options = Options { path: place.map(FsPath::to_path_buf), seed: 1 };
        let xenbus = Xenbus::open(&options, 0).map_err(|error| error.to_string())?;
        let socket = !xenbus.is_device();
        let raw = Raw::open(xenbus.place(), socket)?;
        let root = Path::parse("/").map_err(|error| error.to_string())?;
        let mut bench = Bench {
            raw,
            xenbus,
            domain: 0,
            socket,
            peer: None,
            scratch: root.clone(),
            root,
            checks: 0,
            started: Instant::now(),
            events: VecDeque::new(),
        };
        bench.until(|_, event| matches!(event, Event::Reset).then_some(()))?;
        bench.domain = bench.xenbus.session().domain().ok_or("the own domain stays unknown")?;
        let root = format!("/local/domain/{}/data/vbdd-check-{}", bench.domain, std::process::id());
        bench.root = path(&root)?;
        bench.peer = bench.find_peer()?;
        Ok(bench)
    }

    fn find_peer(&mut self) -> Result<Option<u16>, String> {
        if !self.privileged() {
            return Ok(Some(0));
        }
        for domain in 1..64_u16 {
            let payload = format!("{domain}\0");
            let reply = self.raw.ask(MessageType::IsDomainIntroduced, 0, payload.as_bytes())?;
            if reply == Ok(b"T\0".to_vec()) {
                return Ok(Some(domain));
            }
        }
        Ok(None)
    }

    /// A directory of its own for the next check.
    pub(super) fn fresh(&mut self) -> Result<(), String> {
        self.checks += 1;
        self.scratch = self.root.child(&format!("c{}", self.checks)).map_err(|error| error.to_string())?;
        self.events.clear();
        match self.run(Job::Edit(Edit::Mkdir(self.scratch.clone())))? {
            Outcome::Done => Ok(()),
            other => Err(format!("no scratch directory {}: {other:?}", self.scratch)),
        }
    }

    pub(super) fn clean(&mut self) {
        let root = self.root.clone();
        let _ = self.run(Job::Edit(Edit::Remove(root)));
    }

    pub(super) fn privileged(&self) -> bool {
        self.domain == 0
    }

    /// A node of the check.
    pub(super) fn at(&self, name: &str) -> Result<Path, String> {
        self.scratch.child(name).map_err(|error| error.to_string())
    }

    /// A second connection for bare messages.
    pub(super) fn another(&self) -> Result<Raw, String> {
        Raw::open(self.xenbus.place(), self.socket)
    }

    pub(super) fn submit(&mut self, job: Job) -> Result<JobId, String> {
        let id = self.xenbus.session().submit(job).map_err(|error| error.to_string())?;
        let now_ms = self.now_ms();
        self.xenbus.flush(now_ms);
        Ok(id)
    }

    /// Runs one job to its end.
    pub(super) fn run(&mut self, job: Job) -> Result<Outcome, String> {
        let wanted = self.submit(job)?;
        self.outcome(wanted)
    }

    pub(super) fn outcome(&mut self, wanted: JobId) -> Result<Outcome, String> {
        self.until(|_, event| match event {
            Event::Job { id, outcome } if *id == wanted => Some(outcome.clone()),
            _ => None,
        })
    }

    pub(super) fn write(&mut self, name: &str, value: &str) -> Result<(), String> {
        let job = Job::Edit(Edit::Write(self.at(name)?, value.as_bytes().to_vec()));
        match self.run(job)? {
            Outcome::Done => Ok(()),
            other => Err(format!("writing {name}: {other:?}")),
        }
    }

    pub(super) fn remove(&mut self, name: &str) -> Result<(), String> {
        match self.run(Job::Edit(Edit::Remove(self.at(name)?)))? {
            Outcome::Done => Ok(()),
            other => Err(format!("removing {name}: {other:?}")),
        }
    }

    /// The value of a node, as text.
    pub(super) fn read(&mut self, name: &str) -> Result<Result<String, ErrorCode>, String> {
        match self.run(Job::Read(vec![self.at(name)?]))? {
            Outcome::Read(mut values) => match values.pop() {
                Some(value) => Ok(value.map(|bytes| String::from_utf8_lossy(&bytes).into_owned())),
                None => Err("no value".to_owned()),
            },
            other => Err(format!("reading {name}: {other:?}")),
        }
    }

    pub(super) fn list(&mut self, name: &str) -> Result<Result<Vec<String>, Outcome>, String> {
        match self.run(Job::List(self.at(name)?))? {
            Outcome::Listed(mut names) => {
                names.sort();
                Ok(Ok(names))
            }
            other => Ok(Err(other)),
        }
    }

    /// Watches and waits for the event at registration.
    pub(super) fn watch(&mut self, at: &Path, token: WatchToken) -> Result<(), String> {
        self.xenbus.session().watch(at, token).map_err(|error| error.to_string())?;
        let now_ms = self.now_ms();
        self.xenbus.flush(now_ms);
        let first = self.event(token)?;
        ensure!(first == *at, "the event at registration is for {first}");
        Ok(())
    }

    pub(super) fn unwatch(&mut self, at: &Path, token: WatchToken) {
        self.xenbus.session().unwatch(at, token);
        let now_ms = self.now_ms();
        self.xenbus.flush(now_ms);
    }

    /// The next event of a watch.
    pub(super) fn event(&mut self, token: WatchToken) -> Result<Path, String> {
        if let Some(at) = self.events.iter().position(|(t, _)| *t == token)
            && let Some((_, path)) = self.events.remove(at)
        {
            return Ok(path);
        }
        self.until(|_, event| match event {
            Event::Watch { token: t, path } if *t == token => Some(path.clone()),
            _ => None,
        })
    }

    /// All events of a watch up to that of a node made for the purpose: nothing that came before it is still on its way.
    pub(super) fn events(&mut self, token: WatchToken, watched: &Path) -> Result<Vec<Path>, String> {
        self.checks += 1;
        let last = watched.child(&format!("last{}", self.checks)).map_err(|error| error.to_string())?;
        match self.run(Job::Edit(Edit::Mkdir(last.clone())))? {
            Outcome::Done => {}
            other => return Err(format!("{other:?}")),
        }
        let mut seen = Vec::new();
        loop {
            let event = self.event(token)?;
            if event == last {
                return Ok(seen);
            }
            seen.push(event);
        }
    }

    pub(super) fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// One turn of reading what has arrived, without answering: what the client wants to say then is not sent yet.
    pub(super) fn wait_readable(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        let fd = self.xenbus.fd().ok_or("the connection was lost")?;
        let came = wait(fd, PollFlags::IN, deadline)?;
        ensure!(came, "nothing came");
        Ok(())
    }

    /// Moves bytes until `found` finds what it wants in an event. Watch events that it does not want are kept.
    pub(super) fn until<T>(
        &mut self,
        mut found: impl FnMut(&mut Xenbus, &Event) -> Option<T>,
    ) -> Result<T, String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            while let Some(event) = self.xenbus.session().event() {
                if let Some(found) = found(&mut self.xenbus, &event) {
                    return Ok(found);
                }
                match event {
                    Event::Watch { token, path } => self.events.push_back((token, path)),
                    Event::WatchFailed { path, code, .. } => return Err(format!("watch of {path}: {code}")),
                    Event::Reset if self.checks > 0 => return Err("the connection was lost".to_owned()),
                    Event::Reset | Event::Job { .. } => {}
                }
            }
            let due = self.xenbus.timeout().map(|at_ms| self.started + Duration::from_millis(at_ms));
            let until = due.map_or(deadline, |due| due.min(deadline));
            let flags =
                if self.xenbus.wants_write() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            let ready = match self.xenbus.fd() {
                Some(fd) => wait(fd, flags, until)?,
                None => return Err("the connection was lost".to_owned()),
            };
            let now_ms = self.now_ms();
            self.xenbus.handle_time(now_ms);
            if ready {
                self.xenbus.handle_readable(now_ms);
            } else {
                ensure!(Instant::now() < deadline, "nothing came within {PATIENCE:?}");
            }
        }
    }
}

/// Waits until a descriptor is ready; false when the time is over first.
fn wait(fd: BorrowedFd<'_>, flags: PollFlags, deadline: Instant) -> Result<bool, String> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that a timer that is due is due.
        let left = left + Duration::from_micros(999);
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(error) => return Err(format!("poll: {error}")),
        }
    }
}

pub(super) fn path(text: &str) -> Result<Path, String> {
    Path::parse(text).map_err(|error| format!("{text}: {error}"))
}
