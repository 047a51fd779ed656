//! The way of a request, measured: simulated guests in this process, the real pump, reactor, journal and storage.
//!
//! `request_path [--file PATH] [--format raw|qcow2|vhd] [--straight] [--write] [--sequential] [--depth N] [--disks N] [--requests N] [--block BYTES] [--engine E]
//! [--wait polling|epoll] [--stages] [--idle SECONDS]` prints one line of `name=value` pairs, then tables if asked for.
//! `--straight` copies straight to and from files in memory, as a real hypervisor does. The file must exist and is OVERWRITTEN by `--write`.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "../../tests/counting/mod.rs"]
mod counting;
mod guest;
mod machine;
mod measure;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use guest::{Guest, Habit};
use machine::{GuestMemory, LocalHypervisor, Timed};
use measure::{CALLS, Call, Clock, Stage};
use rings::{Abi, Offers};
use vbdd::journal::JournalDirectory;
use vbdd::params::{Format, Image};
use vbdd::pump::{DiskPlan, Pump, RingPlan};
use vbdd::reactor::{Reactor, Ready, Waiting};
use vbdd::storage::engine::EngineChoice;
use vbdd::storage::linux::{LinuxStorage, Options};
use vbdd::storage::{Access, Opened, Storage};

/// Keys of the reactor, as the daemon has them.
const EVENTS: usize = 0;
const STORAGE: usize = 2;

struct Plan {
    file: PathBuf,
    format: Format,
    straight: bool,
    disks: usize,
    depth: u32,
    requests: u64,
    block_bytes: usize,
    write: bool,
    sequential: bool,
    engine: EngineChoice,
    waiting: Waiting,
    stages: bool,
    idle: Option<Duration>,
}

fn parse() -> Result<Plan, lexopt::Error> {
    use lexopt::prelude::*;
    let mut plan = Plan {
        file: PathBuf::new(),
        format: Format::Raw,
        straight: false,
        disks: 1,
        depth: 32,
        requests: 100_000,
        block_bytes: 4096,
        write: false,
        sequential: false,
        engine: EngineChoice::Auto,
        waiting: Waiting::default(),
        stages: false,
        idle: None,
    };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("file") => plan.file = arguments.value()?.into(),
            Long("format") => {
                let name = arguments.value()?.string()?;
                plan.format = Format::of_name(&name).ok_or("--format: raw, qcow2 or vhd")?;
            }
            Long("straight") => plan.straight = true,
            Long("disks") => plan.disks = arguments.value()?.parse()?,
            Long("depth") => plan.depth = arguments.value()?.parse()?,
            Long("requests") => plan.requests = arguments.value()?.parse()?,
            Long("block") => plan.block_bytes = arguments.value()?.parse()?,
            Long("write") => plan.write = true,
            Long("sequential") => plan.sequential = true,
            Long("engine") => plan.engine = arguments.value()?.parse()?,
            Long("wait") => {
                plan.waiting = match arguments.value()?.string()?.as_str() {
                    "polling" => Waiting::Polling,
                    "epoll" => Waiting::Epoll,
                    other => return Err(format!("--wait {other}: say polling or epoll").into()),
                }
            }
            Long("stages") => plan.stages = true,
            Long("idle") => plan.idle = Some(Duration::from_secs_f64(arguments.value()?.parse()?)),
            other => return Err(other.unexpected()),
        }
    }
    let pages = plan.block_bytes / machine::PAGE;
    if !(1..=256).contains(&pages) || !plan.block_bytes.is_multiple_of(machine::PAGE) {
        return Err("--block: 1 to 256 pages of 4096 bytes".into());
    }
    if !(1..=32).contains(&plan.depth) || plan.disks == 0 {
        return Err("--depth: 1 to 32, the slots of a ring; --disks: at least 1".into());
    }
    Ok(plan)
}

/// The process as the daemon builds it, without xenstore and control.
struct Process {
    pump: Pump<LocalHypervisor, Timed>,
    reactor: Reactor,
    ready: Vec<Ready>,
    guests: Vec<Guest>,
    clock: Rc<Clock>,
    started: Instant,
    troubles: u64,
}

