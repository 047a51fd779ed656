//! A load on the storage layer alone, to be held against `fio`: random transfers at a fixed depth through
//! [`LinuxStorage`], waited for with the reactor's poller.
//!
//! `storage_load PATH|ADDRESS read|write DEPTH SECONDS [engine=auto] [block=4096] [wait=epoll|polling] [cached]` prints one line
//! of numbers.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use polling::{Event, Events, PollMode, Poller};
use rustix::event::epoll;
use vbdd::buffers::Span;
use vbdd::nbd::client::{Address, Allowed, Place};
use vbdd::storage::linux::{LinuxStorage, Options};
use vbdd::storage::{Access, Done, FileId, Io, IoKind, Opened, Storage};

/// What the command line asks for.
struct Load {
    path: String,
    kind: IoKind,
    depth: usize,
    time: Duration,
    block: u32,
    options: Options,
    bare: bool,
}

fn parse() -> Result<Load, String> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [path, kind, depth, seconds, rest @ ..] = words.as_slice() else {
        return Err("storage_load PATH read|write DEPTH SECONDS [engine=E] [block=BYTES] [wait=epoll|polling] [cached]".into());
    };
    let kind = match kind.as_str() {
        "read" => IoKind::Read,
        "write" => IoKind::Write,
        other => return Err(format!("{other}: say read or write")),
    };
    let mut options = Options::default();
    match Address::parse(path).map(|address| address.place) {
        Ok(Place::Unix(socket)) => {
            options.servers.extend(Path::new(&socket).parent().map(|parent| Allowed::Sockets(parent.into())));
        }
        Ok(Place::Tcp { host, port }) => options.servers.push(Allowed::Host { host, port }),
        Err(_) => options.roots.push(Path::new(path).parent().ok_or("the path must be absolute")?.into()),
    }
    let mut block = 4096;
    let mut bare = true;
    for word in rest {
        match word.split_once('=') {
            Some(("engine", engine)) => options.engine = engine.parse()?,
            Some(("block", bytes)) => block = bytes.parse().map_err(|_| "block=BYTES")?,
            Some(("wait", "epoll")) => bare = true,
            Some(("wait", "polling")) => bare = false,
            _ if word == "cached" => options.direct = false,
            _ => return Err(format!("{word}: unknown")),
        }
    }
    let depth = depth.parse().map_err(|_| "DEPTH must be a number")?;
    let seconds: f64 = seconds.parse().map_err(|_| "SECONDS must be a number")?;
    Ok(Load { path: path.clone(), kind, depth, time: Duration::from_secs_f64(seconds), block, options, bare })
}

/// User and system time of the whole process, kernel workers included.
fn cpu_time() -> Duration {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: getrusage fills the structure, which is plain numbers and zeroed.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    [usage.ru_utime, usage.ru_stime]
        .iter()
        .map(|time| {
            let microseconds = u64::try_from(time.tv_sec * 1_000_000 + time.tv_usec).unwrap_or(0);
            Duration::from_micros(microseconds)
        })
        .sum()
}

/// What waits for the storage's descriptors.
enum Waiter {
    /// The polling crate.
    Polling(Box<(Poller, Events)>),
    /// One `epoll_wait` for each wake-up.
    Epoll(std::os::fd::OwnedFd),
}

