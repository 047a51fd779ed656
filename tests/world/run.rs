//! The world's loop: somebody acts, at random; when nobody can, time goes on; when nothing is left to come, it is stuck.

use std::rc::Rc;

use rings::Abi;
use vbdd::params::Format;

use super::backend::{Backend, Vbd};
use super::guest::{Habits, SaneGuest};
use super::model::DiskModel;
use super::{Actor, Shared, chains};

/// Steps after which a run is taken to go nowhere.
const STEPS_MAX: u64 = 2_000_000;

/// A world with a backend.
pub struct World {
    pub shared: Rc<Shared>,
    pub backend: Backend,
    pub steps: u64,
    latencies: Vec<Rc<std::cell::Cell<u64>>>,
}

impl World {
    pub fn new(seed: u64, pool_bytes: usize) -> World {
        let shared = Shared::new(seed);
        let backend = Backend::new(&shared, pool_bytes);
        World { shared, backend, steps: 0, latencies: Vec::new() }
    }

    /// Makes an image and what its guest knows of it; answers with the model's index.
    pub fn add_image(&mut self, sectors: usize, read_only: bool) -> usize {
        let mut models = self.shared.models.borrow_mut();
        let name = format!("/images/{}", models.len());
        let image = self.shared.media.borrow_mut().create(&name, sectors, read_only);
        models.push(DiskModel::new(image, sectors, read_only));
        models.len() - 1
    }

    /// Makes an image with a format over a raw one that holds the model's first content.
    pub fn add_chain(&mut self, sectors: usize, format: Format) -> usize {
        let name = format!("/images/{}", self.shared.models.borrow().len());
        let image = chains::create(&self.shared, &name, sectors, format);
        let mut models = self.shared.models.borrow_mut();
        models.push(DiskModel::new(image, sectors, false));
        models.len() - 1
    }

    /// Adds a sane guest with a disk.
    pub fn add_guest(&mut self, habits: Habits) {
        let guest = SaneGuest::new(&self.shared, habits.clone());
        let model = self.shared.models.borrow()[habits.disk].clone();
        self.latencies.push(guest.latency_us_max.clone());
        self.backend.add(Vbd {
            image: model.image,
            sectors: model.size(),
            read_only: model.read_only,
            rings: guest.rings(),
        });
        self.shared.guests.borrow_mut().push(Box::new(guest));
    }

    /// The longest that any sane guest waited for an answer.
    pub fn latency_us_max(&self) -> u64 {
        self.latencies.iter().map(|latency| latency.get()).max().unwrap_or(0)
    }

    pub fn add_actor(&mut self, actor: Box<dyn Actor>) {
        self.shared.guests.borrow_mut().push(actor);
    }

    /// Lets somebody act. `Ok(false)` when nobody could, and nothing is to come.
    pub fn step(&mut self) -> Result<bool, String> {
        self.steps += 1;
        if self.steps > STEPS_MAX {
            return Err(format!("the world goes on and on: {}", self.describe()));
        }
        self.shared.check()?;
        let shared = self.shared.clone();
        if shared.chance(1, 8) {
            shared.clock.advance_to(shared.clock.now_us() + shared.below(50));
        }
        let wants = self.backend.wants_turn();
        if wants && shared.chance(1, 2) {
            self.backend.turn();
        } else if !shared.let_one_act() && !self.any_acts() {
            if wants {
                self.backend.turn();
            } else if !self.sleep() {
                return Ok(false);
            }
        }
        self.shared.check()?;
        Ok(true)
    }

    fn any_acts(&self) -> bool {
        let mut guests = self.shared.guests.borrow_mut();
        guests.iter_mut().any(|guest| guest.act(&self.shared))
    }

    /// Moves time to the next thing that happens by itself.
    fn sleep(&self) -> bool {
        let now = self.shared.clock.now_us();
        let guests = self.shared.guests.borrow();
        let times = guests.iter().filter_map(|guest| guest.wakes_at()).chain(self.backend.wakes_at());
        match times.filter(|at| *at > now).min() {
            Some(at) => self.shared.clock.advance_to(at),
            None => return false,
        }
        true
    }