impl Process {
    fn open(plan: &Plan, journals: &Path) -> Result<(Process, Opened), String> {
        let clock = Rc::new(Clock::new(plan.stages));
        let root = plan.file.parent().ok_or("--file must name a file by its absolute path")?;
        let options = Options { engine: plan.engine, roots: vec![root.to_path_buf()], ..Options::default() };
        let mut storage = Timed::new(LinuxStorage::new(&options)?, Rc::clone(&clock));
        let access = if plan.write { Access::ReadWrite } else { Access::ReadOnly };
        storage.straight = plan.straight;
        let opened = open(&mut storage, plan, access)?;
        storage.in_memory = !opened.direct && plan.file.starts_with("/dev/shm");
        let blocks = opened.size_bytes / plan.block_bytes as u64;
        if blocks < u64::from(plan.depth) {
            return Err(format!("{} is too small", plan.file.display()));
        }
        let (write, sequential, depth) = (plan.write, plan.sequential, plan.depth);
        let habit = Habit { write, sequential, depth, block_bytes: plan.block_bytes, blocks };
        let memory = GuestMemory::new(plan.disks * habit.guest_pages()).map_err(text)?;
        let hypervisor = LocalHypervisor::new(memory, Rc::clone(&clock)).map_err(text)?;
        let mut reactor = Reactor::waiting_by(plan.waiting).map_err(text)?;
        reactor.add(hypervisor.events_fd().as_fd(), EVENTS, false).map_err(text)?;
        for fd in storage.inner.fds() {
            // SAFETY: the storage keeps its descriptors open for life, and lives as long as the reactor.
            reactor.add(unsafe { BorrowedFd::borrow_raw(fd) }, STORAGE, false).map_err(text)?;
        }
        let directory = JournalDirectory::open(journals).map_err(text)?;
        let mut pump = Pump::new(hypervisor, storage, Box::new(directory));
        let mut guests = Vec::new();
        for number in 0..plan.disks {
            let file = if number == 0 { opened } else { open(&mut pump.storage, plan, access)? };
            let offers = Offers { indirect_segments: 256, ..Offers::NONE };
            let disk = DiskPlan::new(file.file, file.size_bytes / 512, !plan.write);
            let disk = DiskPlan { offers, ..disk };
            let disk = match pump.storage.layers(file.file) {
                Some(layers) => pump.add_chain(&disk, layers),
                None => pump.add_disk(&disk),
            };
            let first = u32::try_from(number * habit.guest_pages()).map_err(text)?;
            guests.push(Guest::new(memory, first, habit).ok_or("no guest memory")?);
            let plan = RingPlan {
                domain: 1,
                grants: vec![first],
                remote_port: 1,
                abi: Abi::X86_64,
                resume: false,
                journal: format!("guest-{number}"),
            };
            pump.attach(disk, &plan).map_err(|error| format!("{error:?}"))?;
        }
        let (ready, started) = (Vec::new(), Instant::now());
        Ok((Process { pump, reactor, ready, guests, clock, started, troubles: 0 }, opened))
    }

    /// Lets the guests send `requests` together, and serves until all are answered.
    fn serve(&mut self, requests: u64) {
        let each = requests.div_ceil(self.guests.len() as u64);
        for guest in &mut self.guests {
            guest.quota = each;
        }
        self.start(Guest::run);
        self.settle();
    }

    fn start(&mut self, how: fn(&mut Guest) -> bool) {
        for (number, guest) in self.guests.iter_mut().enumerate() {
            if how(guest) {
                self.pump.hypervisor.event(number);
            }
        }
    }

    /// The daemon's loop, with the guests running between its turns, until nothing is unanswered.
    fn settle(&mut self) {
        let mut owed = self.owed();
        while owed > 0 {
            let now = self.started.elapsed();
            let clock = Rc::clone(&self.clock);
            let more = clock.time(Stage::Turn, || self.pump.turn(now)) || self.pump.has_work();
            while self.pump.event().is_some() {
                self.troubles += 1;
            }
            clock.time(Stage::Guest, || self.run_guests());
            owed = self.owed();
            if owed == 0 {
                return;
            }
            self.wait(if more { Some(Duration::ZERO) } else { None });
        }
    }

    fn owed(&self) -> u64 {
        self.guests.iter().map(|guest| guest.quota + guest.in_flight()).sum()
    }

    fn run_guests(&mut self) {
        for (number, guest) in self.guests.iter_mut().enumerate() {
            if self.pump.hypervisor.take_notified(number) && guest.run() {
                self.pump.hypervisor.event(number);
            }
        }
    }

    fn wait(&mut self, timeout: Option<Duration>) {
        let clock = Rc::clone(&self.clock);
        clock.count(Call::Wait);
        clock.time(Stage::Wait, || self.reactor.wait(timeout, &mut self.ready));
        for ready in self.ready.drain(..) {
            match ready.key {
                EVENTS => self.pump.take_events(),
                _ => self.pump.storage.inner.ready(),
            }
        }
    }

    /// The bytes that guests see are those of the file.
    fn check(&mut self, file: &Path) -> Result<(), String> {
        let file = std::fs::File::open(file).map_err(text)?;
        for number in 0..self.guests.len() {
            if self.guests[number].send_marked() {
                self.pump.hypervisor.event(number);
            }
            self.settle();
            if !self.guests[number].compare(&file).map_err(text)? {
                return Err("the guest's data is not the file's".into());
            }
        }
        Ok(())
    }

    fn idle(&mut self, time: Duration) {
        let (before, end) = (measure::voluntary_switches(), Instant::now() + time);
        let mut waits = 0_u64;
        while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            self.wait(Some(left));
            self.pump.turn(self.started.elapsed());
            waits += 1;
        }
        // The last wait ends because the time is over, which is our doing: the daemon would sleep on.
        let switches = measure::voluntary_switches().saturating_sub(before);
        println!(
            "idle_s={} wakeups={} context_switches={}",
            time.as_secs_f64(),
            waits - 1,
            switches.saturating_sub(1)
        );
    }
}

