//! `vbdd nbd`: a process that serves one image to NBD clients and nobody else.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::{error, info, warn};

use super::PREFERRED_BYTES;
use super::client::address::is_remote;
use super::client::{Address as ImageAddress, Allowed, Place};
use super::server::{Address, Export, Listener, Server};
use crate::cli::nbd::NbdOptions;
use crate::clock::{Clock, TrimTimer};
use crate::error::Error;
use crate::hypervisor::{Host, NoGuests};
use crate::journal::NoJournals;
use crate::limits::{DATA_MEMORY_BYTES, STOP_PATIENCE};
use crate::pump::{DiskId, DiskPlan, Pump, PumpEvent};
use crate::reactor::{Reactor, Ready};
use crate::signals::{Signal, Signals};
use crate::storage::linux::{LinuxStorage, Options as StorageOptions};
use crate::storage::{Access, Opened, Storage};

/// Keys of the poller.
const STORAGE: usize = 0;
const SIGNALS: usize = 1;
const TRIM: usize = 2;
const SERVER: usize = 16;

struct Process {
    clock: Clock,
    reactor: Reactor,
    signals: Signals,
    trim_timer: TrimTimer,
    pump: Pump<Host, LinuxStorage>,
    server: Server,
    disk: DiskId,
    stopping: Option<Stopping>,
}

/// How far the end has come.
#[derive(Clone, Copy)]
struct Stopping {
    by: Duration,
    /// No client has a request in flight, and the image is being left clean.
    closing: bool,
    /// That is done; false if the data may not be durable.
    closed: Option<bool>,
}

/// Serves until a signal ends it.
///
/// # Errors
/// What keeps it from starting, with what to do about it; or from leaving the image durable and clean.
pub fn run(options: &NbdOptions) -> Result<(), Error> {
    env_logger::Builder::new()
        .filter_level(options.log_level)
        .parse_default_env()
        .format_timestamp_millis()
        .init();
    crate::daemon::raise_descriptor_limit();
    let signals = Signals::open()?;
    Process::open(options, signals)?.run()
}

impl Process {
    fn open(options: &NbdOptions, mut signals: Signals) -> Result<Process, Error> {
        let roots =
            if options.roots.is_empty() { own_roots(&options.image.path) } else { options.roots.clone() };
        let mut storage = LinuxStorage::new(&StorageOptions {
            engine: options.engine,
            roots,
            servers: own_server(&options.image.path),
            pool_bytes: DATA_MEMORY_BYTES,
            direct: options.direct,
            ..StorageOptions::default()
        })
        .map_err(|text| Error::new(text, ""))?;
        let mut reactor = Reactor::new()?;
        for fd in storage.fds() {
            // SAFETY: the storage keeps its descriptors open for life, and lives as long as the reactor.
            reactor.add(unsafe { BorrowedFd::borrow_raw(fd) }, STORAGE, false)?;
        }
        reactor.add(signals.fd(), SIGNALS, false)?;
        let opened = open_image(&mut storage, &mut reactor, &mut signals, options)?;
        let layers = storage.layers(opened.file);
        let mut pump = Pump::new(Host::NoGuests(NoGuests), storage, Box::new(NoJournals));
        // Clients see that this process dies, and know what they have flushed.
        pump.keep_nothing();
        let sectors = opened.size_bytes / formats::SECTOR_BYTES;
        let device = opened.identity.device();
        let plan = DiskPlan { device, ..DiskPlan::new(opened.file, sectors, options.read_only) };
        let disk = match layers {
            Some(layers) => pump.add_chain(&plan, layers),
            None => pump.add_disk(&plan),
        };
        let trim_timer = TrimTimer::new()?;
        reactor.add(trim_timer.as_fd(), TRIM, false)?;
        let mut server = Server::new(SERVER);
        server.add_export(Export {
            name: options.export.clone(),
            description: format!("{} image {}", options.image.format.name(), options.image.path),
            disk,
            sectors,
            read_only: options.read_only,
            preferred_bytes: opened.physical_block_bytes.max(PREFERRED_BYTES),
        });
        for address in &options.listen {
            let listener = Listener::open(address)?;
            info!("serving {} at {}", options.image.path, uri(&listener, &options.export));
            server.listen(listener, &mut reactor)?;
        }
        let clock = Clock::start();
        Ok(Process { clock, reactor, signals, trim_timer, pump, server, disk, stopping: None })
    }

    fn run(mut self) -> Result<(), Error> {
        let mut ready = Vec::new();
        loop {
            let now = self.clock.now();
            let more = self.turn(now);
            self.take_events();
            if let Some(end) = self.ended(now) {
                return end;
            }
            let timeout = if more || self.pump.has_work() { Some(Duration::ZERO) } else { self.timeout() };
            self.reactor.wait(timeout, &mut ready);
            for ready in ready.drain(..) {
                self.dispatch(ready);
            }
            // io_uring may have ended the wait without making its descriptor readable; asking it costs no system call.
            self.pump.storage.ready();
            self.trim_timer.set(&mut self.pump.storage);
        }
    }

    /// Takes what clients want to the disk, and the disk's answers to them. True when there is more to do at once.
    fn turn(&mut self, now: Duration) -> bool {
        self.server.turn(&mut self.pump, now, &mut self.reactor);
        let more = self.pump.turn(now);
        while let Some((token, result)) = self.pump.next_answer() {
            self.server.answered(token, result, &mut self.pump);
        }
        self.server.send(&mut self.pump, now, &mut self.reactor) || more
    }