    pub fn finished(&self) -> bool {
        self.shared.guests.borrow().iter().all(|guest| guest.finished())
    }

    fn describe(&self) -> String {
        let guests = self.shared.guests.borrow();
        let guests: Vec<String> = guests.iter().map(|guest| guest.describe()).collect();
        let media = self.shared.media.borrow().in_flight();
        let unanswered =
            |line: &super::backend::Line| self.backend.pump.as_ref()?.unanswered(line.queue?).into();
        let taken: Vec<Option<usize>> = self.backend.lines.iter().map(unanswered).collect();
        let deadline = self.backend.pump.as_ref().and_then(|pump| pump.deadline());
        format!(
            "at {} us: {}; {media} transfers in flight; taken and not answered: {taken:?}; deadline {deadline:?}; {}",
            self.shared.clock.now_us(),
            guests.join("\n  "),
            self.shared.xen.borrow().describe_ports()
        )
    }

    /// Runs until every guest has what it wants; a process that dies has a successor at once.
    pub fn run(&mut self) -> Result<(), String> {
        self.run_until(World::finished)
    }

    pub fn run_until(&mut self, end: impl Fn(&World) -> bool) -> Result<(), String> {
        while !end(self) {
            while self.backend.pump.is_none() {
                self.backend.start();
            }
            if !self.step()? && !end(self) {
                return Err(format!("stuck: {}", self.describe()));
            }
        }
        self.shared.check()
    }

    /// Closes every queue, waits for it, detaches it, and checks that nothing is left over. A process that dies of it has
    /// a successor that goes on.
    pub fn close(&mut self) -> Result<(), String> {
        while self.backend.lines.iter().any(|line| !line.gone) {
            if self.backend.pump.is_none() && !self.backend.start() {
                continue;
            }
            self.shared.check()?;
            for at in 0..self.backend.lines.len() {
                let line = &self.backend.lines[at];
                if let (Some(queue), false) = (line.queue, line.drained) {
                    self.backend.with(|pump| pump.close(queue));
                }
            }
            self.wait_drained()?;
            for at in 0..self.backend.lines.len() {
                self.backend.detach(at, true);
            }
        }
        if !self.shared.media.borrow().formats.is_empty() {
            self.close_disks()?;
        }
        self.shared.check()?;
        if !self.shared.vault.borrow().names().is_empty() {
            return Err("a journal is left over".to_owned());
        }
        self.backend.check_empty()
    }

    /// Leaves the images clean.
    fn close_disks(&mut self) -> Result<(), String> {
        while self.backend.pump.is_none() {
            self.backend.start();
        }
        let disks = self.backend.disks.clone();
        self.backend.synced.clear();
        for disk in &disks {
            self.backend.with(|pump| pump.close_disk(*disk));
        }
        while self.backend.synced.len() < disks.len() {
            if !self.step()? {
                return Err(format!("never closed: {}", self.describe()));
            }
        }
        match self.backend.synced.iter().all(|(_, durable)| *durable) {
            true => Ok(()),
            false => Err("an image was not closed well".to_owned()),
        }
    }

    /// The domain of a vbd dies, and its queues are aborted. No copy may touch the domain from then on.
    pub fn destroy(&mut self, vbd: usize) {
        let domain = self.backend.vbds[vbd].rings[0].domain;
        self.shared.guests.borrow_mut().retain(|guest| guest.domain() != domain);
        self.shared.xen.borrow_mut().destroy_domain(domain);
        for at in 0..self.backend.lines.len() {
            if let (true, Some(queue)) = (self.backend.lines[at].vbd == vbd, self.backend.lines[at].queue) {
                self.backend.with(|pump| pump.abort(queue));
            }
        }
        let mut xen = self.shared.xen.borrow_mut();
        xen.aborted.insert(domain);
        // Pages that the world's storage still moves data to and from go with the last transfer; a file in memory, of which
        // alone that may be, has none when its queue is aborted.
        let moves = self.backend.persistent && self.shared.media.borrow().in_flight() > 0;
        if xen.maps_of(domain) > 0 && !moves {
            self.shared.fail("an aborted queue keeps the guest's pages");
        }
    }