fn open(storage: &mut Timed, plan: &Plan, access: Access) -> Result<Opened, String> {
    let image = Image { format: plan.format, path: plan.file.to_string_lossy().into_owned() };
    storage.open_image(0, &image, access);
    loop {
        if let Some((_, result)) = storage.opened() {
            return result.map_err(text);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[allow(clippy::cast_precision_loss, reason = "for people")]
fn each(total: u64, requests: u64) -> f64 {
    total as f64 / requests as f64
}

fn nanos_each(total: Duration, requests: u64) -> f64 {
    each(u64::try_from(total.as_nanos()).unwrap_or(u64::MAX), requests)
}

fn print_calls(clock: &Clock, plan: &Plan, requests: u64) {
    let per_wait = if plan.waiting == Waiting::Polling { 5 } else { 1 };
    let total: u64 = CALLS
        .iter()
        .map(|(call, _)| clock.calls(*call) * if matches!(call, Call::Wait) { per_wait } else { 1 })
        .sum();
    print!("calls={:.3}", each(total, requests));
    for (call, name) in CALLS {
        print!(" {name}={:.3}", each(clock.calls(call), requests));
    }
    println!();
}

fn print_stages(clock: &Clock, requests: u64) {
    let reading = measure::clock_reading();
    for (stage, name, inner) in measure::STAGES {
        if !matches!(stage, Stage::Turn) {
            let time = nanos_each(clock.net(stage, reading), requests);
            println!("stage {time:8.0} ns  {name}{}", if inner { " (in the turn)" } else { "" });
        }
    }
    let itself = nanos_each(clock.pump_itself(reading), requests);
    println!("stage {itself:8.0} ns  pump itself: take, parse, books, publish (in the turn)");
}

fn print_memory(when: &str, plan: &Plan, guest_pages: usize) {
    let guests_kib = plan.disks * guest_pages * 4;
    println!(
        "{when} rss_kib={} anonymous_kib={} file_kib={} shared_kib={} of_which_guests_kib={guests_kib}",
        measure::status("VmRSS"),
        measure::status("RssAnon"),
        measure::status("RssFile"),
        measure::status("RssShmem"),
    );
}

fn measure_path(plan: &Plan, journals: &Path) -> Result<(), String> {
    let (mut process, opened) = Process::open(plan, journals)?;
    if plan.format == Format::Raw {
        process.check(&plan.file)?;
    }
    process.serve((plan.requests / 10).max(1000));
    process.clock.reset();
    let answered = |process: &Process| process.guests.iter().map(|guest| guest.answered).sum::<u64>();
    let (done, allocations) = (answered(&process), counting::allocations());
    let merged = process.pump.storage.inner.merged();
    let (wall, (user, system)) = (Instant::now(), measure::cpu());
    process.serve(plan.requests);
    let (wall, (user_after, system_after)) = (wall.elapsed(), measure::cpu());
    let allocations = counting::allocations() - allocations;
    let requests = answered(&process) - done;
    let (user, system) = (user_after.saturating_sub(user), system_after.saturating_sub(system));
    println!(
        "requests={requests} wall_ns={:.0} cpu_ns={:.0} user_ns={:.0} system_ns={:.0} allocations={allocations} \
         direct={} engine={:?} waiting={:?}",
        nanos_each(wall, requests),
        nanos_each(user + system, requests),
        nanos_each(user, requests),
        nanos_each(system, requests),
        opened.direct,
        process.pump.storage.inner.engine_text(),
        plan.waiting,
    );
    println!("merged={:.3}", each(process.pump.storage.inner.merged() - merged, requests));
    print_calls(&process.clock, plan, requests);
    if plan.stages {
        print_stages(&process.clock, requests);
    }
    if let Some(time) = plan.idle {
        let pages = process.guests.first().map_or(0, |guest| guest.habit().guest_pages());
        print_memory("after_load", plan, pages);
        process.pump.storage.inner.trim();
        print_memory("after_trim", plan, pages);
        process.idle(time);
    }
    let errors: u64 = process.guests.iter().map(|guest| guest.errors).sum();
    if errors + process.troubles > 0 {
        return Err(format!("{errors} requests failed, the pump told of {} troubles", process.troubles));
    }
    Ok(())
}

fn main() -> std::process::ExitCode {
    let plan = match parse() {
        Ok(plan) => plan,
        Err(error) => {
            eprintln!("{error}");
            return std::process::ExitCode::FAILURE;
        }
    };
    // Journals live on tmpfs, as under /run.
    let journals = PathBuf::from(format!("/dev/shm/request-path-{}", std::process::id()));
    let result = measure_path(&plan, &journals);
    let _ = std::fs::remove_dir_all(&journals);
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            std::process::ExitCode::FAILURE
        }
    }
}
