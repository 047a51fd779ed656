//! `vbdd serve`: the process around the backend. Opens what the machine offers, waits, and feeds the backend.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use log::{info, warn};

use crate::backend::{Backend, Measured, Options, disks_that_fit};
use crate::cli::serve::{PlaceOption, ServeOptions};
use crate::clock::{Clock, TrimTimer};
use crate::control;
use crate::error::Error;
use crate::hypervisor::{Host, LinuxHypervisor};
use crate::journal::JournalDirectory;
use crate::limits::{CONTROL_SESSIONS_MAX, DATA_MEMORY_BYTES, NBD_MEMORY_BYTES, STOP_PATIENCE};
use crate::nbd::guests::Exporter;
use crate::owners;
use crate::reactor::{Reactor, Ready};
use crate::signals::{Signal, Signals};
use crate::storage::linux::{LinuxStorage, Options as StorageOptions};
use crate::vbd::{Address, Config, Kind, Place};
use crate::xenbus::{self, Xenbus};

/// Keys of the poller; the control door has those from [`CONTROL`] on.
const EVENTS: usize = 0;
const STORE: usize = 1;
const STORAGE: usize = 2;
const SIGNALS: usize = 3;
const TRIM: usize = 4;
const CONTROL: usize = 16;
const NBD: usize = CONTROL + 1 + CONTROL_SESSIONS_MAX;

struct Daemon {
    clock: Clock,
    reactor: Reactor,
    xenbus: Xenbus,
    connections_made: u64,
    polls_writable: bool,
    signals: Signals,
    control: control::Server,
    backend: Backend<Host, LinuxStorage>,
    nbd: Option<Exporter>,
    stop_by: Option<Duration>,
    trim_timer: TrimTimer,
}

/// Serves until a signal ends it.
///
/// # Errors
/// What keeps it from starting, with what to do about it.
pub fn serve(options: &ServeOptions) -> Result<(), Error> {
    env_logger::Builder::new()
        .filter_level(options.log_level)
        .parse_default_env()
        .format_timestamp_millis()
        .init();
    info!("vbdd {} starts", env!("CARGO_PKG_VERSION"));
    let mut claims = Vec::new();
    for kind in &options.kinds {
        owners::check(std::path::Path::new("/"), kind)?;
        claims.push(owners::claim(kind)?);
    }
    raise_descriptor_limit();
    let signals = Signals::open()?;
    let Some(mut daemon) = Daemon::open(options, signals)? else { return Ok(()) };
    daemon.run();
    Ok(())
}

impl Daemon {
    /// Opens everything; `None` if a signal ended the wait for xenstore.
    fn open(options: &ServeOptions, mut signals: Signals) -> Result<Option<Daemon>, Error> {
        let clock = Clock::start();
        let hypervisor = LinuxHypervisor::open()?;
        let journals = JournalDirectory::open(&options.state_dir)?;
        let nbd_memory = usize::try_from(NBD_MEMORY_BYTES).unwrap_or(0);
        let nbd_memory = if options.export_dir.is_some() { nbd_memory } else { 0 };
        let storage = LinuxStorage::new(&StorageOptions {
            engine: options.engine,
            roots: options.roots.clone(),
            servers: options.servers.clone(),
            server_patience: options.server_patience,
            pool_bytes: DATA_MEMORY_BYTES + nbd_memory,
            ..StorageOptions::default()
        })
        .map_err(|text| Error::new(text, ""))?;
        info!("storage: {}", storage.engine_text());
        let mut reactor = Reactor::new()?;
        reactor.add(hypervisor.events_fd(), EVENTS, false)?;
        reactor.add(signals.fd(), SIGNALS, false)?;
        for fd in storage.fds() {
            // SAFETY: the storage keeps its descriptors open for life, and lives as long as the reactor.
            reactor.add(unsafe { BorrowedFd::borrow_raw(fd) }, STORAGE, false)?;
        }
        let trim_timer = TrimTimer::new()?;
        reactor.add(trim_timer.as_fd(), TRIM, false)?;
        let control = control::Server::open(&options.state_dir, CONTROL, &mut reactor)?;
        let nbd = match &options.export_dir {
            Some(directory) => Some(Exporter::open(directory, NBD, &mut reactor)?),
            None => None,
        };
        let store = xenbus::Options { path: options.xenstore.clone(), seed: seed() };
        let mut xenbus = Xenbus::open(&store, 0).map_err(|error| Error::new(error.to_string(), ""))?;
        info!("xenstore: {}", xenbus.place().display());
        let Some(first_events) = wait_for_domain(&mut xenbus, &mut signals, clock)? else {
            return Ok(None);
        };
        if let Some(fd) = xenbus.fd() {
            reactor.add(fd, STORE, false)?;
        }
        let own_domain = xenbus.session().domain().unwrap_or(0);
        let place = match options.place {
            PlaceOption::Dom0 => Place::Dom0,
            PlaceOption::DriverDomain => Place::DriverDomain,
            PlaceOption::Auto if own_domain == 0 => Place::Dom0,
            PlaceOption::Auto => Place::DriverDomain,
        };
        info!("serving {} as domain {own_domain}, {place:?}", options.kinds.join(", "));
        if own_domain != 0 {
            let (nodes, watches) = options.quotas;
            let kinds = u32::try_from(options.kinds.len()).unwrap_or(0);
            let disks = disks_that_fit(nodes, watches, kinds);
            info!(
                "about {disks} disks fit into this domain's share of xenstore, if that is {nodes} nodes and {watches} watches"
            );
        }
        let mut vbd = Config::new(own_domain, place);
        vbd.terms = options.terms(vbd.terms);
        vbd.terms.offered.persistent = options.persistent_grants;
        let kinds = options.kinds.iter().filter_map(|name| Kind::from_name(name)).collect();
        let (assume_clean, cache_mib) = (options.assume_clean, options.metadata_cache_mib);
        let options = Options { kinds, vbd };
        let mut backend =
            Backend::new(options, Host::Xen(hypervisor), storage, Box::new(journals), clock.now());
        backend.pump().set_metadata_cache((cache_mib as usize) << 20);
        if assume_clean {
            backend.pump().assume_clean();
        }
        for event in first_events {
            backend.deliver(xenbus.session(), event);
        }
        let connections_made = xenbus.connections_made();
        Ok(Some(Daemon {
            clock,
            reactor,
            xenbus,
            connections_made,
            polls_writable: false,
            signals,
            control,
            backend,
            nbd,
            stop_by: None,
            trim_timer,
        }))
    }

