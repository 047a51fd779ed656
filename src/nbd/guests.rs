//! The disks of guests as exports of `vbdd serve`: for backups and for a look inside. Read-only, as a guest uses them.

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::Duration;

use super::PREFERRED_BYTES;
use super::server::{Address as Place, Export, ExportId, Listener, Server};
use crate::backend::{Backend, OpenDisk};
use crate::error::Error;
use crate::hypervisor::Hypervisor;
use crate::pump::DiskId;
use crate::reactor::{Reactor, Ready};
use crate::storage::{FileId, Storage};
use crate::vbd::Address;

/// The socket's name within the directory.
pub const SOCKET_NAME: &str = "nbd";

/// What tells an open disk from every other: whose it is, which one, of which file, and how long.
type Key = (Address, DiskId, FileId, u64);

/// The server, and which disks it offers.
#[derive(Debug)]
pub struct Exporter {
    server: Server,
    known: BTreeMap<Key, ExportId>,
    stopped: bool,
}

impl Exporter {
    /// Listens in `directory`, which is made if it is missing. Keys of the poller begin at `first_key`.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn open(directory: &Path, first_key: usize, reactor: &mut Reactor) -> Result<Exporter, Error> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(|error| {
            Error::new(format!("cannot make {}: {error}", directory.display()), "see --export-dir")
        })?;
        let listener = Listener::open(&Place::Unix(directory.join(SOCKET_NAME)))?;
        let mut server = Server::new(first_key);
        server.listen(listener, reactor)?;
        Ok(Exporter { server, known: BTreeMap::new(), stopped: false })
    }

    /// A descriptor is ready.
    pub fn ready(&mut self, ready: Ready) {
        self.server.ready(ready);
    }

    /// Takes what clients want to the disks. Before the backend's turn.
    pub fn receive<H: Hypervisor, S: Storage>(
        &mut self,
        backend: &mut Backend<H, S>,
        now: Duration,
        reactor: &mut Reactor,
    ) {
        self.server.turn(backend.pump(), now, reactor);
    }

    /// Goes by the disks that there are, and takes their answers to the clients. After every turn of the backend and before
    /// anything else is asked: the number of a disk that is gone may be another's then. True when there is more to do at once.
    pub fn send<H: Hypervisor, S: Storage>(
        &mut self,
        backend: &mut Backend<H, S>,
        now: Duration,
        reactor: &mut Reactor,
    ) -> bool {
        if backend.disks_changed() && !self.stopped {
            self.compare(backend, reactor);
        }
        let pump = backend.pump();
        while let Some((token, result)) = pump.next_answer() {
            self.server.answered(token, result, pump);
        }
        self.server.send(pump, now, reactor)
    }

    fn compare<H: Hypervisor, S: Storage>(&mut self, backend: &mut Backend<H, S>, reactor: &mut Reactor) {
        let key = |open: &OpenDisk| (open.address, open.disk, open.file, open.sectors);
        let open: BTreeMap<Key, OpenDisk> = backend.open_disks().map(|open| (key(&open), open)).collect();
        let server = &mut self.server;
        self.known.retain(|key, export| {
            let stays = open.contains_key(key);
            if !stays {
                server.remove_export(*export, backend.pump(), reactor);
            }
            stays
        });
        for (key, open) in open {
            self.known.entry(key).or_insert_with(|| {
                server.add_export(Export {
                    name: open.address.to_string(),
                    description: open.image,
                    disk: open.disk,
                    sectors: open.sectors,
                    read_only: true,
                    preferred_bytes: open.physical_block_bytes.max(PREFERRED_BYTES),
                })
            });
        }
    }

    /// Takes no more clients, and closes every connection.
    pub fn stop<H: Hypervisor, S: Storage>(&mut self, backend: &mut Backend<H, S>, reactor: &mut Reactor) {
        self.stopped = true;
        self.server.stop_listening(reactor);
        self.server.close_all(backend.pump(), reactor);
    }

    /// Requests that no disk has answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.server.in_flight()
    }

    /// When it wants its turn though nothing happens.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        self.server.deadline()
    }
}