    /// Runs until every attached queue is drained.
    pub fn wait_drained(&mut self) -> Result<(), String> {
        while self.backend.lines.iter().any(|line| line.queue.is_some() && !line.drained) {
            if !self.step()? {
                return Err(format!("never drained: {}", self.describe()));
            }
        }
        Ok(())
    }

    /// Checks every sector of every disk while nothing is in flight.
    pub fn check_media(&self) -> Result<(), String> {
        for model in self.shared.models.borrow().iter() {
            let content = chains::contents(&self.shared, model.image)?;
            for sector in 0..model.size() {
                model.check_now(sector, &content[sector as usize]).map_err(|what| {
                    format!("{}: {what}", self.shared.media.borrow().image(model.image).path)
                })?;
            }
        }
        Ok(())
    }

    /// Ends the world by power loss, and checks that every flush that was acknowledged held.
    pub fn lose_power(&mut self, torn: bool) -> Result<(), String> {
        self.backend.pump = None;
        let shared = &self.shared;
        shared.media.borrow_mut().power_loss(torn, &mut |n| shared.index(n));
        for model in shared.models.borrow().iter() {
            let content = chains::contents(shared, model.image)?;
            for sector in 0..model.size() {
                model.check_survivor(sector, &content[sector as usize], torn)?;
            }
        }
        Ok(())
    }
}

impl Drop for World {
    /// Guests and shared world name each other.
    fn drop(&mut self) {
        self.backend.pump = None;
        self.shared.guests.borrow_mut().clear();
        self.shared.xen.borrow_mut().process_died();
    }
}

/// A world of sane guests, drawn from the seed: disks, queues, ABIs, ring sizes, depths, mixes.
pub fn sane_world(seed: u64, requests: u32) -> World {
    sane_world_on(seed, requests, false)
}

/// The same; with `formats`, on images that have one. These are never discarded from: what reads as zero then is another
/// matter than with raw images.
pub fn sane_world_on(seed: u64, requests: u32, formats: bool) -> World {
    // The smallest arena holds one chunk: 256 pages, 23 of the largest requests.
    let mut world = World::new(seed, 1 << 20);
    let shared = world.shared.clone();
    // Images in memory, in two of three worlds; now and then they cannot be reached.
    shared.direct.set([(0, 0), (512, 20), (1024, 100)][shared.index(3)]);
    world.backend.persistent = shared.chance(1, 2);
    let persistent = world.backend.persistent;
    let guests = 1 + shared.below(3);
    world.backend.in_order = shared.chance(1, 4);
    let in_order = world.backend.in_order;
    for n in 0..guests {
        let sectors = 200 + shared.index(300);
        let disk = match (formats, shared.index(4)) {
            (false, _) => world.add_image(sectors, false),
            (true, 0) => world.add_chain(sectors, Format::Vhd),
            (true, _) => world.add_chain(sectors, Format::Qcow2),
        };
        let abi = [Abi::X86_64, Abi::X86_32, Abi::Arm][shared.index(3)];
        world.add_guest(Habits {
            queues: 1 + shared.index(3),
            abi,
            ring_pages: 1 << shared.below(5),
            requests,
            frames: [40, 360][shared.index(2)],
            depth: [1, 4, 32, 512][shared.index(4)],
            segments_max: 1 + shared.below(11),
            indirect: [0, 4, 12][shared.index(3)],
            indirect_max: 1 + shared.below(60),
            reads: shared.below(12),
            flushes: shared.below(4),
            flushes_with_data: shared.below(3),
            discards: if formats { 0 } else { shared.below(3) },
            barriers: shared.below(2),
            odd: shared.below(2),
            persistent,
            in_order,
            ..Habits::new(n as u16 + 1, disk)
        });
    }
    world
}