    fn run(&mut self) {
        let mut ready = Vec::new();
        loop {
            let now = self.clock.now();
            if let Some(nbd) = &mut self.nbd {
                nbd.receive(&mut self.backend, now, &mut self.reactor);
            }
            let more = self.backend.turn(self.xenbus.session(), now);
            let more =
                self.nbd.as_mut().is_some_and(|nbd| nbd.send(&mut self.backend, now, &mut self.reactor))
                    || more;
            let more = self.answer_control(now) || more;
            self.xenbus.flush(millis(now));
            self.poll_store();
            if self.ended(now) {
                return;
            }
            // What was just written may have been refused at once: no descriptor tells of that.
            let more = more || self.xenbus.session().has_events();
            let timeout = if more { Some(Duration::ZERO) } else { self.timeout() };
            self.reactor.wait(timeout, &mut ready);
            let now = self.clock.now();
            for ready in ready.drain(..) {
                self.dispatch(ready, now);
            }
            // io_uring may have ended the wait without making its descriptor readable; asking it costs no system call.
            self.backend.pump().storage.ready();
            self.trim_timer.set(&mut self.backend.pump().storage);
            if self.xenbus.timeout().is_some_and(|at| at <= millis(now)) {
                self.xenbus.handle_time(millis(now));
            }
        }
    }

    fn dispatch(&mut self, ready: Ready, now: Duration) {
        match ready.key {
            EVENTS => self.backend.pump().take_events(),
            STORE => {
                if ready.writable {
                    self.xenbus.handle_writable(millis(now));
                }
                if ready.readable {
                    self.xenbus.handle_readable(millis(now));
                }
            }
            STORAGE => {}
            TRIM => self.trim_timer.fired(self.backend.pump()),
            SIGNALS => self.take_signals(now),
            NBD.. => self.nbd.iter_mut().for_each(|nbd| nbd.ready(ready)),
            _ => self.control.ready(ready, now, &mut self.reactor),
        }
    }

    fn take_signals(&mut self, now: Duration) {
        while let Some(signal) = self.signals.take() {
            match signal {
                Signal::Stop if self.stop_by.is_none() => {
                    info!(
                        "stopping: finishing what is in flight; the rings stay connected for the next vbdd"
                    );
                    self.stop_by = Some(now + STOP_PATIENCE);
                    self.backend.stop();
                    if let Some(nbd) = &mut self.nbd {
                        nbd.stop(&mut self.backend, &mut self.reactor);
                    }
                }
                Signal::Stop => {}
                Signal::Report => {
                    for status in self.backend.status() {
                        info!("{status}");
                    }
                }
            }
        }
    }