impl Waiter {
    fn new(storage: &LinuxStorage, bare: bool) -> std::io::Result<Waiter> {
        if bare {
            let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            for fd in storage.fds() {
                // SAFETY: the storage keeps its descriptors open as long as it lives.
                let fd = unsafe { BorrowedFd::borrow_raw(fd) };
                epoll::add(&epoll, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
            }
            return Ok(Waiter::Epoll(epoll));
        }
        let poller = Poller::new()?;
        for (key, fd) in storage.fds().enumerate() {
            // SAFETY: the storage keeps its descriptors open as long as it lives, which is as long as the poller.
            unsafe { poller.add_with_mode(fd, Event::readable(key), PollMode::Level) }?;
        }
        Ok(Waiter::Polling(Box::new((poller, Events::new()))))
    }

    /// Waits for any of them. An interruption counts as a wake-up: answers may have come with it.
    fn wait(&mut self) -> std::io::Result<()> {
        let result = match self {
            Waiter::Polling(both) => {
                both.1.clear();
                both.0.wait(&mut both.1, None).map(|_| ())
            }
            Waiter::Epoll(epoll) => {
                let mut events = [std::mem::MaybeUninit::<epoll::Event>::uninit(); 4];
                epoll::wait(epoll, &mut events, None).map(|_| ()).map_err(Into::into)
            }
        };
        match result {
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }
}

/// The load under way.
struct Driver {
    storage: LinuxStorage,
    waiter: Waiter,
    file: FileId,
    kind: IoKind,
    blocks: u64,
    block: u32,
    spans: Vec<Span>,
    dice: u64,
    done: u64,
    errors: u64,
    wakeups: u64,
}

impl Driver {
    fn wait(&mut self) -> std::io::Result<()> {
        self.waiter.wait()?;
        self.wakeups += 1;
        self.storage.ready();
        Ok(())
    }

    fn start(&mut self, slot: usize) {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        let place = (u128::from(self.dice) * u128::from(self.blocks)) >> 64;
        let offset_bytes = u64::try_from(place).unwrap_or(0) * u64::from(self.block);
        let span = self.spans[slot];
        self.storage.queue(Io { token: slot as u64, file: self.file, kind: self.kind, offset_bytes, span });
    }

    /// Runs for `time`; every finished transfer is replaced by a new one.
    fn run(&mut self, time: Duration) -> std::io::Result<()> {
        let mut free: VecDeque<usize> = (0..self.spans.len()).collect();
        let start = Instant::now();
        loop {
            while let Some(Done { token, result }) = self.storage.done() {
                self.done += 1;
                self.errors += u64::from(result.is_err());
                free.extend(usize::try_from(token).ok());
            }
            if start.elapsed() >= time {
                break;
            }
            if free.is_empty() {
                self.wait()?;
                continue;
            }
            while let Some(slot) = free.pop_front() {
                self.start(slot);
            }
            self.storage.submit();
        }
        while free.len() < self.spans.len() {
            match self.storage.done() {
                Some(done) => free.extend(usize::try_from(done.token).ok()),
                None => self.wait()?,
            }
        }
        Ok(())
    }
}

fn open(storage: &mut LinuxStorage, load: &Load) -> Result<Opened, String> {
    let access = if load.kind == IoKind::Write { Access::ReadWrite } else { Access::ReadOnly };
    storage.open(0, &load.path, access);
    loop {
        if let Some((_, result)) = storage.opened() {
            return result.map_err(|error| error.to_string());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn run() -> Result<(), String> {
    let load = parse()?;
    let mut storage = LinuxStorage::new(&load.options)?;
    let opened = open(&mut storage, &load)?;
    let waiter = Waiter::new(&storage, load.bare).map_err(|error| error.to_string())?;
    let spans: Option<Vec<Span>> = (0..load.depth).map(|_| storage.buffers().alloc(load.block)).collect();
    let spans = spans.ok_or("the buffers are too small for this depth")?;
    let mut driver = Driver {
        storage,
        waiter,
        file: opened.file,
        kind: load.kind,
        blocks: opened.size_bytes / u64::from(load.block),
        block: load.block,
        spans,
        dice: 0x9e37_79b9_7f4a_7c15 ^ u64::from(std::process::id()),
        done: 0,
        errors: 0,
        wakeups: 0,
    };
    let fail = |error: std::io::Error| error.to_string();
    driver.run(Duration::from_millis(200)).map_err(fail)?;
    (driver.done, driver.wakeups) = (0, 0);
    let (start, cpu) = (Instant::now(), cpu_time());
    driver.run(load.time).map_err(fail)?;
    let (wall, cpu) = (start.elapsed(), cpu_time().saturating_sub(cpu));
    #[allow(clippy::cast_precision_loss, reason = "for people")]
    let (done, wakeups) = (driver.done as f64, driver.wakeups as f64);
    println!(
        "iops={:.0} cpu_ns={:.0} wakeups={:.2} errors={} direct={} engine={:?}",
        done / wall.as_secs_f64(),
        cpu.as_secs_f64() * 1e9 / done,
        wakeups / done,
        driver.errors,
        opened.direct,
        driver.storage.engine_text(),
    );
    if driver.errors > 0 { Err(format!("{} transfers failed", driver.errors)) } else { Ok(()) }
}

fn main() -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            std::process::ExitCode::FAILURE
        }
    }
}