    fn dispatch(&mut self, ready: Ready) {
        match ready.key {
            STORAGE => {}
            TRIM => self.trim_timer.fired(&mut self.pump),
            SIGNALS => {
                while let Some(signal) = self.signals.take() {
                    match signal {
                        Signal::Stop => self.stop(),
                        Signal::Report => {
                            let (clients, requests) = (self.server.clients(), self.server.in_flight());
                            info!("{clients} clients with {requests} requests in flight");
                        }
                    }
                }
            }
            _ => self.server.ready(ready),
        }
    }

    fn stop(&mut self) {
        if self.stopping.is_some() {
            return;
        }
        info!("stopping: finishing what is in flight");
        self.server.stop_listening(&mut self.reactor);
        self.server.close_all(&mut self.pump, &mut self.reactor);
        let by = self.clock.now() + STOP_PATIENCE;
        self.stopping = Some(Stopping { by, closing: false, closed: None });
    }

    fn take_events(&mut self) {
        while let Some(event) = self.pump.event() {
            match event {
                PumpEvent::Synced(_, durable) => {
                    if let Some(stopping) = &mut self.stopping {
                        stopping.closed = Some(durable);
                    }
                }
                PumpEvent::Corrupt(_, corruption) => error!(
                    "the image is damaged ({corruption}): it is not written any more, and what is damaged cannot be read"
                ),
                // They are about rings.
                PumpEvent::Drained(_) | PumpEvent::Misbehaved(..) | PumpEvent::StorageFailed(..) => {}
            }
        }
    }

    fn ended(&mut self, now: Duration) -> Option<Result<(), Error>> {
        let stopping = self.stopping.as_mut()?;
        if !stopping.closing && self.server.in_flight() == 0 {
            stopping.closing = true;
            self.pump.close_disk(self.disk);
        }
        match stopping.closed {
            Some(true) => {
                info!("stopped: everything is answered and durable");
                Some(Ok(()))
            }
            Some(false) => Some(Err(Error::new("the last writes may not be durable", "see the log"))),
            None if now >= stopping.by => {
                let seconds = STOP_PATIENCE.as_secs();
                Some(Err(Error::new(format!("storage did not answer for {seconds} s"), "")))
            }
            None => None,
        }
    }

    fn timeout(&self) -> Option<Duration> {
        let stopping = self.stopping.map(|stopping| stopping.by);
        let deadlines = [self.server.deadline(), self.pump.deadline(), stopping];
        let first = deadlines.into_iter().flatten().min()?;
        Some(first.saturating_sub(self.clock.now()))
    }
}

/// The server of an image that lies on one.
fn own_server(path: &str) -> Vec<Allowed> {
    let place = ImageAddress::parse(path).ok().map(|address| address.place);
    let allowed = place.and_then(|place| match place {
        Place::Unix(socket) => Some(Allowed::Sockets(Path::new(&socket).parent()?.into())),
        Place::Tcp { host, port } => Some(Allowed::Host { host, port }),
    });
    allowed.into_iter().collect()
}

/// The image's directory, and that of the file that it stands for.
fn own_roots(path: &str) -> Vec<PathBuf> {
    if is_remote(path) {
        return Vec::new();
    }
    let real = std::fs::canonicalize(path).ok();
    let both = [Some(PathBuf::from(path)), real];
    let mut roots: Vec<PathBuf> =
        both.iter().flatten().filter_map(|path| Some(path.parent()?.into())).collect();
    roots.dedup();
    roots
}

fn open_image(
    storage: &mut LinuxStorage,
    reactor: &mut Reactor,
    signals: &mut Signals,
    options: &NbdOptions,
) -> Result<Opened, Error> {
    let access = if options.read_only { Access::ReadOnly } else { Access::ReadWrite };
    storage.open_image(0, &options.image, access);
    let mut ready = Vec::new();
    let (_, result) = loop {
        if let Some(opened) = storage.opened() {
            break opened;
        }
        reactor.wait(None, &mut ready);
        ready.clear();
        storage.ready();
        if signals.take() == Some(Signal::Stop) {
            return Err(Error::new("stopped before the image was open", ""));
        }
    };
    let opened = result.map_err(|error| Error::new(error.to_string(), ""))?;
    let path = &options.image.path;
    if !opened.locked {
        return Err(Error::new(
            format!("{path} is locked by another program"),
            "stop that, or use --read-only",
        ));
    }
    if opened.size_bytes < formats::SECTOR_BYTES {
        return Err(Error::new(format!("{path} is smaller than one sector of 512 bytes"), ""));
    }
    let ragged = opened.size_bytes % formats::SECTOR_BYTES;
    if ragged > 0 {
        warn!("{path}: the last {ragged} bytes are no whole sector; clients do not see them");
    }
    Ok(opened)
}

/// How clients name what is served there.
fn uri(listener: &Listener, export: &str) -> String {
    match listener.address() {
        Some(Address::Unix(path)) => {
            format!(
                "nbd+unix:///{export}?socket={}",
                std::path::absolute(&path).as_deref().unwrap_or(Path::new("")).display()
            )
        }
        Some(Address::Tcp(address)) => format!("nbd://{address}/{export}"),
        None => String::from("an unknown address"),
    }
}