    fn ended(&self, now: Duration) -> bool {
        let Some(stop_by) = self.stop_by else { return false };
        let nbd = self.nbd.as_ref().map_or(0, Exporter::in_flight);
        if self.backend.stopped() && nbd == 0 {
            info!("stopped: everything is answered and durable");
            return true;
        }
        if now >= stop_by {
            warn!(
                "stopped with requests in flight after {} s; the next vbdd repeats them from the journal",
                STOP_PATIENCE.as_secs()
            );
            return true;
        }
        false
    }

    /// Answers what the control door was asked. True if that made work for the backend.
    fn answer_control(&mut self, now: Duration) -> bool {
        let mut work = false;
        while let Some(request) = self.control.turn(now, &mut self.reactor) {
            let words: Vec<&str> = request.words.iter().map(String::as_str).collect();
            let answer = match words.as_slice() {
                ["status"] => self.backend.status_text(),
                ["status", "json"] => self.backend.status_json(),
                ["resize", disk] => {
                    work = true;
                    self.resize(disk)
                }
                ["version"] => format!("{{\"version\":\"{}\"}}", env!("CARGO_PKG_VERSION")),
                _ => {
                    let hint = "status, status json, resize KIND/GUEST/DEVID or version";
                    control::refusal("no such request", hint)
                }
            };
            self.control.answer(&request, answer);
        }
        work
    }

    /// Looks at the size of a disk's image; the guest is told if it is another.
    fn resize(&mut self, disk: &str) -> String {
        let own = self.xenbus.session().domain().unwrap_or(0);
        let path = if disk.starts_with('/') { disk.to_owned() } else { format!("backend/{disk}") };
        let Some((address, "")) = Address::parse(&path, own) else {
            return control::refusal(
                "that is no disk",
                "KIND/GUEST/DEVID as status shows it, vbd/7/51712 say",
            );
        };
        match self.backend.measure(address) {
            Ok(Measured { sectors, before }) => {
                format!("{{\"sectors\":{sectors},\"before\":{before}}}")
            }
            Err(reason) => control::refusal(reason, "see vbdd status"),
        }
    }

    /// Keeps the poller in step with the connection to xenstore, which may be another one, or blocked.
    fn poll_store(&mut self) {
        let made = self.xenbus.connections_made();
        let writable = self.xenbus.wants_write();
        let Some(fd) = self.xenbus.fd() else { return };
        let result = if made != self.connections_made {
            self.connections_made = made;
            self.reactor.add(fd, STORE, writable)
        } else if writable != self.polls_writable {
            self.reactor.modify(fd, STORE, writable)
        } else {
            return;
        };
        self.polls_writable = writable;
        if let Err(error) = result {
            warn!("{error}");
        }
    }

    fn timeout(&self) -> Option<Duration> {
        let store = self.xenbus.timeout().map(Duration::from_millis);
        let nbd = self.nbd.as_ref().and_then(Exporter::deadline);
        let deadlines = [store, self.backend.deadline(), self.control.deadline(), nbd, self.stop_by];
        let first = deadlines.into_iter().flatten().min()?;
        Some(first.saturating_sub(self.clock.now()))
    }
}

/// Waits until xenstore has told which domain this is. What else it told meanwhile is returned.
fn wait_for_domain(
    xenbus: &mut Xenbus,
    signals: &mut Signals,
    clock: Clock,
) -> Result<Option<Vec<xenbus::Event>>, Error> {
    let mut reactor = Reactor::new()?;
    reactor.add(signals.fd(), SIGNALS, false)?;
    let mut events = Vec::new();
    let mut polled = 0;
    let mut ready = Vec::new();
    loop {
        while let Some(event) = xenbus.session().event() {
            events.push(event);
        }
        if xenbus.session().domain().is_some() {
            return Ok(Some(events));
        }
        xenbus.flush(millis(clock.now()));
        if let Some(fd) = xenbus.fd()
            && polled != xenbus.connections_made()
        {
            polled = xenbus.connections_made();
            reactor.add(fd, STORE, false)?;
        }
        reactor.wait(Some(Duration::from_millis(200)), &mut ready);
        if ready.drain(..).any(|ready| ready.key == SIGNALS) && signals.take() == Some(Signal::Stop) {
            return Ok(None);
        }
        let now_ms = millis(clock.now());
        xenbus.handle_readable(now_ms);
        xenbus.handle_time(now_ms);
    }
}

/// Takes as many descriptors as may be had: each image takes one or two, and the usual soft limit is 1024 for programs that
/// call `select`.
pub(crate) fn raise_descriptor_limit() {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(errno) = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit) {
        warn!("cannot raise the limit on open files: {errno}; many disks may need more");
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Differs between processes, so that two that clash in xenstore do not clash for ever.
fn seed() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_nanos() & u128::from(u64::MAX)).unwrap_or(0))
        ^ u64::from(std::process::id()) << 32
}
